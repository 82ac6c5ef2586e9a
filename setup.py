"""Builds longlora._C: one abi3 extension with the CPU kernels per instruction set and the CUDA kernels.

Switches (environment):
    LONGLORA_CUDA       auto (default): build the CUDA kernels if there is an nvcc that can, of CUDA 11.8 or
                        later, else for the CPU alone; 0: never build them; 1: fail if that is not possible;
                        emulation: compile them as C++ against tests/emulation, for machines without a GPU
    LONGLORA_CUDA_ARCH  GPUs to build for: by default those that nvidia-smi finds, and where it finds none
                        "80 90a 100 120", or "80 90" if nvcc is older than 12.8; PTX of the last one serves
                        later GPUs
    NVCC, CUDA_HOME, CUDA_PATH      where nvcc is; else PATH, then /usr/local/cuda
    CC, CXX, MAX_JOBS   compilers; how many run at a time, by default one per processor
    DEBUG=1             -O0 -g, assertions
    SANITIZE=address,undefined      instrumented build; tests/sanitize.sh runs the op tests on one
    WIDE=1              only portable kernels, with the block sizes of AVX-512 and its bfloat16 products; 2:
                        and those of AMX. Slow; tests/ops/test_wide.py uses it on processors without them
    POOL=1              our own threads in place of OpenMP, as on macOS; tests/ops/test_pool.py uses it
    NUMPY_INCLUDE       NumPy's headers, for a cross build. It also sets CC, LDSHARED and
                        _PYTHON_HOST_PLATFORM, the platform that it builds for; see .ci/cross
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG, SANITIZE, WIDE = map(os.environ.get, ("DEBUG", "SANITIZE", "WIDE"))
# What is built for: linux-x86_64, linux-aarch64, macosx-11.0-arm64, ...
PLATFORM = sysconfig.get_platform()
MACHINE, MACOS = PLATFORM.rpartition("-")[2], PLATFORM.startswith("macosx-")
X86 = MACHINE in ("x86_64", "amd64") and not WIDE
# Apple's clang has no OpenMP, and a second OpenMP beside torch's would end the process on macOS.
POOL = MACOS or os.environ.get("POOL")
OPENMP = [] if POOL else ["-fopenmp"]
V4 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
V3 = ["-mavx2", "-mfma", "-mf16c"]
# The same names as FOR_EACH_ISA in csrc/ops.h.
ISAS = {"portable": [f"-DWIDE={WIDE}", "-O1" if SANITIZE else "-O2", "-Wno-psabi"] if WIDE else []}
if X86:
    ISAS |= {"avx2": V3, "avx512": V3 + V4, "avx512_bf16": V3 + V4 + ["-mavx512bf16"]}
    ISAS |= {"amx": [*ISAS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]}
# All other .c files are kernels.
THREADS = "csrc/cpu/parallel.c"
ONCE = [*sorted(glob.glob("csrc/*.c")), *sorted(glob.glob("csrc/python/*.c")), THREADS]
KERNELS = sorted(set(glob.glob("csrc/cpu/**/*.c", recursive=True)) - set(ONCE))
HEADERS = glob.glob("csrc/**/*.h", recursive=True)
KERNEL_HEADERS = ["csrc/longlora.h", "csrc/ops.h", *glob.glob("csrc/cpu/**/*.h", recursive=True)]
CUDA_HEADERS = [
    *glob.glob("csrc/*.h"),
    *glob.glob("cuda/**/*.cuh", recursive=True),
    *glob.glob("cuda/*.h"),
    *glob.glob("tests/emulation/*.h"),
]

WARN = ["-Wall", "-Wextra", "-fvisibility=hidden"]
OPTIMISE = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O1", "-g1"] if SANITIZE else ["-O3", "-g0", "-DNDEBUG"]
SANITIZERS = (
    [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    if SANITIZE
    else []
)
FLAGS = ["-std=c11", *WARN, *OPTIMISE, *SANITIZERS]
LINK = [*OPENMP, "-lm", *SANITIZERS]
MATH = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# gcc for aarch64 would load the next operands of a tile so early that sums spill. On x86 it does not.
if MACHINE == "aarch64" and not re.search(
    "clang|zig", os.environ.get("CC") or sysconfig.get_config_var("CC") or ""
):
    MATH.append("-fno-schedule-insns")
# Without the last three flags the CUDA sources would need libstdc++ at run time.
CXX_FLAGS = ["-std=c++17", "-fPIC", *WARN, "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]


OLDEST_CUDA = 11, 8  # also in cuda/common.cuh
# Folders of cuda/ whose files are compiled for one architecture only. Other builds leave them out.
ONE_ARCH = {"hopper": "90a"}
# The CUDA runtime is linked into the extension and hidden, apart from any other copy in the process.
CUDA_LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def find_nvcc():
    """The nvcc command, or None if there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [
        os.environ.get("NVCC"),
        *(os.path.join(home, "bin", "nvcc") for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def cuda_libraries(nvcc):
    """The folder of nvcc's libraries, as nvcc itself reports it."""
    says = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.*)", says)
    folders = re.findall(r'"-L([^"]*)"', says) + [
        os.path.join(top[1].strip(), lib) for lib in ("lib64", "lib") if top
    ]
    return [folder for folder in folders if os.path.exists(os.path.join(folder, "libcudart_static.a"))][:1]


def gpus_here():
    """The compute capabilities of this machine's GPUs, as [80, 90, ...]; none without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)})


def serving(gpus, known):
    """Those of the known architectures that serve these GPUs: for each the latest one that is not later."""

    def number(arch):
        return int(arch.rstrip("a"))

    older = [[arch for arch in known if number(arch) <= gpu] for gpu in gpus]
    return sorted({archs[-1] for archs in older if archs}, key=number)


class NoCuda(Exception):
    """Why the CUDA kernels are not built."""


class Cuda:
    """The CUDA kernels, compiled by nvcc. NoCuda if that is not possible here."""

    def __init__(self):
        self.nvcc = find_nvcc()
        if not self.nvcc:
            raise NoCuda("there was no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
        version = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", version)
        if not release:
            raise NoCuda(f"{self.nvcc} --version did not tell its release")
        self.release = int(release[1]), int(release[2])
        if self.release < OLDEST_CUDA:
            raise NoCuda(f"{self.nvcc} comes with CUDA {release[1]}.{release[2]}, which is older than 11.8")
        self.archs, self.why = self.choose_archs()
        self.one_arch = {
            source: arch
            for folder, arch in ONE_ARCH.items()
            if arch in self.archs
            for source in glob.glob(f"cuda/{folder}/*.cu")
        }
        # The largest first, because they take longest.
        self.sources = sorted([*glob.glob("cuda/*.cu"), *self.one_arch], key=os.path.getsize, reverse=True)
        self.link, self.library_dirs = CUDA_LINK, cuda_libraries(self.nvcc)
        self.try_compiler()

    def choose_archs(self):
        """The architectures, and why these."""
        named = re.findall(r"\w+", os.environ.get("LONGLORA_CUDA_ARCH") or "")
        if named:
            return named, "as LONGLORA_CUDA_ARCH says"
        old = self.release < (12, 8)
        known = ["80", "90"] if old else ["80", "90a", "100", "120"]
        here = serving(gpus_here(), known)
        why = "for the GPUs of this machine" if here else "as nvidia-smi finds no GPU here that is supported"
        if old:
            version = ".".join(map(str, self.release))
            why += f" and the nvcc of CUDA {version} knows no GPU later than sm_90"
        return here or known, why

    def says(self):
        return (
            f"longlora: building CUDA kernels for sm {' '.join(self.archs)}, {self.why}. "
            "LONGLORA_CUDA_ARCH chooses others; with LONGLORA_CUDA=0 there are none"
        )

    def try_compiler(self):
        """NoCuda if nvcc cannot compile an empty file, for example with a host compiler that is too new."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "empty.cu")
            open(source, "w").close()
            command = [self.nvcc, *CXX_FLAGS[:1], "-c", source, "-o", source + ".o"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr + done.stdout).splitlines()
            why = next((line for line in lines if "error" in line), " ".join(lines[:1]))
            raise NoCuda(f"{self.nvcc} compiled nothing: {why.strip()[:200]}")

    def command(self, source):
        """The command that compiles a source, without its input and output."""
        folders = {os.path.basename(os.path.dirname(source)) for source in self.one_arch}
        archs = [self.one_arch[source]] if source in self.one_arch else self.archs
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
        if source not in self.one_arch:
            codes.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        return [
            self.nvcc,
            *CXX_FLAGS[:1],
            "-O3",
            "-DNDEBUG",
            f"-DLONGLORA_CUDA_ARCHS={' '.join(self.archs)}",
            *[f"-DLONGLORA_{folder.upper()}" for folder in sorted(folders)],
            "-Xcompiler",
            ",".join(CXX_FLAGS[1:]),
            *[word for code in codes for word in ("-gencode", code)],
        ]


class Emulation:
    """The CUDA kernels as C++."""

    def __init__(self):
        sources = sorted(glob.glob("cuda/*.cu"), key=os.path.getsize, reverse=True)
        self.sources = sources + glob.glob("tests/emulation/*.cpp")
        self.link, self.library_dirs = ["-lstdc++"], []

    def command(self, source):
        return [
            os.environ.get("CXX") or "c++",
            *CXX_FLAGS,
            "-O3",
            *["-march=native", "-ffp-contract=off"] * X86,
            *SANITIZERS,
            "-Wno-unknown-pragmas",
            "-fsanitize=alignment,bounds,shift",
            "-DLONGLORA_EMULATION",
            "-Itests/emulation",
            "-Icuda",
            "-x",
            "c++",
        ]


def choose_cuda():
    """How the CUDA kernels are built, or None; and why not. One line says what is not the usual build."""
    wanted = os.environ.get("LONGLORA_CUDA") or "auto"
    if wanted not in ("auto", "0", "1", "emulation"):
        raise SystemExit(f"LONGLORA_CUDA should be auto, 0, 1 or emulation, got {wanted}")
    if wanted == "emulation":
        return Emulation(), ""
    if wanted == "0":
        return None, "it was built with LONGLORA_CUDA=0"
    if MACOS and wanted == "auto":
        return None, "there is no CUDA on macOS"
    try:
        cuda = Cuda()
    except NoCuda as why:
        if wanted == "1":
            raise SystemExit(f"LONGLORA_CUDA=1, but {why}") from None
        print(f"longlora: {why}: building for the CPU alone", file=sys.stderr)
        return None, str(why)
    print(cuda.says(), file=sys.stderr)
    return cuda, ""


def newer(made, *inputs):
    return os.path.exists(made) and os.path.getmtime(made) > max(map(os.path.getmtime, ["setup.py", *inputs]))


def find_openmp(compiler):
    """SystemExit if the compiler has no OpenMP."""
    probe = [*compiler, "-fopenmp", "-fsyntax-only", "-x", "c", "-"]
    done = subprocess.run(probe, input="#include <omp.h>\n", text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(
            f"{compiler[0]} -fopenmp does not find OpenMP, which is needed: gcc includes it, for clang "
            f"install libomp-dev (Debian)\n{done.stderr}"
        )


class BuildExt(build_ext):
    """Compiles each CPU kernel once per instruction set, with -DISA, and each .cu once for all its GPUs.

    Objects are compiled in parallel. An object is kept if it is newer than its source and all headers and was
    made with the same flags.
    """

    def build_extension(self, ext):
        if OPENMP:
            find_openmp(self.compiler.compiler_so)
        cuda, why = choose_cuda()
        macros = [("LONGLORA_CUDA", "1") if cuda else ("LONGLORA_WITHOUT_CUDA", json.dumps(why))]
        jobs = [(source, None, []) for source in (cuda.sources if cuda else [])]
        macros += [("LONGLORA_POOL", "1")] * bool(POOL)
        jobs += [(source, macros, OPENMP if source == THREADS else []) for source in ext.sources]
        jobs += [(source, [("ISA", isa)], MATH + flags) for isa, flags in ISAS.items() for source in KERNELS]

        def folder(how):
            return os.path.join(self.build_temp, f"{zlib.crc32(repr(how).encode()):08x}")

        def build_cuda(source):
            command = cuda.command(source)
            made = os.path.join(folder(command), source + ".o")
            if not newer(made, source, *CUDA_HEADERS):
                os.makedirs(os.path.dirname(made), exist_ok=True)
                self.spawn([*command, "-c", source, "-o", made])
            return made

        def build(job):
            source, macros, flags = job
            if macros is None:
                return build_cuda(source)
            macros, flags = [*ext.define_macros, *macros], [*ext.extra_compile_args, *flags]
            output_dir = folder((macros, flags, self.compiler.compiler_so))
            (made,) = self.compiler.object_filenames([source], output_dir=output_dir)
            if not newer(made, source, *(KERNEL_HEADERS if source in KERNELS else HEADERS)):
                self.compiler.compile(
                    [source],
                    output_dir=output_dir,
                    macros=macros,
                    include_dirs=ext.include_dirs,
                    extra_postargs=flags,
                )
            return made

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            ext.extra_objects = list(pool.map(build, jobs))
        if cuda:
            ext.extra_link_args = [*LINK, *cuda.link]
            ext.library_dirs = cuda.library_dirs
        self.force = self.compiler.force = True  # link again: the switches may have changed
        # What is compiled is only linked here. A command may build more than once, so the sources come back.
        sources, ext.sources = ext.sources, []
        super().build_extension(ext)
        ext.sources = sources


free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
extension = Extension(
    "longlora._C",
    sources=ONCE,
    include_dirs=["csrc", os.environ.get("NUMPY_INCLUDE") or numpy.get_include()],
    define_macros=[("LONGLORA_X86", "1")] * X86 + [("Py_LIMITED_API", "0x030b0000")] * (not free_threaded),
    extra_compile_args=FLAGS,
    extra_link_args=LINK,
    py_limited_api=not free_threaded,
)
setup(
    license="Apache-2.0",
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
