"""Claim: on an accelerator the portable path uses the integer units and gives the CPU's numbers, bit for bit.

    python benchmarks/accelerator_equals_cpu.py                on a machine with a GPU or TPU and its JAX
    python benchmarks/accelerator_equals_cpu.py --quick        tiny, also without one: to see that it runs

Products of every form and width run on the CPU and on the accelerator, both by backend `xla`: result, both
gradients and the chosen formats must be equal. Each compiled program is searched for products of int8
operands with int32 results. Then training steps are timed beside float32, tf32 and bfloat16. Fails if a
number differs or, on an accelerator, if a program has no integer product. It has never run on an accelerator.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import jax_steps, networks, results
from harness.machine import describe
from harness.timing import Pace, interleave, mean_seconds
from jax import lax

import jax_apt as apt

FOLDER = pathlib.Path(__file__).parent / "results"
WIDTHS = ((8, 8, 8), (8, 8, 16), (8, 8, 24), (16, 16, 16))  # of x, w and dy
STEPS = ("ResNet-18 CIFAR, batch 64", "Transformer d512, 8 x 128", "LSTM 512, 32 x 64", "MLP 2048, batch 256")


# Products


class Product(NamedTuple):
    """A product of a weight and data, or of two activations."""

    name: str
    fn: Callable  # fn(w, x)
    w: tuple[int, ...]
    x: tuple[int, ...]


def _convolution(stride: int, groups: int = 1) -> Callable:
    def fn(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return fn


def products(quick: bool) -> list[Product]:
    n, size = (8, 5) if quick else (256, 28)
    return [
        Product("matrix product", lambda w, x: x @ w, (n, n), (n, n)),
        Product("batched product", lambda w, x: jnp.einsum("bik,bkj->bij", x, w), (3, n, 8), (3, 8, n)),
        Product("convolution 3x3", _convolution(1), (3, 3, n, n), (2, size, size, n)),
        Product("convolution 3x3, stride 2", _convolution(2), (3, 3, n, n), (2, size, size, n)),
        Product("convolution 3x3, two groups", _convolution(1, 2), (3, 3, n // 2, n), (2, size, size, n)),
    ]


def run(product: Product, widths: tuple[int, int, int], device) -> tuple[dict[str, np.ndarray], str]:
    """One training step of a product on a device.

    Returns:
      (result, gradients and formats, by name; text of the compiled program)
    """
    acts, weights, grads = widths
    rule = apt.Rule(acts=acts, weights=weights, grads=apt.Adaptive(*range(8, grads + 1, 8)))
    q = apt.apt_quantize(product.fn, [rule], backend="xla")
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in (product.w, product.x))
    shape = jax.eval_shape(product.fn, w, x).shape
    dy = rng.standard_normal(shape, np.float32)
    dy.flat[0] = 8 * dy.size  # few bits would leave nothing of the others: more are chosen

    def step(w, x, dy, state):
        y, pullback = jax.vjp(lambda w, x, t: q.apply(w, q.with_taps(state, t), x), w, x, q.taps(state))
        dw, dx, taps = pullback(dy)
        after = q.update(state, taps).precision
        return {"y": y, "dw": dw, "dx": dx, "bits": after.bits, "exponent": after.exponent}

    arguments = jax.device_put((w, x, jnp.asarray(dy), q.init(w, x)), device)
    compiled = jax.jit(step).lower(*arguments).compile()
    return jax.tree.map(np.asarray, compiled(*arguments)), compiled.as_text()


def differences(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not equal bit for bit, with the number of elements that differ."""
    counts = {name: int(np.sum(got[name] != expected[name])) for name in expected}
    return [f"{name} ({count} of {expected[name].size})" for name, count in counts.items() if count]


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[.*? ([\w\-]+)\(([^)]*)\)")
_MULTIPLIES = re.compile(r"gemm|matmul|dot|conv", re.IGNORECASE)


