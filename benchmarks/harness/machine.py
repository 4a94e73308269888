"""The machine and the software that a figure was measured with, and the key its results are kept under."""

import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

PACKAGES = ("jax-apt", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "aqtp", "qwix")
_FEATURES = (  # widest first: what a virtual machine shows decides which kernels can run
    "amx_int8",
    "avx512_vnni",
    "avx_vnni",
    "avx512f",
    "avx2",
    "asimddp",
)
_FLAGS = (*_FEATURES, "fma", "avx512bw", "avx512vl", "amx_tile", "avx512_bf16", "i8mm", "sve")


def describe(threads: int) -> dict[str, Any]:
    """JSON-serializable description of processor, instruction sets, threads and versions."""
    fields = _cpuinfo()
    flags = _flags(fields)
    return {
        "cpu": fields.get("model name", platform.machine()),
        "vendor": fields.get("vendor_id", fields.get("CPU implementer", "unknown")),
        "family": fields.get("cpu family", fields.get("CPU architecture", "?")),
        "model": fields.get("model", fields.get("CPU part", "?")),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "l2": fields.get("cache size", "?"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        **_isa(),
    }


def cpu_key(is_avx2: bool = False) -> str:
    """Folder of this processor's results: vendor, family, model and the widest feature that is used."""
    fields = _cpuinfo()
    flags = {"avx2"} if is_avx2 else _flags(fields)
    widest = next((feature for feature in _FEATURES if feature in flags), platform.machine())
    vendor = fields.get("vendor_id", fields.get("CPU implementer", platform.machine()))
    family, model = fields.get("cpu family", "x"), fields.get("model", fields.get("CPU part", "x"))
    return re.sub(r"[^a-z0-9]+", "-", f"{vendor} {family} {model} {widest}".lower()).strip("-")


def limit_threads(threads: int) -> None:
    """Binds this process to `threads` cores, which XLA's and PyTorch's pools follow."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads > len(allowed):
            raise ValueError(f"threads must be at most the {len(allowed)} cores available; got {threads}")
        os.sched_setaffinity(0, set(allowed[:threads]))


def _isa() -> dict[str, Any]:
    from jax_apt import xla_ops

    if not xla_ops.is_available():
        return {"isa": "none", "isa_reason": xla_ops.unavailable_reason(), "available_isas": []}
    return {"isa": xla_ops.isa(), "available_isas": list(xla_ops.available_isas())}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; empty where the system has no such file."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _flags(fields: dict[str, str]) -> set[str]:
    return set(fields.get("flags", fields.get("Features", "")).split())
