"""Measured instruction ceilings: `ceilings.c`, compiled and run on the machine at hand."""

import os
import pathlib
import shutil
import subprocess
import tempfile

_SOURCE = pathlib.Path(__file__).with_name("ceilings.c")

# What bounds an exact product on an instruction set of `jax_apt.xla_ops`: kernel of each operand width.
_BY_ISA = {
    "avx2": {8: "avx2 u8s8 vpmaddubsw", 16: "avx2 s16 vpmaddwd"},
    "avxvnni": {8: "avxvnni u8s8 vpdpbusd", 16: "avx2 s16 vpmaddwd"},
    "avx512vnni": {8: "avx512vnni u8s8 vpdpbusd", 16: "avx512vnni s16 vpdpwssd"},
    "amx": {8: "amx u8s8 tdpbusd", 16: "avx512vnni s16 vpdpwssd"},
}


def measure(threads: int) -> dict[str, float]:
    """Gop/s of each kernel that this CPU can run; empty where there is no C compiler or no kernel."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = str(pathlib.Path(folder) / "ceilings")
        subprocess.run([compiler, "-O2", "-pthread", str(_SOURCE), "-o", program], check=True)
        done = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    lines = (line.rpartition(" ") for line in done.stdout.splitlines())
    return {name: float(gops) for name, _, gops in lines}


def bounds(measured: dict[str, float], isa: str, widths: tuple[int, int]) -> dict[str, float | str] | None:
    """The ceiling of a product of operands of these widths on an instruction set, by its best decomposition.

    A product of wider operands takes several passes: by limbs of 8 bits, or of 16 where that is faster.
    """
    choices = []
    for limb, kernel in _BY_ISA.get(isa.partition("_")[0], {}).items():
        passes = -(-widths[0] // limb) * -(-widths[1] // limb)
        if kernel in measured:
            choices.append((measured[kernel] / passes, kernel))
    if not choices:
        return None
    gops, kernel = max(choices)
    return {"gops": gops, "kernel": kernel}
