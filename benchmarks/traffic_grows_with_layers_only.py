"""Claim: the traffic that precision adds to a step depends on the number of layers, not on sizes or devices.

    python benchmarks/traffic_grows_with_layers_only.py                          measures and prints (minutes)
    python benchmarks/traffic_grows_with_layers_only.py --write docs/devices.md  and renews the page's tables

Training steps of small perceptrons are compiled for 1, 2, 4 and 8 forced CPU devices, in float32 and in
adaptive fixed point, and the collectives in the compiled programs are added up. Nothing is timed. The second
table computes, from what was found, the traffic and state of 8 to 4096 devices.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

DEVICES = (1, 2, 4, 8)
BATCH = 64
CASES = [  # layout, layers, width
    ("data", 2, 64),
    ("data", 4, 64),
    ("data", 2, 256),
    ("tensor", 2, 64),
    ("tensor", 4, 64),
]
NETWORKS = [  # name, layers, millions of parameters
    ("ResNet-50", 54, 25.6),
    ("Transformer, 1 billion", 150, 1000.0),
    ("Transformer, 70 billion", 561, 70000.0),
]
BYTES = {"f32": 4, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "s16": 2, "pred": 1, "bf16": 2, "f16": 2}
_COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


class Traffic(NamedTuple):
    """What a compiled step sends: bytes of results of collectives on one device, and their number."""

    bytes: int
    calls: int

    def __add__(self, other):
        return Traffic(self.bytes + other.bytes, self.calls + other.calls)

    def __sub__(self, other):
        return Traffic(self.bytes - other.bytes, self.calls - other.calls)


# What a compiled program sends


def traffic(text: str, choose) -> Traffic:
    """Traffic of a compiled program; of the branches of a condition `choose` (min or max) takes one."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)

    def of(name: str) -> Traffic:
        total = Traffic(0, 0)
        for line in bodies[name]:
            total += _own(line)
            branches = _names(line, r"branch_computations=\{([^}]*)\}") or _names(
                line, r"true_computation=(\S+), false_computation=([^\s,]+)"
            )
            if branches:
                total += choose(of(branch) for branch in branches)
            elif " call(" in line:
                total += sum(map(of, _names(line, r"to_apply=([^\s,]+)")), Traffic(0, 0))
        return total

    return of(entry)


def _own(line: str) -> Traffic:
    match = re.search(r" = (.*?) " + _COLLECTIVE, line)
    if not match:
        return Traffic(0, 0)
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    sizes = [BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in arrays]
    return Traffic(sum(sizes), 1)


def _names(line: str, pattern: str) -> list[str]:
    match = re.search(pattern, line)
    return re.findall(r"[\w.\-]+", " ".join(match.groups())) if match else []


# Measuring, in a child process with a fixed number of devices


