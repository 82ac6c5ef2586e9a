"""CUDA devices: what is there, streams, memory. Importing it needs neither a GPU nor a driver nor a build with CUDA.

Ops run on the device of their arrays, queued on a stream and not waited for: torch's current one where an argument is torch's,
CuPy's where one is CuPy's, else this thread's, which `stream` sets and which is the default stream at first.

They can be captured in a graph, by whoever captures that stream, once each has run before: first calls load code and libraries.
Arrays are the graph's owner's to keep; workspace that is not torch's is kept until the process ends.
"""

import os
import sys
import threading

from longlora import _C


def reason():
    """Why no GPU can be used, None where one can."""
    count, why = _C.cuda_devices()
    refusals = [refusal(i) for i in range(count)]
    return why if not count else None if None in refusals else refusals[0]


def is_available():
    """Whether a GPU can be used; `reason` says why not."""
    return reason() is None


def device_count():
    """How many CUDA devices there are, usable or not."""
    return _C.cuda_devices()[0]


def _index(device):
    """0 of 0, "cuda", "cuda:0" or torch's device."""
    if isinstance(device, int):
        return device
    kind, colon, index = str(device).partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ValueError(f"device should be cuda, cuda:N or N, got {device!r}")
    return int(index or 0)


def refusal(device):
    """Why this device cannot be used (it does not exist, is too old), None where it can."""
    return _C.cuda_refusal(_index(device))


def synchronize(device="cuda"):
    """Waits for all work queued on the device."""
    _C.cuda_synchronize(_index(device))


def memory_info(device="cuda"):
    """-> (free, total) bytes of the device."""
    return _C.cuda_memory(_index(device))


def properties(device="cuda"):
    """-> dict: name, sm (90 for compute capability 9.0), multiprocessors, bus."""
    return _C.cuda_properties(_index(device))


def versions():
    """-> (driver, runtime) as "13.0"; the driver is None where there is none, the runtime in a build without CUDA."""
    return tuple(f"{v // 1000}.{v % 1000 // 10}" if v else None for v in _C.cuda_versions())


def built_for():
    """The GPUs that this build has code for, as "80 90a 100 120" (of the last one PTX too); "emulation"; None without CUDA."""
    return _C.cuda_built_for or None


def cublas():
    """-> (version, file) of the cuBLASLt in use, loaded if it is not yet. RuntimeError where none is found."""
    version, path = _C.cublas_version()
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}", path


# ---- streams -------------------------------------------------------------------------------------


def _handle(stream):
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
    """The stream of this thread inside `with`: a handle, torch's, CuPy's or any with __cuda_stream__; None: the default one.

    For Tensors and other arrays whose library does not say its own. A call on another device than the stream's is refused.
    """

    def __init__(self, stream):
        self._kept, self._handle, self._before = stream, _handle(stream), []

    def __enter__(self):
        self._before.append(_C.cuda_set_stream(self._handle)[0])
        return self

    def __exit__(self, *error):
        _C.cuda_set_stream(self._before.pop())


def current_stream():
    """The handle of this thread's stream."""
    return _C.cuda_get_stream()[0]


# ---- what the extension asks for -----------------------------------------------------------------

_arenas = threading.local()
_graphs = []  # workspace of captured graphs, which run again whenever they like: it stays


def _workspace(nbytes, device, stream, like, capture):
    """Memory for one call: from torch for torch's arrays, else one piece per thread, device and stream that grows when it must.

    Calls of one thread on one stream run one after another and may share it. Each capture (its number, 0 outside of one) has
    pieces of its own.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(nbytes, dtype=torch.uint8, device=like.device)
    arenas = _arenas.__dict__.setdefault("pieces", {})
    key = device, stream, capture
    piece = arenas.get(key)
    if piece is None or piece.nbytes < nbytes:
        arenas.pop(key, None)
        piece = None  # the former goes first
        piece = arenas[key] = _C.Tensor((nbytes + 0xFFFFF) & ~0xFFFFF, "uint8", f"cuda:{device}")
        if capture:
            _graphs.append(piece)
    return piece


def _stream(like, device):
    """The current stream of an array's library where it can be asked: CuPy's, that of a torch without the C exchange API; None
    else."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(like, cupy.ndarray):
        return cupy.cuda.get_current_stream(device).ptr
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.cuda.current_stream(device).cuda_stream
    return None


def _cublas_files():
    """cuBLASLt of pip's and conda's packages, for the driver that is there. What is in the process already goes before these,
    the system's after."""
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
