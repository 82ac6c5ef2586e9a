"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine.

longlora.ops and Tensor: the kernels, on NumPy, torch and other DLPack arrays. The commands of the command line are functions of
modules that are imported when they are first used: train.train, plan.plan, ppl.run, adapter.merge, inspect.describe,
doctor.examine, demo.run.
"""
import os

# The OpenMP runtime reads this once, when _C brings it in: threads that wait for work sleep. Spinning ones, the default, make a
# training step several times slower as soon as anything else runs on the machine. What the user has set wins; nothing that is
# loaded later sees it.
_given = "OMP_WAIT_POLICY" in os.environ
if not _given:
    os.environ["OMP_WAIT_POLICY"] = "passive"
from ._C import Tensor, get_num_threads, set_num_threads
get_num_threads()
if not _given:
    del os.environ["OMP_WAIT_POLICY"]
from . import ops

__version__ = "0.1.0"
_MODULES = ("adapter", "demo", "doctor", "inspect", "model", "plan", "ppl", "train", "weights")
__all__ = ["Tensor", "get_num_threads", "ops", "set_num_threads", *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        import importlib
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
