"""Memory and processors of the job, from files of /proc and of control groups as systems write them."""

import resource

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
