"""The kernels for 64-bit Arm, compiled across, under an emulator: equal to int64 loops, bit for bit."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

FUZZ = pathlib.Path(__file__).parent / "kernels" / "fuzz.sh"
TOOLS = ("bash", "cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")


def test_arm_kernels_equal_int64_under_emulation(tmp_path):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_APT_ISA"}
    environment |= {"FUZZ_BUILD": str(tmp_path), "PYTHON": sys.executable}
    run = subprocess.run(
        [FUZZ, "arm", "60", "2"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [
        f"{isas}: 2 callers of 60 cases, auto takes {isas.split(',')[0]}, all equal"
        for isas in ("neon_i8mm,neon,scalar", "neon,scalar", "scalar")
    ]
    assert run.stdout.splitlines() == lines
