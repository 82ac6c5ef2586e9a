"""Memory and processors of the job, from files of /proc and of control groups as systems write them."""

import resource
from types import SimpleNamespace

import pytest

from longlora import job, linux

MEMINFO = "MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes files below /proc and the mounted groups, and the folder of the groups."""
    groups = tmp_path / "groups"
    monkeypatch.setattr(linux, "PROC", str(tmp_path / "proc"))

    def write(files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("GROUPS", str(groups)))

    return write


V2 = "30 25 0:26 / GROUPS rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "30 25 0:26 / GROUPS/memory rw - cgroup cgroup rw,memory\n"
    "31 25 0:27 / GROUPS/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def test_the_machine_alone(system):
    system({})
    assert job.available_memory() == 20000000 * 1024


def test_a_nested_group_of_version_2(system):
    """The job's group has no limit, the slice above it has. Files in the page cache count as free."""
    system(
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "proc/self/mountinfo": V2,
            "groups/slurm/job_7/step_0/memory.max": "max\n",
            "groups/slurm/job_7/step_0/memory.current": "300\n",
            "groups/slurm/job_7/memory.max": "1000000000\n",
            "groups/slurm/job_7/memory.current": "700000000\n",
            "groups/slurm/job_7/memory.stat": "anon 1\ninactive_file 50000000\nactive_file 10000000\n",
            "groups/slurm/memory.max": "2000000000\n",
            "groups/slurm/memory.current": "0\n",
        }
    )
    assert job.available_memory() == 360000000
    assert job.memory(5) == 360000005 and job.memory(900_000_000) == 1_000_000_000


def test_a_nested_group_of_version_1(system):
    system(
        {
            "proc/self/cgroup": "4:memory:/batch/job\n1:cpu,cpuacct:/batch\n0::/\n",
            "proc/self/mountinfo": V1,
            "groups/memory/batch/job/memory.limit_in_bytes": "419430400\n",
            "groups/memory/batch/job/memory.usage_in_bytes": "19430400\n",
            "groups/memory/batch/job/memory.stat": "inactive_file 1\ntotal_inactive_file 4096\n",
            "groups/memory/batch/memory.limit_in_bytes": "9223372036854771712\n",
            "groups/memory/batch/memory.usage_in_bytes": "1\n",
            "groups/cpu/batch/cpu.cfs_quota_us": "150000\n",
            "groups/cpu/batch/cpu.cfs_period_us": "100000\n",
        }
    )
    assert job.available_memory() == 400000000 + 4096
    assert job.processors() <= 2


def test_a_container_whose_mount_begins_at_its_group(system):
    """/proc/self/cgroup names the host's path, which does not exist inside."""
    system(
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "proc/self/mountinfo": "30 25 0:26 /docker/abc GROUPS rw - cgroup2 cgroup2 rw\n",
            "groups/memory.max": "5000\n",
            "groups/memory.current": "1000\n",
            "groups/cpu.max": "50000 100000\n",
        }
    )
    assert job.available_memory() == 4000
    assert job.processors() == 1


