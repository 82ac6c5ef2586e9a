"""The devices of the tests of longlora.torch: "cpu", and "cuda" if torch sees a GPU that this build supports.

A test file imports the fixture `device`. Each of its tests then runs once per device, on arrays from `put`.
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
    """Skip the test without a usable GPU."""
    if device == "cpu":
        pytest.skip("needs a GPU that torch and this build can use")


def current():
    return _current


def put(x):
    """Copy an ndarray, a tensor or a module to the device of the test."""
    x = x if isinstance(x, (torch.Tensor, torch.nn.Module)) else torch.from_numpy(x)
    return x.to(_current)
