"""Many devices: in one process, and in several that JAX's own runtime joins.

A child interpreter runs each program, because a process has as many CPU devices as it started with.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from jax_apt import xla_ops

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = ["xla"] + (["native"] if xla_ops.is_available() else [])


def run(*args, devices=1, check=True):
    """Output of a child Python with this many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.stdout if check else done


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_devices_choose_the_bits_of_one(backend):
    """Data parallel, tensor parallel and both, by shard_map and by sharded arrays; see the program."""
    output = run(pathlib.Path(__file__).with_name("program_on_devices.py"), backend, devices=4)
    assert output.split() == ["data", "tensor", "both", "untyped", "jit", "explicit", "ok"]


def test_processes_train_as_one_and_resume_after_a_kill(tmp_path):
    example = ROOT / "examples" / "processes.py"
    whole = run(example, "--processes", 1, "--steps", 6, "--folder", tmp_path / "one")
    several = run(example, "--processes", 2, "--steps", 6, "--folder", tmp_path / "two")
    assert whole.splitlines()[-1].split() == several.splitlines()[-1].split()
    killed = run(
        example, "--processes", 2, "--steps", 6, "--folder", tmp_path / "three", "--kill-at", 4, check=False
    )
    assert killed.returncode != 0 and "resumed" not in killed.stdout
    resumed = run(example, "--processes", 2, "--steps", 6, "--folder", tmp_path / "three")
    assert "resumed at step" in resumed
    assert resumed.splitlines()[-1] == several.splitlines()[-1]
