"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine.

ops, Tensor: the kernels, on NumPy, torch and other DLPack arrays. train, plan, ppl, merge, inspect, doctor, demo: the commands
of the command line as functions; each is imported when it is first used.
"""
from . import ops
from ._C import Tensor, get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = ["Tensor", "demo", "doctor", "get_num_threads", "inspect", "merge", "ops", "plan", "ppl", "set_num_threads", "train"]


def train(**options):
    """Train with the options of longlora.options.TrainOptions as keywords -> train.Result. UserError for bad input."""
    from .train import train as function
    return function(**options)
