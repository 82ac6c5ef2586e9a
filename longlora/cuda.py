"""CUDA devices, their streams and memory. Importing this module needs no GPU, driver or build with CUDA.

Ops run on the device of their arrays. They are queued on a stream, and nothing waits for them. The stream is
torch's current stream if an argument is a torch tensor, CuPy's if an argument is a CuPy array, else this
thread's stream, which `stream` sets and which is the default stream at first.

A graph can capture an op only after a first call outside the graph, which loads code and libraries. The owner
of the graph must keep its arrays alive. Workspace of a captured call is kept until the process ends, unless
it belongs to torch.
"""

import os
import sys
import threading
from typing import Any

from longlora import _C


def reason() -> str | None:
    """Why no GPU can be used; None if one can."""
    count, why = _C.cuda_devices()
    refusals = [refusal(i) for i in range(count)]
    return why if not count else None if None in refusals else refusals[0]


def is_available() -> bool:
    """Whether a GPU can be used. `reason` says why not."""
    return reason() is None


def device_count() -> int:
    """The number of CUDA devices, usable or not."""
    return _C.cuda_devices()[0]


def _index(device: object) -> int:
    """The index of a device: 0 for 0, "cuda", "cuda:0" or torch's device. ValueError for other devices."""
    if isinstance(device, int):
        return device
    kind, colon, index = str(device).partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ValueError(f"device should be cuda, cuda:N or N, got {device!r}")
    return int(index or 0)


def refusal(device: object) -> str | None:
    """Why this device cannot be used (it does not exist, is too old); None if it can."""
    return _C.cuda_refusal(_index(device))


def synchronize(device: object = "cuda") -> None:
    """Wait for all work queued on the device. RuntimeError if the device cannot be used or has failed."""
    _C.cuda_synchronize(_index(device))


def memory_info(device: object = "cuda") -> tuple[int, int]:
    """(free, total) bytes of the device. RuntimeError if it cannot be used."""
    return _C.cuda_memory(_index(device))


def properties(device: object = "cuda") -> dict[str, Any]:
    """name, sm (90 for compute capability 9.0), multiprocessors and bus of a device."""
    return _C.cuda_properties(_index(device))


def versions() -> tuple[str | None, str | None]:
    """(driver, runtime), as "13.0". None without a driver, or in a build without CUDA."""
    driver, runtime = (f"{v // 1000}.{v % 1000 // 10}" if v else None for v in _C.cuda_versions())
    return driver, runtime


def built_for() -> str | None:
    """The GPUs that this build has code for, as "80 90a 100 120" (and PTX of the last one), or "emulation".

    None in a build without CUDA.
    """
    return _C.cuda_built_for or None


def cublas() -> tuple[str, str]:
    """(version, file) of the cuBLASLt in use; loads it if necessary. RuntimeError if none is found."""
    version, path = _C.cublas_version()
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}", path


# ---- streams -------------------------------------------------------------------------------------


def _handle(stream: Any) -> int:
    if stream is None:
        return 0
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return stream.__cuda_stream__()[1]
    for name in ("cuda_stream", "ptr"):  # torch's and CuPy's
        if isinstance(getattr(stream, name, None), int):
            return getattr(stream, name)
    raise TypeError(
        f"stream should be a handle, None, or have __cuda_stream__ (or be torch's or CuPy's), got {stream!r}"
    )


class stream:
    """`with stream(s):` sets this thread's stream, for Tensors and arrays without a stream of their library.

    s is a handle, a stream of torch or CuPy, an object with __cuda_stream__, or None for the default stream;
    anything else raises TypeError. Inside, a call on another device than the stream's raises ValueError.
    """

    def __init__(self, stream: Any) -> None:
        self._kept, self._handle = stream, _handle(stream)
        self._before: list[int] = []

    def __enter__(self) -> "stream":
        self._before.append(_C.cuda_set_stream(self._handle)[0])
        return self

    def __exit__(self, *error: object) -> None:
        _C.cuda_set_stream(self._before.pop())


def current_stream() -> int:
    """The handle of this thread's stream, 0 for the default one."""
    return _C.cuda_get_stream()[0]


# ---- called by the extension ---------------------------------------------------------------------

_arenas = threading.local()
_graphs: list = []  # workspace of captured graphs, kept because a graph may be replayed at any time


def _workspace(nbytes, device, stream, like, capture):
    """Device memory for a call: torch's for its tensors, else one piece per thread, device and stream.

    Calls of one thread on one stream run one after another, so they share a piece, which grows if necessary.
    Each capture (a number, 0 outside captures) has pieces of its own.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(nbytes, dtype=torch.uint8, device=like.device)
    arenas = _arenas.__dict__.setdefault("pieces", {})
    key = device, stream, capture
    piece = arenas.get(key)
    if piece is None or piece.nbytes < nbytes:
        arenas.pop(key, None)
        piece = None  # frees the old piece before the new one is allocated
        piece = arenas[key] = _C.Tensor((nbytes + 0xFFFFF) & ~0xFFFFF, "uint8", f"cuda:{device}")
        if capture:
            _graphs.append(piece)
    return piece


def _stream(like, device):
    """The current stream of CuPy, or of a torch without the exchange API, for their arrays; else None."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(like, cupy.ndarray):
        return cupy.cuda.get_current_stream(device).ptr
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.cuda.current_stream(device).cuda_stream
    return None


def _cublas_files():
    """The files of cuBLASLt in pip and conda packages that the driver supports.

    The extension tries a copy that the process has already loaded before these files, and the system's after.
    """
    driver = _C.cuda_versions()[0] // 1000
    folders = [
        (*name, folder)
        for name in ((13, "nvidia/cu13/lib"), (12, "nvidia/cublas/lib"))
        for folder in sys.path
    ]
    folders += [(version, "lib", sys.prefix) for version in (13, 12)]
    files = [
        os.path.join(folder, name, f"libcublasLt.so.{version}")
        for version, name, folder in folders
        if not driver or version <= driver
    ]
    return tuple(file for file in files if os.path.exists(file))


_C.cuda_hooks(_workspace, _stream)
if _C.cuda_built_for:
    _C.cublas_paths(_cublas_files())
