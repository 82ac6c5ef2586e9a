"""longlora/macos.py, without a Mac: a fake kernel answers, and the structures match macOS's headers."""

import ctypes
import importlib.util
import os
import subprocess
import sys

import pytest

from longlora import job, macos

MEMORY, PAGE = 16 << 30, os.sysconf("SC_PAGE_SIZE")


class Kernel:
    """The functions of macOS's C library that are called, and how often the host was asked for a right."""

    def __init__(self):
        self.rights, self.failure = 0, 0

    def mach_host_self(self):
        self.rights += 1
        return 11

    def mach_task_self(self):
        return 12

    def host_statistics64(self, port, flavor, answer, count):
        assert (port.value, flavor.value, count._obj.value) == (11, 4, 128)
        free, active, inactive = 1000, 70, 200
        ctypes.memmove(answer, (ctypes.c_uint32 * 3)(free, active, inactive), 12)
        return self.failure

    def task_info(self, port, flavor, answer, count):
        assert (port.value, flavor.value, count._obj.value) == (12, 20, 128)
        virtual, resident, largest = 400 << 30, 1 << 30, 3 << 30
        ctypes.memmove(answer, (ctypes.c_uint64 * 3)(virtual, resident, largest), 24)
        return self.failure

    def sysctlbyname(self, name, value, size, new, new_size):
        found = {b"hw.memsize": MEMORY.to_bytes(8, "little"), b"machdep.cpu.brand_string": b"Apple M9\0"}[
            name
        ]
        assert new is None and new_size.value == 0 and size._obj.value >= len(found)
        ctypes.memmove(value, found, len(found))
        size._obj.value = len(found)
        return self.failure


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    macos._host.cache_clear()
    monkeypatch.setattr(macos, "_libc", lambda: kernel)
    monkeypatch.setattr(job, "system", macos)
    yield kernel
    macos._host.cache_clear()


def test_what_a_job_may_use(kernel):
    assert job.available_memory() == 1200 * PAGE
    assert job.resident_memory() == 1 << 30 and job.peak_memory() == 3 << 30
    assert job.memory(1 << 20) == (1 << 20) + 1200 * PAGE
    assert job.memory(MEMORY) == MEMORY, "no more than the machine has"
    assert job.processors() == os.cpu_count() and job.processor_name() == "Apple M9"
    job.available_memory()
    assert kernel.rights == 1
    job.limit_memory(1)  # has no effect, or this process would end
    job.trim_heap()
    assert kernel.rights == 1


def test_a_kernel_that_does_not_answer(kernel):
    kernel.failure = 5
    for ask, what in (
        (job.available_memory, "the kernel does not answer VmStatistics64: error 5"),
        (job.peak_memory, "the kernel does not answer MachTaskBasicInfo: error 5"),
        (job.processor_name, "sysctl knows no machdep.cpu.brand_string"),
    ):
        with pytest.raises(OSError, match=what):
            ask()


@pytest.mark.parametrize("platform, module", [("darwin", "longlora.macos"), ("linux", "longlora.linux")])
def test_each_system_has_its_module(monkeypatch, platform, module):
    monkeypatch.setattr(sys, "platform", platform)
    spec = importlib.util.spec_from_file_location("job_elsewhere", job.__file__)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.system.__name__ == module and loaded.NORESERVE == loaded.system.NORESERVE


HEADERS = ["mach/mach.h", "sys/mman.h", "stddef.h"]


def test_the_headers_of_macos_say_the_same(tmp_path):
    pytest.importorskip("ziglang", reason="ziglang has macOS's headers: pip install ziglang")
    checks = [
        f"MAP_NORESERVE == {macos.NORESERVE}",
        f"HOST_VM_INFO64 == {macos.HOST_VM_INFO64}",
        f"MACH_TASK_BASIC_INFO == {macos.MACH_TASK_BASIC_INFO}",
        "sizeof(mach_port_t) == 4 && sizeof(mach_msg_type_number_t) == 4",
    ]
    for kind, name in (
        (macos.VmStatistics64, "struct vm_statistics64"),
        (macos.MachTaskBasicInfo, "struct mach_task_basic_info"),
    ):
        checks.append(f"sizeof({name}) <= {ctypes.sizeof(kind)}")
        for field, _ in kind._fields_[:-1]:
            place = getattr(kind, field)
            checks.append(f"offsetof({name}, {field}) == {place.offset}")
            checks.append(f"sizeof((({name} *)0)->{field}) == {place.size}")
    source = tmp_path / "checks.c"
    lines = [
        *(f"#include <{name}>" for name in HEADERS),
        *(f'_Static_assert({check}, "{check}");' for check in checks),
    ]
    source.write_text("\n".join(lines) + "\n")
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        "aarch64-macos",
        "-c",
        source,
        "-o",
        "made.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