def measure(devices: int) -> None:
    """Prints a JSON list of rows, one for each case."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jax_apt as apt

    def network(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    rows = []
    for layout, layers, width in CASES:
        shape = (devices, 1) if layout == "data" else (1, devices)
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        specs = [(P(None, "model"), P("model", None))[i % 2] for i in range(layers)]

        def shaped(shape, spec, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

        params = [shaped((width, width), spec) for spec in specs]
        x = shaped((BATCH, width), P("data"))
        q = apt.apt_quantize(network)
        state = jax.tree.map(lambda v, put=shaped: put(v.shape, P()).update(dtype=v.dtype), q.init(params, x))
        step = apt.value_and_grad(lambda p, s, x, q=q: jnp.mean(q.apply(p, s, x) ** 2), q)
        plain = jax.value_and_grad(lambda p, x: jnp.mean(network(p, x) ** 2))
        out = jax.tree.map(lambda p: p.sharding, params)
        whole = NamedSharding(mesh, P())
        apt_text = (
            jax.jit(step, out_shardings=(whole, out, whole)).lower(params, state, x).compile().as_text()
        )
        text = jax.jit(plain, out_shardings=(whole, out)).lower(params, x).compile().as_text()
        rows.append(
            {
                "layout": layout,
                "devices": devices,
                "layers": layers,
                "width": width,
                "float32": traffic(text, max),
                "quiet": traffic(apt_text, min) - traffic(text, max),
                "measuring": traffic(apt_text, max) - traffic(text, max),
                "state": sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state)),
                "jax": jax.__version__,
                "backend": state.layout.layers[0].backend,
            }
        )
    print(json.dumps(rows))


def measured() -> list[dict]:
    rows = []
    for devices in DEVICES:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--child", str(devices)]
        done = subprocess.run(command, env=os.environ | flags, check=True, capture_output=True, text=True)
        rows += json.loads(done.stdout)
    for row in rows:
        row |= {name: Traffic(*row[name]) for name in ("float32", "quiet", "measuring")}
    return rows


# Tables


def check(rows: list[dict]) -> None:
    """Raises AssertionError if the claim does not hold of data parallelism."""
    for name in ("quiet", "measuring"):
        added = {r[name] for r in rows if r["layout"] == "data" and r["devices"] > 1 and r["layers"] == 2}
        assert len(added) == 1, f"traffic added to a {name} step depends on width or devices: {added}"
    alone = [r for r in rows if r["devices"] == 1]
    assert all(r["measuring"].bytes == r["float32"].bytes == 0 for r in alone), alone


def per_layer(rows: list[dict], name: str) -> Traffic:
    """What each layer more adds."""
    two, four = _two_and_four_layers(rows, name)
    return Traffic((four.bytes - two.bytes) // 2, (four.calls - two.calls) // 2)


def state_bytes(rows: list[dict], layers: int) -> int:
    """Bytes of the precision state of a network of so many layers."""
    two, four = _two_and_four_layers(rows, "state")
    return two + (layers - 2) * (four - two) // 2


def _two_and_four_layers(rows: list[dict], name: str) -> tuple:
    of = {r["layers"]: r[name] for r in rows if (r["layout"], r["devices"]) == ("data", 8)}
    return of[2], of[4]


def small_table(rows: list[dict]) -> str:
    lines = [
        "| split | devices | layers | width | float32 | added, quiet step | added, all tensors measured |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['layout']} | {r['devices']} | {r['layers']} | {r['width']} | {r['float32'].bytes:,} B | "
        f"{_cell(r['quiet'])} | {_cell(r['measuring'])} |"
        for r in rows
    ]
    return "\n".join(lines)


def _cell(t: Traffic) -> str:
    return f"{t.bytes:,} B in {t.calls}"


def large_table(rows: list[dict]) -> str:
    quiet, measuring = (per_layer(rows, name) for name in ("quiet", "measuring"))
    lines = [
        "| network | devices | gradients | added, quiet | added, all measured | state |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, layers, millions in NETWORKS:
        for devices in (8, 64, 512, 4096):
            ring = 2 * (devices - 1) / devices
            sizes = (millions * 4e6 * ring, quiet.bytes * layers * ring, measuring.bytes * layers * ring)
            cells = [_bytes(s) for s in (*sizes, state_bytes(rows, layers))]
            lines.append(f"| {name} ({layers} layers) | {devices} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def page(rows: list[dict]) -> str:
    quiet, measuring = (per_layer(rows, name) for name in ("quiet", "measuring"))
    return "\n".join(
        [
            f"Compiled programs of jax {rows[0]['jax']}, backend {rows[0]['backend']}, batch {BATCH}.",
            "",
            small_table(rows),
            "",
            f"A layer adds {_cell(quiet)} all-reduces to a quiet step, {_cell(measuring)} to one in which "
            "all its tensors are measured.",
            "",
            "Computed from that, for data parallelism with ring all-reduces (2 (N - 1) / N times the bytes), "
            "what each device sends, and the precision state that it holds:",
            "",
            large_table(rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=pathlib.Path, help="page whose tables to renew, between its markers")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args.child)
    rows = measured()
    check(rows)
    text = page(rows)
    print(text)
    if args.write:
        start, end = "<!-- traffic -->", "<!-- end of traffic -->"
        before, rest = args.write.read_text().split(start)
        args.write.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")
    return None


if __name__ == "__main__":
    main()