def integer_products(text: str) -> list[str]:
    """Instructions of a compiled program that multiply 8-bit operands to int32: what integer units do.

    Args:
      text: optimized HLO. A `dot` or `convolution`, wherever it stands, or a library's custom call.
    """
    dtypes: dict[str, str] = {}
    calls: list[tuple[str, str, list[str]]] = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, dtype, operation, operands = match.groups()
        dtypes[name] = dtype
        target = re.search(r'custom_call_target="([^"]*)"', line)
        called = target[1] if target else operation
        if operation in ("dot", "convolution") or (target and _MULTIPLIES.search(called)):
            calls.append((name, called, re.findall(r"%([\w.\-]+)", operands)[:2]))
    return [
        called
        for name, called, operands in calls
        if dtypes[name] == "s32" and [dtypes.get(o) in ("s8", "u8") for o in operands] == [True, True]
    ]


def compare(device, cpu, quick: bool) -> list[dict[str, Any]]:
    """A row for every product and width: what differs, and the integer products of the compiled program."""
    rows = []
    for product in products(quick):
        for widths in WIDTHS[1:2] if quick else WIDTHS:
            (got, text), (expected, _) = (run(product, widths, where) for where in (device, cpu))
            name = f"{product.name}, {' x '.join(map(str, widths))} bits"
            rows.append(
                {
                    "name": name,
                    "differences": differences(got, expected),
                    "integer_products": integer_products(text),
                    "widths": got["bits"].tolist(),
                }
            )
    return rows


def misses(rows: list[dict[str, Any]], is_accelerator: bool) -> list[str]:
    """What contradicts the claim; nothing if it holds."""
    found = [
        f"{row['name']}: differs from the CPU in {', '.join(row['differences'])}"
        for row in rows
        if row["differences"]
    ]
    if is_accelerator:
        found += [f"{row['name']}: no integer product" for row in rows if not row["integer_products"]]
    return found


# Steps


CONTENDERS = {  # name -> (builder of `jax_steps`, precision of float32 products)
    "float32": ("float32", "highest"),
    "tf32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", None),
    "apt-8": ("apt-8", None),
    "apt-adaptive": ("apt-adaptive", None),
}


def _build(case: dict, name: str) -> Callable[[], Any]:
    contender, precision = CONTENDERS[name]
    with jax.default_matmul_precision(precision or "default"):
        calls, _ = jax_steps.build(case, contender)
    return calls["step"]


def times(case: dict, rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of a step of each contender, interleaved."""
    loops = {name: _build(case, name) for name in CONTENDERS}
    median = interleave(
        lambda name, count: mean_seconds(loops[name], count), list(loops), Pace(rounds, seconds)
    )
    return {name: 1000 * value for name, value in median.items()}


# Command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a CPU will do; saves nothing")
    parser.add_argument(
        "--steps", nargs="*", default=STEPS, help="training steps to time; none: only compare"
    )
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians are quoted")
    args = parser.parse_args(argv)
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    is_accelerator = device.platform != "cpu"
    if not is_accelerator and not args.quick:
        print("JAX sees no accelerator here: nothing to compare; --quick tries the script", file=sys.stderr)
        return 2
    rows = compare(device, cpu, args.quick)
    print(_products_table(rows))
    cases = [case for case in networks.steps(args.quick) if case["name"] in args.steps]
    timed = {
        case["name"]: times(case, 2 if args.quick else args.rounds, 0.01 if args.quick else 0.3)
        for case in cases
    }
    if timed:
        print(_steps_table(timed))
    found = misses(rows, is_accelerator)
    print("\n".join(found) or f"{len(rows)} products on {device.device_kind} equal the CPU's")
    if not args.quick:
        _save(device, rows, timed)
    return 1 if found else 0


def _save(device, rows, timed) -> None:
    key = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    document = {
        "device": device.device_kind,
        "machine": describe(threads=0),
        "products": rows,
        "steps_ms": timed,
    }
    print(results.save(pathlib.Path(__file__).stem, document, FOLDER / key), file=sys.stderr)


def _products_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["name"], ", ".join(row["differences"]) or "none", str(len(row["integer_products"]))]
        for row in rows
    ]
    return results.table(["product", "differences", "integer products"], lines)


def _steps_table(timed: dict[str, dict[str, float]]) -> str:
    lines = [[name, *(f"{ms[c]:.2f}" for c in CONTENDERS)] for name, ms in timed.items()]
    return results.table(["step, ms", *CONTENDERS], lines)


if __name__ == "__main__":
    sys.exit(main())
