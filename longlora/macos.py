"""What `longlora.job` asks of macOS: sysctl and the kernel's counters. All that is macOS only stands here.

tests/test_macos.py compares the structures and numbers with the headers of macOS.
"""

import ctypes
import functools
import os
from typing import Any

NORESERVE = 0x40  # MAP_NORESERVE, which Python's mmap does not name
LIMITS_MEMORY = False  # a process maps hundreds of GiB, so a limit of address space would say nothing
HOST_VM_INFO64 = 4
MACH_TASK_BASIC_INFO = 20


class VmStatistics64(ctypes.Structure):
    """vm_statistics64 of mach/vm_statistics.h: pages of the machine. `rest` is room for what is not read."""

    _fields_ = (
        ("free_count", ctypes.c_uint32),
        ("active_count", ctypes.c_uint32),
        ("inactive_count", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 125),
    )


class MachTaskBasicInfo(ctypes.Structure):
    """mach_task_basic_info of mach/task_info.h: bytes of a process. `rest` is room for what is not read."""

    _fields_ = (
        ("virtual_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("resident_size_max", ctypes.c_uint64),
        ("rest", ctypes.c_uint32 * 122),
    )


def available_memory() -> int:
    """Free pages, and inactive ones, which the system gives away where memory is needed."""
    pages = VmStatistics64()
    _ask(_libc().host_statistics64, _host(), HOST_VM_INFO64, pages)
    return (pages.free_count + pages.inactive_count) * os.sysconf("SC_PAGE_SIZE")


def memory_limits() -> list[int]:
    """What the machine has. macOS has no control groups."""
    return [int.from_bytes(_sysctl("hw.memsize"), "little")]


def resident_memory() -> int:
    """The resident size by the kernel."""
    return _task().resident_size


def peak_memory() -> int:
    """The largest resident size by the kernel."""
    return _task().resident_size_max


def trim_heap() -> None:
    """Nothing: the allocator of macOS gives freed pages back by itself."""


def processors() -> int:
    """All processors, fast and slow ones. macOS binds no process to some of them."""
    return os.cpu_count() or 1


def processor_name() -> str:
    """For example "Apple M2"."""
    return _sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)


@functools.cache
def _host() -> int:
    """A right to ask about the host. Each call of mach_host_self would count one more."""
    return _libc().mach_host_self()


def _task() -> MachTaskBasicInfo:
    info = MachTaskBasicInfo()
    _ask(_libc().task_info, _libc().mach_task_self(), MACH_TASK_BASIC_INFO, info)
    return info


def _ask(function: Any, port: int, flavor: int, answer: ctypes.Structure) -> None:
    """Let the kernel fill a structure. OSError if it does not."""
    count = ctypes.c_uint32(ctypes.sizeof(answer) // 4)
    failed = function(ctypes.c_uint32(port), ctypes.c_int(flavor), ctypes.byref(answer), ctypes.byref(count))
    if failed:
        raise OSError(f"the kernel does not answer {type(answer).__name__}: error {failed}")


def _sysctl(name: str) -> bytes:
    """The value of a name of sysctl. OSError if there is none."""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    if _libc().sysctlbyname(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)):
        raise OSError(f"sysctl knows no {name}")
    return value.raw[: size.value]
