"""`longlora doctor` describes the build and the machine. Look here first if something is slow or missing."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

LIBRARIES = (
    "numpy",
    "tokenizers",
    "safetensors",
    "gguf",
    "jinja2",
    "pyyaml",
    "tqdm",
    "matplotlib",
    "ml_dtypes",
    "torch",
    "transformers",
    "peft",
)


def examine() -> dict[str, Any]:
    """Versions, instruction sets, threads, memory and CUDA, as a dict for JSON. Memory is in bytes."""
    from longlora import _C, __version__, job

    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "longlora": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "extension": _C.__file__,
        "processor": job.processor_name() or platform.processor() or platform.machine(),
        "instruction_set": _C.isa_names[_C.get_isa()],
        "instruction_sets": [name for name, there in zip(_C.isa_names, _C.isa_supported) if there],
        "forced_by": os.environ.get("LONGLORA_ISA"),
        "threads": _C.get_num_threads(),
        "processors": job.processors(),
        "memory_available": job.available_memory(),
        "cuda": _cuda(),
        "versions": versions,
    }


def _cuda() -> dict[str, Any]:
    from longlora import cuda

    driver, runtime = cuda.versions()
    found: dict[str, Any] = {
        "available": cuda.is_available(),
        "reason": cuda.reason(),
        "built_for": cuda.built_for(),
        "runtime": runtime,
        "driver": driver,
        "devices": [],
        "cublas": None,
        "cublas_missing": None,
    }
    for i in range(cuda.device_count()):
        why = cuda.refusal(i)
        free, total = (None, None) if why else cuda.memory_info(i)
        found["devices"].append(
            {**cuda.properties(i), "refused": why, "memory_free": free, "memory_total": total}
        )
    if found["built_for"]:
        try:
            found["cublas"] = dict(zip(("version", "file"), cuda.cublas()))
        except RuntimeError as error:
            found["cublas_missing"] = str(error)
    return found


def _cuda_text(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines about CUDA, as (name, value)."""
    if not found["built_for"]:
        return [("CUDA", f"not available: {found['reason']}")]
    built = f"CUDA {found['runtime']} for sm {found['built_for']}"
    driver = f"driver for CUDA {found['driver']}" if found["driver"] else "no driver"
    lines = [
        ("CUDA", "available" if found["available"] else f"not available: {found['reason']}"),
        ("CUDA build", f"{built}, {driver}"),
    ]
    for i, device in enumerate(found["devices"]):
        what = (
            f"{device['name']}, sm_{device['sm']}, {device['multiprocessors']} multiprocessors, "
            f"bus {device['bus']}"
        )
        state = (
            f"not used: {device['refused']}"
            if device["refused"]
            else f"{device['memory_free'] / 2**30:.1f} of {device['memory_total'] / 2**30:.1f} GiB free"
        )
        lines.append((f"cuda:{i}", f"{what}, {state}"))
    cublas = found["cublas"]
    return [
        *lines,
        (
            "cuBLASLt",
            f"{cublas['version']}, {cublas['file']}" if cublas else f"missing: {found['cublas_missing']}",
        ),
    ]


def text(found: dict[str, Any]) -> str:
    """The result of `examine` as a table."""
    memory = found["memory_available"]
    lines = [
        ("longlora", f"{found['longlora']}, Python {found['python']}, {found['platform']}"),
        ("extension", found["extension"]),
        ("processor", found["processor"]),
        (
            "instruction set",
            f"{found['instruction_set']} of {', '.join(found['instruction_sets'])}"
            + (f" (LONGLORA_ISA={found['forced_by']})" if found["forced_by"] else ""),
        ),
        ("threads", f"{found['threads']} of {found['processors']} processors"),
        ("memory", f"{memory / 2**30:.1f} GiB available"),
        *_cuda_text(found["cuda"]),
        (
            "libraries",
            ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        ),
        (
            "not installed",
            ", ".join(name for name, version in found["versions"].items() if not version) or "-",
        ),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in lines)
