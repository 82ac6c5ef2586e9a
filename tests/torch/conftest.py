"""What kernels the tests of longlora.torch ran."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of each kernel that swap uses, by name."""
    from swap_checks import KERNELS

    from longlora.torch import ops

    counts = dict.fromkeys(KERNELS, 0)

    def counted(name, kernel):
        def call(*args, **kwargs):
            counts[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in KERNELS:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts
