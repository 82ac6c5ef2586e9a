"""LongLoRA (arXiv 2309.12307): extend the context of a pretrained decoder on one machine.

The commands of the command line are functions of this package: train, plan, ppl, generate, chat, serve,
merge, inspect, doctor, demo. Session is a model that answers again and again. longlora.ops and Tensor are the
kernels, on NumPy, torch and other DLPack arrays. longlora.torch works on models of transformers.
longlora.cuda describes the GPUs. Every name is imported at its first use, so `import longlora` loads nothing,
not even NumPy.
"""

import importlib
import os
import sys

TYPE_CHECKING = False  # as in typing, which takes longer to import than this file
if TYPE_CHECKING:
    from longlora import _C, cuda, eval, ops
    from longlora._C import Tensor, get_num_threads, set_num_threads
    from longlora.evaluation.ppl import run as ppl
    from longlora.files.merge import merge
    from longlora.serving.chat import chat
    from longlora.serving.generate import generate
    from longlora.serving.serve import serve
    from longlora.serving.session import Session
    from longlora.tools.demo import run as demo
    from longlora.tools.doctor import examine as doctor
    from longlora.tools.inspect import describe as inspect
    from longlora.tools.plan import plan
    from longlora.training.driver import train

__version__ = "0.1.0"
_COMPILED = ("Tensor", "get_num_threads", "set_num_threads")
_MODULES = ("cuda", "eval", "ops", "torch")
# The commands: module and function.
_COMMANDS = {
    "train": "training.driver:train",
    "plan": "tools.plan:plan",
    "ppl": "evaluation.ppl:run",
    "generate": "serving.generate:generate",
    "chat": "serving.chat:chat",
    "serve": "serving.serve:serve",
    "merge": "files.merge:merge",
    "inspect": "tools.inspect:describe",
    "doctor": "tools.doctor:examine",
    "demo": "tools.demo:run",
}
_OTHERS = {"Session": "serving.session:Session"}
__all__ = [
    *_COMPILED,
    *_COMMANDS,
    *_OTHERS,
    "cuda",
    "ops",
]  # not torch, which may not be installed, and not eval, which would hide the built-in function


def _installed(here: str) -> list[str]:
    """The folders that modules of the package come from.

    In a clone, `python -m longlora` and torchrun import the source tree of the current folder. If it has no
    extension and the package was installed from it, the modules are those of the installed package.
    """
    from importlib.machinery import EXTENSION_SUFFIXES as suffixes

    def built(folder: str) -> bool:
        return any(os.path.exists(os.path.join(folder, f"_C{suffix}")) for suffix in suffixes)

    def source(folder: str) -> bytes:
        with open(os.path.join(folder, "__init__.py"), "rb") as file:
            return file.read()

    if not built(here):
        for folder in (os.path.join(entry, "longlora") for entry in sys.path):
            if built(folder) and source(folder) == source(here):
                return [folder]
    return [here]


__path__ = _installed(os.path.dirname(__file__))


def _compiled():
    """The extension. Modules of the package import it with `from longlora import _C`, which calls this
    function.

    The OpenMP runtime reads its settings once, when the extension loads it. Idle threads should look for work
    1000 times (about 20 us), then sleep. Longer spinning, the default, makes a training step several times
    slower when anything else runs on the machine. Sleeping at once makes it 3 % slower, and a small op 15 %,
    when nothing else runs. The user's own settings win. A library that is loaded later and shares the
    runtime, as torch does, gets the same settings. The environment is restored afterwards.
    """
    loaded = sys.modules.get(f"{__name__}._C")
    if loaded is not None:
        return loaded  # its number of threads may be the user's by now
    ours = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    if ours.keys() & os.environ.keys():
        ours = {}
    os.environ.update(ours)
    try:
        # The extension imports it too, but turns what comes up there, such as Ctrl-C, into an ImportError.
        importlib.import_module("numpy")
        try:
            extension = importlib.import_module("._C", __name__)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"longlora was not built in {os.path.dirname(__file__)}: "
                "run `pip install .`, or `python setup.py build_ext --inplace` in the tree"
            ) from error
        threads = extension.get_num_threads()
    finally:
        for name in ours:
            os.environ.pop(name, None)
    if "OMP_NUM_THREADS" not in os.environ:
        from longlora.job import processors

        extension.set_num_threads(min(threads, processors()))  # OpenMP knows no quota of a control group
    return extension


def __dir__():
    return [*globals(), *__all__]


def __getattr__(name):
    if name == "_C":
        return _compiled()
    if name in _COMPILED:
        value = globals()[name] = getattr(_compiled(), name)
        return value
    place = _COMMANDS.get(name) or _OTHERS.get(name)
    if place is not None:
        module, _, function = place.partition(":")
        value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), function)
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
