"""The devices of the tests of longlora.torch: "cuda" beside "cpu" where torch sees a GPU and this build has
kernels for it.

A test file imports the fixture `device`, and every test of it runs once on each: what `put` made lies there.
"""

import pytest
import torch

try:
    from longlora import cuda

    CUDA = cuda.is_available() and torch.cuda.is_available()
except ImportError:
    CUDA = False
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
_current = "cpu"


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    global _current
    _current = request.param
    yield request.param
    _current = "cpu"


@pytest.fixture
def gpu(device):
    """For tests of what only a GPU has."""
    if device == "cpu":
        pytest.skip("this is for a GPU that torch and this build can use")


def current():
    return _current


def put(x):
    """An ndarray, a tensor or a module, on the device of the test."""
    x = x if isinstance(x, (torch.Tensor, torch.nn.Module)) else torch.from_numpy(x)
    return x.to(_current)
