"""Fixtures of the tests of longlora.torch."""

import pytest


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


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
