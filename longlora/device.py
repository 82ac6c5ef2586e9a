"""Where a run computes: "cpu", or "cuda:0" and so on. All that the driver knows of the difference is in here.

Ops, views and fills are the same calls on both; Tensor.copy_ copies between them. On a GPU calls are queued and not waited for:
what waits is `host`, and it is called where a number is needed.
"""

import re
import threading

import numpy as np

from longlora import _C
from longlora.errors import UserError

CPU = "cpu"


def check_device(wanted):
    """UserError unless `wanted` is how a device is written."""
    if not isinstance(wanted, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UserError(f"device should be auto, cpu, cuda, or cuda:0 and so on, got {wanted!r}")


def choose(wanted):
    """What `wanted` comes to here -> ("cpu" or "cuda:N", a sentence that says what was chosen and why).

    auto is the first GPU, where there is one that can be used. UserError if a GPU is asked for that cannot be.
    """
    check_device(wanted)
    if wanted == CPU:
        return CPU, f"device: {_cpu()}"
    from longlora import cuda

    number = int(wanted.partition(":")[2] or 0)
    if wanted == "auto":
        number = next((i for i in range(cuda.device_count()) if _refusal(i) is None), 0)
    why = _refusal(number)
    if why is not None and wanted == "auto":
        return CPU, f"device: {_cpu()}; no GPU: {why}"
    if why is not None:
        raise UserError(f"device {wanted} cannot be used: {why}")
    free, total = cuda.memory_info(number)
    return f"cuda:{number}", (
        f"device: cuda:{number}, {cuda.properties(number)['name']}, {free / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB free"
    )


def _refusal(number):
    """Why a run cannot be on this GPU, None where it can: that there is no cuBLAS is better known before it has begun."""
    from longlora import cuda

    why = _C.cuda_refusal(number)
    if why is None:
        try:
            cuda.cublas()
        except RuntimeError as error:
            return str(error)
    return why


def _cpu():
    return f"cpu, {_C.get_num_threads()} threads, {_C.isa_names[_C.get_isa()]}"


def free_memory(device):
    """Bytes that a run can have on the GPU `device`."""
    from longlora import cuda

    return cuda.memory_info(int(device.partition(":")[2]))[0]


def send(array, device):
    """An ndarray as ops on `device` take it: itself on the CPU."""
    if device == CPU:
        return array
    out = _C.Tensor(array.shape, str(array.dtype), device)
    out.copy_(array)
    return out


_thread = threading.local()


def staged(out):
    """Pinned memory in the shape of `out`, a Tensor on a GPU, to fill and to copy from. It is this thread's only piece: what was
    queued before is waited for."""
    from longlora import cuda

    cuda.synchronize(out.device)
    piece = getattr(_thread, "piece", None)
    if piece is None or piece.nbytes < out.nbytes:
        piece = _thread.piece = _C.Tensor((out.nbytes,), "uint8", pinned=True)
    return piece.view(out.shape, out.dtype)


def host(x):
    """x as an ndarray: itself, or of a Tensor a view, if it is on a GPU a copy, made when all that was queued before is done."""
    if isinstance(x, np.ndarray):
        return x
    if x.device != CPU:
        there, x = x, _C.Tensor(x.shape, x.dtype)
        x.copy_(there)
        _thread.waits = waits() + 1
    return x.numpy()


def waits():
    """How often `host` has waited in this thread: each time all that was queued before is done."""
    return getattr(_thread, "waits", 0)


class Inputs(threading.local):
    """Writes small arrays to Tensors, to a GPU in the background: from pinned memory, of which a piece is written again only when
    its copy is known to be done, because `host` has waited since. Each thread has its own, and keeps to one stream."""

    def __init__(self):
        self._pieces = []  # [Tensor, waits() when it was last copied from]

    def put(self, out, array):
        if out.device == CPU:
            return out.copy_(array)
        piece = next((p for p in self._pieces if p[1] < waits() and p[0].nbytes >= out.nbytes), None)
        if piece is None:
            piece = [_C.Tensor((out.nbytes,), "uint8", pinned=True), 0]
            self._pieces.append(piece)
        there = piece[0].view(out.shape, out.dtype)
        there.copy_(array)
        out.copy_(there)
        piece[1] = waits()
