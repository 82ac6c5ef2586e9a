"""Builds longlora._C: one abi3 extension, the CPU kernels compiled once per instruction set.

Switches (environment): DEBUG=1 (-O0 -g, assertions), SANITIZE=address,undefined (instrumented build; tests/sanitize.sh runs
the op tests on one), CC, MAX_JOBS (compilers at a time, by default one per processor).
"""
import glob
import os
import platform
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG, SANITIZE = os.environ.get("DEBUG"), os.environ.get("SANITIZE")
X86 = platform.machine().lower() in ("x86_64", "amd64")
V4 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
V3 = ["-mavx2", "-mfma", "-mf16c"]
# The same names as FOR_EACH_ISA in csrc/ops.h.
ISAS = {"portable": [], "avx2": V3, "avx512": V3 + V4, "avx512_bf16": V3 + V4 + ["-mavx512bf16"]} if X86 else {"portable": []}
ONCE = ["csrc/bind.c", "csrc/ops.c", "csrc/cpu/parallel.c"]            # all other .c files are kernels
KERNELS = sorted(set(glob.glob("csrc/cpu/*.c")) - set(ONCE))
INPUTS = ["setup.py", *glob.glob("csrc/*.h"), *glob.glob("csrc/cpu/*.h")]

WARN = ["-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden", "-fopenmp"]
OPTIMISE = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O1", "-g1"] if SANITIZE else ["-O3", "-g0", "-DNDEBUG"]
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"] if SANITIZE else []
FLAGS = WARN + OPTIMISE + SANITIZERS
MATH = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class BuildExt(build_ext):
    """Each kernel file becomes one object per instruction set, named apart by -DISA. All objects are compiled side by side;
    one that is newer than its source and every header, made with the same flags, is kept."""

    def build_extension(self, ext):
        jobs = [(source, [], []) for source in ext.sources]
        jobs += [(source, [("ISA", isa)], MATH + flags) for isa, flags in ISAS.items() for source in KERNELS]

        def build(job):
            source, macros, flags = job
            macros, flags = [*ext.define_macros, *macros], [*ext.extra_compile_args, *flags]
            how = repr((macros, flags, self.compiler.compiler_so))
            folder = os.path.join(self.build_temp, f"{zlib.crc32(how.encode()):08x}")
            made, = self.compiler.object_filenames([source], output_dir=folder)
            if not os.path.exists(made) or os.path.getmtime(made) <= max(map(os.path.getmtime, [source, *INPUTS])):
                self.compiler.compile([source], output_dir=folder, macros=macros, include_dirs=ext.include_dirs,
                                      extra_postargs=flags)
            return made

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            ext.extra_objects = list(pool.map(build, jobs))
        ext.sources = []
        self.force = True                                              # link anew: the switches may have changed
        super().build_extension(ext)


free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
extension = Extension(
    "longlora._C",
    sources=ONCE,
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("LONGLORA_X86", "1")] * X86 + [("Py_LIMITED_API", "0x030b0000")] * (not free_threaded),
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp", "-lm", *SANITIZERS],
    py_limited_api=not free_threaded,
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt},
      options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}})
