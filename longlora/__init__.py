"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine.

longlora.ops and Tensor: the kernels, on NumPy, torch and other DLPack arrays; longlora.cuda: the GPUs. The commands of the
command line are functions of modules: train.train, plan.plan, ppl.run, adapter.merge, inspect.describe, doctor.examine,
demo.run. Everything is imported when it is first used, so that `longlora --help` waits for nothing, not even for NumPy.
"""

import importlib
import os

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from . import _C, adapter, cuda, demo, doctor, inspect, model, ops, plan, ppl, train, weights
    from ._C import Tensor, get_num_threads, set_num_threads

__version__ = "0.1.0"
_COMPILED = ("Tensor", "get_num_threads", "set_num_threads")
_MODULES = ("adapter", "cuda", "demo", "doctor", "inspect", "model", "ops", "plan", "ppl", "train", "weights")
__all__ = [*_COMPILED, *_MODULES]


def _compiled():
    """The extension. Modules here import it by `from . import _C`, never from it, and so come this way.

    The OpenMP runtime reads how threads wait for work once, when the extension brings it in: they sleep, after 1000 looks, some
    20 us. Spinning for long, the default, makes a training step several times slower as soon as anything else runs on the machine;
    sleeping at once makes it 3 % slower where nothing does, and a small op 15 %. What the user has set wins. A library that is
    loaded later and shares the runtime, as torch does, has its threads wait in the same way; the environment is as it was.
    """
    ours = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    if ours.keys() & os.environ.keys():
        ours = {}
    os.environ.update(ours)
    try:
        extension = importlib.import_module("._C", __name__)
        extension.get_num_threads()
    finally:
        for name in ours:
            os.environ.pop(name, None)
    return extension


def __dir__():
    return [*globals(), *__all__]


def __getattr__(name):
    if name == "_C":
        return _compiled()
    if name in _COMPILED:
        value = globals()[name] = getattr(_compiled(), name)
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
