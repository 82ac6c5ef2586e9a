"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine.

longlora.ops and Tensor: the kernels, on NumPy, torch and other DLPack arrays. The commands of the command line are functions of
modules that are imported when they are first used: train.train, plan.plan, ppl.run, adapter.merge, inspect.describe,
doctor.examine, demo.run.
"""
from . import ops
from ._C import Tensor, get_num_threads, set_num_threads

__version__ = "0.1.0"
_MODULES = ("adapter", "demo", "doctor", "inspect", "model", "plan", "ppl", "train", "weights")
__all__ = ["Tensor", "get_num_threads", "ops", "set_num_threads", *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        import importlib
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
