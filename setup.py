"""Builds longlora._C: one abi3 extension, the CPU kernels compiled once per instruction set.

Switches (environment): DEBUG=1 (-O0 -g, assertions), SANITIZE=address,undefined (instrumented build), CC.
"""
import glob
import os
import platform
import sysconfig

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG, SANITIZE = os.environ.get("DEBUG"), os.environ.get("SANITIZE")
X86 = platform.machine().lower() in ("x86_64", "amd64")
V4 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
V3 = ["-mavx2", "-mfma", "-mf16c"]
# The same names as FOR_EACH_ISA in csrc/ops.h.
ISAS = {"portable": [], "avx2": V3, "avx512": V3 + V4, "avx512_bf16": V3 + V4 + ["-mavx512bf16"]} if X86 else {"portable": []}
KERNELS = ["adamw", "cast", "embedding", "gemm", "linear_cross_entropy", "lora_linear", "matmul", "rms_norm", "rope",
           "s2_attention", "swiglu"]

WARN = ["-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden", "-fopenmp"]
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3", "-g1"] if SANITIZE else ["-O3", "-DNDEBUG"]
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"] if SANITIZE else []
FLAGS = WARN + OPTIMISE + SANITIZERS


class BuildExt(build_ext):
    """Each kernel file becomes one object per instruction set, named apart by -DISA."""

    def build_extension(self, ext):
        macros = [*ext.define_macros]
        sources = [f"csrc/cpu/{name}.c" for name in KERNELS if os.path.exists(f"csrc/cpu/{name}.c")]
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                sources, output_dir=os.path.join(self.build_temp, isa), macros=[*macros, ("ISA", isa)],
                include_dirs=["csrc"], extra_postargs=[*FLAGS, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *flags],
                depends=ext.depends)
        super().build_extension(ext)


free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
extension = Extension(
    "longlora._C",
    sources=["csrc/bind.c", "csrc/ops.c", "csrc/cpu/parallel.c"],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("LONGLORA_X86", "1")] * X86 + [("Py_LIMITED_API", "0x030b0000")] * (not free_threaded),
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/cpu/*.[ch]")),
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp", "-lm", *SANITIZERS],
    py_limited_api=not free_threaded,
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt},
      options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}})
