"""The device of a run: "cpu", "cuda:0" and so on. Everything the driver treats differently on a GPU is here.

Ops, views and fills are the same calls on the CPU and on a GPU; Tensor.copy_ copies between them. Calls on a
GPU are queued and return at once. `host` waits for them; the driver calls it when it needs a number.
"""

import re
import threading
from typing import Any

import numpy as np

from longlora import _C
from longlora.errors import UserError, counted

CPU = "cpu"


def check_device(wanted: object) -> None:
    """UserError unless `wanted` is "auto", "cpu", "cuda" or "cuda:N"."""
    if not isinstance(wanted, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,9})?", wanted):
        raise UserError(f"device should be auto, cpu, cuda, or cuda:0 and so on, got {wanted!r}")


def choose(wanted: str) -> tuple[str, str]:
    """Choose a device -> ("cpu" or "cuda:N", a sentence that says what was chosen and why).

    "auto" is the first usable GPU, else the CPU. UserError if `wanted` is a GPU that cannot be used.
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


def choose_to_plan(wanted: str, max_memory: float | None) -> tuple[str, str]:
    """As `choose`, for a plan alone: it needs no GPU, driver or build with CUDA if max_memory is given."""
    check_device(wanted)
    if wanted in ("auto", CPU):
        return choose(wanted)
    number = int(wanted.partition(":")[2] or 0)
    why = _refusal(number)
    if why is None:
        return choose(wanted)
    if max_memory is None:
        raise UserError(f"device {wanted} cannot be used: {why}; with --max-memory GIB a plan is for any GPU")
    return f"cuda:{number}", f"device: a GPU with {max_memory:g} GiB for the run; none is used here: {why}"


def _refusal(number: int) -> str | None:
    """Why a run cannot use this GPU, or None. A missing cuBLAS is found here, before the run begins."""
    from longlora import cuda

    why = _C.cuda_refusal(number)
    if why is None:
        try:
            cuda.cublas()
        except RuntimeError as error:
            return str(error)
    return why


def _cpu() -> str:
    return f"cpu, {counted(_C.get_num_threads(), 'thread')}, {_C.isa_names[_C.get_isa()]}"


def free_memory(device: str) -> int:
    """The free memory of the GPU `device` in bytes."""
    from longlora import cuda

    return cuda.memory_info(int(device.partition(":")[2]))[0]


def send(array: np.ndarray, device: str) -> Any:
    """Return the array for ops on `device`: the ndarray itself on the CPU, a Tensor with a copy on a GPU."""
    if device == CPU:
        return array
    out = _C.Tensor(array.shape, str(array.dtype), device)
    out.copy_(array)
    return out


_thread = threading.local()


def staged(out: Any) -> Any:
    """Return a Tensor in pinned memory, with the shape and dtype of `out`, a Tensor on a GPU.

    The caller fills it and copies it to `out`. Each thread has one piece of pinned memory, so this function
    waits for earlier copies from it.
    """
    from longlora import cuda

    cuda.synchronize(out.device)
    piece = getattr(_thread, "piece", None)
    if piece is None or piece.nbytes < out.nbytes:
        piece = _thread.piece = _C.Tensor((out.nbytes,), "uint8", pinned=True)
    return piece.view(out.shape, out.dtype)


def host(x: Any) -> np.ndarray:
    """Return x as an ndarray. The memory of a CPU Tensor is shared.

    A GPU Tensor is copied, after all work that is queued before. The copy waits for that work.
    """
    if isinstance(x, np.ndarray):
        return x
    if x.device != CPU:
        there, x = x, _C.Tensor(x.shape, x.dtype)
        x.copy_(there)
        _thread.waits = waits() + 1
    return x.numpy()


def waits() -> int:
    """How many times `host` has waited in this thread. After each wait, all work queued before it is done."""
    return getattr(_thread, "waits", 0)


class Inputs(threading.local):
    """Copies small arrays to Tensors. On a GPU the copy runs in the background, from pinned memory.

    A piece of pinned memory is used again after its last copy is done, which is certain once `host` has
    waited. Each thread has its own pieces and must use one stream only.
    """

    def __init__(self) -> None:
        self._pieces: list[list[Any]] = []  # [Tensor, waits() at its last copy]

    def put(self, out: Any, array: np.ndarray) -> None:
        """Copy `array` to the Tensor `out` of the same shape."""
        if out.device == CPU:
            out.copy_(array)
            return
        piece = next((p for p in self._pieces if p[1] < waits() and p[0].nbytes >= out.nbytes), None)
        if piece is None:
            piece = [_C.Tensor((out.nbytes,), "uint8", pinned=True), 0]
            self._pieces.append(piece)
        there = piece[0].view(out.shape, out.dtype)
        there.copy_(array)
        out.copy_(there)
        piece[1] = waits()