def test_no_quota(system):
    system({"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2, "groups/a/cpu.max": "max 100000\n"})
    import os

    assert job.processors() == len(os.sched_getaffinity(0))


def test_a_limit_of_address_space(system, monkeypatch):
    """ulimit -v: what is mapped already does not count."""
    system({"proc/self/status": "VmSize: 1000 kB\nVmData: 10 kB\n"})
    limits = {resource.RLIMIT_AS: (5000 * 1024, -1), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[which])
    assert job.available_memory() == 4000 * 1024


def test_damaged_files_count_as_none(system):
    system({"proc/self/cgroup": "nonsense\n::\n", "proc/self/mountinfo": "x\n- \n", "proc/meminfo": "?"})
    assert job.available_memory() > 0 and job.processors() >= 1
    system({"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": "1 2 3 / GROUPS - cgroup memory\n"})
    assert job.available_memory() == 20000000 * 1024


def test_quotas_of_every_group(system, monkeypatch):
    """Of 8 processors, the least quota counts, rounded up. -1, max, 0 and words are none."""
    monkeypatch.setattr(linux.os, "sched_getaffinity", lambda pid: set(range(8)) if pid == 0 else set())
    v1 = {"proc/self/cgroup": "3:cpuset:/\n4:cpu,cpuacct:/a/b\n", "proc/self/mountinfo": V1}
    v2 = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2}
    for inner, outer, count in (
        ("250000 100000", "max 100000", 3),
        ("250000 100000", "150000 100000", 2),
        ("1000 100000", "max 100000", 1),
        ("900000 100000", "", 8),
        ("3 1", "max 100000", 3),
        ("100000 0", "100000", 8),
        ("100000 100000 1", "-1 100000", 8),
    ):
        system({**v2, "groups/a/b/cpu.max": inner, "groups/a/cpu.max": outer})
        assert job.processors() == count, inner
    for quota, period, count in (("250000", "100000", 3), ("-1", "100000", 8), ("100000", "", 8)):
        system(
            {
                **v1,
                "groups/cpu/a/b/cpu.cfs_quota_us": f"{quota}\n",
                "groups/cpu/a/b/cpu.cfs_period_us": f"{period}\n",
            }
        )
        assert job.processors() == count, quota


def test_groups_of_a_folder_with_a_space(system):
    other = "29 25 0:25 / GROUPS/cpu rw - cgroup cgroup rw,cpu\nshort - cgroup2\n"
    line = "30 25 0:26 /out\\040side GROUPS/my\\040groups rw - cgroup2 cgroup2 rw\n"
    system(
        {
            "proc/self/cgroup": "7:memory:/other\n0::/out side/job\n",
            "proc/self/mountinfo": other + line,
            "groups/my groups/job/memory.max": "5000\n",
            "groups/my groups/job/memory.current": "1000\n",
            "groups/my groups/memory.max": "9000\n",
            "groups/my groups/memory.current": "8000\n",
        }
    )
    assert job.available_memory() == 1000 and job.memory(100) == 1100 and job.memory(4500) == 5000
    assert linux._plain("a\\011b\\134c\\040d") == "a\tb\\c d"


def test_a_full_group_leaves_nothing(system, monkeypatch):
    group = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "groups/memory.max": "5000\n"}
    for used, left in (("9000", 0), ("4999", 1), ("", 20000000 * 1024)):
        system({**group, "groups/memory.current": used})
        assert job.available_memory() == left
    system({**group, "groups/memory.max": str(1 << 60), "groups/memory.current": "0"})
    assert job.available_memory() == 20000000 * 1024


def test_limits_of_the_process(system, monkeypatch):
    """ulimit -d counts data alone; what is above a limit leaves nothing."""
    system({"proc/self/status": "VmSize:\t1000 kB\nVmData:\t10 kB\nVmRSS:\t7 kB\nVmHWM:\t8 kB\nName: x\n"})
    limits = {resource.RLIMIT_AS: (-1, -1), resource.RLIMIT_DATA: (50 * 1024, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[which])
    assert job.available_memory() == 40 * 1024
    limits[resource.RLIMIT_AS] = (900 * 1024, -1)
    assert job.available_memory() == 0
    assert (job.resident_memory(), job.peak_memory()) == (7 * 1024, 8 * 1024)
    put = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: put.append((kind, pair)))
    for there, asked, least in (((-1, -1), 5, 5), ((4, -1), 5, 4), ((7, 3), 5, 3), ((9, 9), 5, 5)):
        limits[resource.RLIMIT_AS] = limits[resource.RLIMIT_CPU] = there
        put.clear()
        job.limit_memory(asked)
        job.limit_processor_time(asked)
        assert put == [(kind, (least, least)) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    monkeypatch.setattr(linux, "LIMITS_MEMORY", False)
    put.clear()
    job.limit_memory(5)
    assert put == []


def test_without_a_status_the_peak_is_that_of_the_system(system, monkeypatch):
    system({"proc/self/status": ""})
    monkeypatch.setattr(
        resource, "getrusage", {resource.RUSAGE_SELF: type("Used", (), {"ru_maxrss": 3})}.__getitem__
    )
    assert job.resident_memory() == 0 and job.peak_memory() == 3 * 1024


def test_the_heap_is_trimmed_where_the_library_can(monkeypatch):
    kept = []
    glibc = SimpleNamespace(malloc_trim=lambda size: kept.append(size.value))
    for library, wanted in ((glibc, [0]), (SimpleNamespace(), [0])):
        monkeypatch.setattr(linux.ctypes, "CDLL", {None: library}.__getitem__)
        job.trim_heap()
        assert kept == wanted


def test_the_name_of_the_processor(system):
    system({"proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU: 3 GHz\nmodel name\t: Another\n"})
    assert job.processor_name() == "A CPU: 3 GHz"
    system({"proc/cpuinfo": "processor\t: 0\n"})
    assert job.processor_name() == ""


def test_bytes_that_are_no_utf_8(system, tmp_path):
    """A process can give itself any name, and its status begins with it."""
    system({"proc/cpuinfo": ""})
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/status").write_bytes(b"Name:\t\xff\xfe\nVmRSS:\t7 kB\n")
    (tmp_path / "proc/cpuinfo").write_bytes(b"model name\t: A\xff CPU\n")
    assert job.resident_memory() == 7 * 1024 and job.processor_name() == "A\ufffd CPU"
