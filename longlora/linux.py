"""What `longlora.job` asks of Linux: /proc, control groups and limits. All that is Linux only stands here.

A batch system, a container or systemd puts a job into a control group, which is rarely the root group. The
limits of every group from the job's own up to the root count, in version 1 and version 2 of control groups.
"""

import ctypes
import math
import os
import resource
from collections.abc import Iterator

PROC = "/proc"  # tests put files of their own in its place
UNLIMITED = 1 << 60  # bytes, where the system does not say how much is available
NORESERVE = 0x4000  # MAP_NORESERVE, which Python's mmap does not name
LIMITS_MEMORY = True


def available_memory() -> int:
    """The least of what machine, groups and limits leave."""
    machine = _table(f"{PROC}/meminfo")
    return min([machine.get("MemAvailable", UNLIMITED), *_left_in_groups(), *_left_of_limits()])


def memory_limits() -> list[int]:
    """What the groups of the job may have in all."""
    limits = [_number(folder, "memory.max", "memory.limit_in_bytes") for folder in _groups("memory")]
    return [limit for limit in limits if limit is not None]


def resident_memory() -> int:
    """VmRSS."""
    return _table(f"{PROC}/self/status").get("VmRSS", 0)


def peak_memory() -> int:
    """VmHWM. Without /proc it is getrusage's, which may be that of the program that started this one."""
    peak = _table(f"{PROC}/self/status").get("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def trim_heap() -> None:
    """malloc_trim, which glibc has and other C libraries lack."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def processors() -> int:
    """Processors that the process is bound to, or fewer by the quota of its groups."""
    count = len(os.sched_getaffinity(0))
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def processor_name() -> str:
    """The model name of the first processor; empty where /proc/cpuinfo has none, as on ARM."""
    for line in _text(f"{PROC}/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return ""


def _left_in_groups() -> Iterator[int]:
    """What each group leaves. Its files in the page cache go when memory is needed, so they count as free."""
    for folder in _groups("memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or used is None:
            continue
        cached = _table(os.path.join(folder, "memory.stat"), 1)
        # Version 1 counts a group with its children under total_*; version 2 always does.
        names = ("total_inactive_file", "total_active_file"), ("inactive_file", "active_file")
        found = next((pair for pair in names if pair[0] in cached), names[1])
        yield max(0, limit - used + sum(cached.get(name, 0) for name in found))


def _left_of_limits() -> Iterator[int]:
    """What RLIMIT_AS (ulimit -v) and RLIMIT_DATA (ulimit -d) leave."""
    status = _table(f"{PROC}/self/status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in status:
            yield max(0, soft - status[name])


def _quotas() -> Iterator[float]:
    """The processor time of each group that has a limit, in processors."""
    for folder in _groups("cpu"):
        text = _text(os.path.join(folder, "cpu.max")).split()  # "200000 100000" or "max 100000"
        if not text:
            quota, period = (
                _text(os.path.join(folder, f"cpu.cfs_{x}_us")).strip() for x in ("quota", "period")
            )
            text = [quota, period]
        if all(part.isdigit() for part in text) and len(text) == 2 and int(text[1]) > 0:
            yield int(text[0]) / int(text[1])


def _groups(controller: str) -> Iterator[str]:
    """The folders of this process's groups for a controller, from its own up to the root."""
    for line in _text(f"{PROC}/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(",") and (number, controllers) != ("0", ""):
            continue
        for root, where in _mounts(controller if controllers else None):
            # Inside a container the mount may begin at the container's own group.
            inside = os.path.relpath(path, root) if path.startswith(root.rstrip("/") + "/") else "."
            folder = os.path.normpath(os.path.join(where, inside))
            if not os.path.isdir(folder):
                folder = where
            while True:
                yield folder
                if os.path.realpath(folder) == os.path.realpath(where):
                    break
                folder = os.path.dirname(folder)


def _mounts(controller: str | None) -> Iterator[tuple[str, str]]:
    """Root and mount point of the group file systems: of a controller (version 1), or of version 2."""
    for line in _text(f"{PROC}/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        parts = fields.split()
        if len(parts) < 5:
            continue
        if controller is None and kind == "cgroup2":
            yield _plain(parts[3]), _plain(parts[4])
        elif controller is not None and kind == "cgroup":
            if controller in options.rsplit(" ", 1)[-1].split(","):
                yield _plain(parts[3]), _plain(parts[4])


def _plain(text: str) -> str:
    """A path of mountinfo, where a space is written as \\040."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(folder: str, *names: str) -> int | None:
    """The number in the first of these files that holds one; "max" is none."""
    texts = (_text(os.path.join(folder, name)).strip() for name in names)
    return next((int(text) for text in texts if text.isdigit()), None)


def _table(path: str, unit: int = 1024) -> dict[str, int]:
    """The lines "name: number kB" or "name number" of a file -> bytes by name."""
    found = {}
    for line in _text(path).splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            found[parts[0]] = int(parts[1]) * unit
    return found
