"""No claim: what the time of a training step is made of, and how many bytes each kind of operation moves.

    python benchmarks/what_a_step_is_made_of.py [NETWORK ...]      such as mobilenet_v2; all if none is given

XLA's profiler times each instruction of the compiled step at the widths that APT chooses; bytes are those of
its operands and results, as the compiled program states them. GB/s near what a copy reaches say that memory
bounds an operation, not arithmetic; a slice counts all that it is cut from. 2 threads, means of 20 steps.
"""

import argparse
import collections
import gzip
import json
import math
import pathlib
import re
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from harness import jax_steps, machine, results
from harness.networks import steps

STEPS = 20
KINDS = ("forward", "dX", "dW")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "pred": 1, "s64": 8, "u64": 8, "bf16": 2, "f16": 2}


class Instruction(NamedTuple):
    """Of a compiled program."""

    what: str  # the row of the table that it belongs to
    bytes: int  # of operands and results


def instructions(text: str) -> dict[str, Instruction]:
    """By name; `text` is an HLO module."""
    sizes: dict[str, int] = {}
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
        if match is None:
            continue
        name, kind, operation, rest = match.groups()
        sizes[name] = sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", kind)))
        operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
        moved = sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
        if operation in ("while", "call", "conditional"):  # their bodies are timed themselves
            continue
        row = _row(name, rest)
        found[name] = Instruction(row, 0 if row == "barrier" else moved)
    return found


def _bytes(shape: tuple[str, str]) -> int:
    kind, dimensions = shape
    return BYTES.get(kind, 0) * math.prod(int(d) for d in dimensions.split(",") if d)


def _row(name: str, rest: str) -> str:
    target = re.search(r'custom_call_target="(\w+)"', rest)
    if target is None:
        is_reduction = "ynn" in name or "reduce" in name
        return "XLA: reductions" if is_reduction else "XLA: elementwise and other"
    if target[1] != "jax_apt_product":
        return target[1].removeprefix("jax_apt_")
    kind = int(_found(r"kind = (\d)", rest))
    numbers = _found(r"geometry = (?:array<i64: |dense<\[?)([\d, \-]*)", rest).split(",")
    is_grouped = int(numbers[-3]) > 1
    return f"product: {KINDS[kind]}{', depthwise or grouped' if is_grouped else ''}"


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"a custom call is printed in a form that is not known here: {text}")
    return match[1]


def measure(case: dict) -> dict[str, dict]:
    """Milliseconds, megabytes and number of instructions by row."""
    loop = jax_steps.build(case, "apt-adaptive")[0]["step"]
    known = instructions(loop.step.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                loop()
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    rows: dict[str, dict] = collections.defaultdict(lambda: {"ms": 0.0, "mb": 0.0, "count": 0.0})
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") != "X" or name not in known:
            continue
        row = rows[known[name].what]
        row["ms"] += event["dur"] / 1000 / STEPS
        row["mb"] += known[name].bytes / 1e6 / STEPS
        row["count"] += 1 / STEPS
    return dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))


def copy_bandwidth() -> float:
    """GB/s read and written by XLA's copy of 256 MB, the best of ten."""
    x = jnp.ones(64 << 20, jnp.float32)
    add = jax.jit(lambda x, y: x + y, donate_argnums=1)
    best, y = 0.0, add(x, x + 1)
    for _ in range(10):
        start = time.perf_counter()
        y = jax.block_until_ready(add(x, y))
        best = max(best, 3 * x.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def table(rows: dict[str, dict]) -> str:
    header = ["work", "ms", "share", "instructions", "MB moved", "GB/s"]
    total = sum(row["ms"] for row in rows.values())
    lines = [
        [
            what,
            f"{row['ms']:.1f}",
            f"{100 * row['ms'] / total:.0f} %",
            f"{row['count']:.0f}",
            f"{row['mb']:.0f}",
            f"{row['mb'] / row['ms']:.1f}" if row["ms"] > 0.05 else "-",
        ]
        for what, row in rows.items()
    ]
    return results.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names as in harness/networks.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; saves nothing")
    args = parser.parse_args()
    machine.limit_threads(2)
    bandwidth = copy_bandwidth()
    document = {"machine": machine.describe(2), "gb_per_s": bandwidth, "steps": {}}
    print(f"x + y on large arrays moves {bandwidth:.0f} GB/s")
    for case in steps(args.quick):
        if args.networks and case["network"] not in args.networks:
            continue
        document["steps"][case["name"]] = rows = measure(case)
        print(f"\n{case['name']}\n\n{table(rows)}", flush=True)
    if not args.quick:
        print(results.save("what_a_step_is_made_of", document, None))


if __name__ == "__main__":
    main()
