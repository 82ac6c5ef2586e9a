"""What this job may use, and what it uses: memory and processors. Each system has a module of its own."""

import resource
import sys

if sys.platform == "darwin":
    from longlora import macos as system
else:
    from longlora import linux as system

NORESERVE = system.NORESERVE  # flag of mmap: memory that may exceed what the machine has


def available_memory() -> int:
    """Bytes that this process can still take: the least of what machine, groups and limits leave."""
    return system.available_memory()


def memory(own: int) -> int:
    """Bytes that this process, which has `own` resident, can have in all.

    That is `own` and what is available, but no more than a group may have: resident pages of shared libraries
    may be on another group's account.
    """
    return min([own + available_memory(), *system.memory_limits()])


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return system.resident_memory()


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return system.peak_memory()


def trim_heap() -> None:
    """Give memory that was freed, but that the C library keeps, back to the system, where it can."""
    system.trim_heap()


def limit_memory(size: int) -> None:
    """Let this process map `size` bytes at most, or fewer if that is its limit, where the system can."""
    if system.LIMITS_MEMORY:
        _limit(resource.RLIMIT_AS, size)


def limit_processor_time(seconds: int) -> None:
    """End this process after `seconds` of processor time, or earlier if that is its limit."""
    _limit(resource.RLIMIT_CPU, seconds)


def _limit(kind, most):
    there = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
    least = min([most, *there])
    resource.setrlimit(kind, (least, least))


def processors() -> int:
    """Processors that this process may use."""
    return system.processors()


def processor_name() -> str:
    """What the system calls its processor; empty if it does not say."""
    return system.processor_name()
