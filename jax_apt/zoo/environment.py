"""What a measured figure depends on besides its settings: processor, versions, flags and code."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

import jax_apt
from jax_apt import xla_ops

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "sacrebleu", "num2words")


@functools.cache
def describe() -> dict[str, Any]:
    """JSON-serializable description of the machine and the software."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "isa": xla_ops.isa() if xla_ops.is_available() else f"none: {xla_ops.unavailable_reason()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "jax_apt": {"version": jax_apt.__version__, "digest": _code_digest()},
    }


def _code_digest() -> str:
    """Of the package's Python files and libraries: a run does not outlive the code that made it."""
    folder = pathlib.Path(jax_apt.__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    """Name, family and model: many virtual machines share one name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
