"""Many devices in one process; a child interpreter, because it has as many CPU devices as it started with."""

import os
import pathlib
import subprocess
import sys

import pytest

from jax_apt import xla_ops

BACKENDS = ["xla"] + (["native"] if xla_ops.is_available() else [])


def run(*args, devices):
    """Output of a child Python with this many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WAYS = ["data", "both", "untyped", "jit data", "jit tensor", "jit both", "explicit"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_devices_choose_the_bits_of_one(backend):
    """Data parallel, tensor parallel and both, by shard_map and by sharded arrays; see the program."""
    output = run(pathlib.Path(__file__).with_name("program_on_devices.py"), backend, devices=4)
    more = ["convolutions", "vmap"] if backend == "native" else []
    assert output.splitlines() == [*WAYS, *more, "ok"]
