"""Models that were written without knowledge of this library run under `apt_quantize` as they are.

    python benchmarks/foreign_models_run_unmodified.py                # those that are installed
    python benchmarks/foreign_models_run_unmodified.py --only haiku   # these rows anew, others kept
    python benchmarks/foreign_models_run_unmodified.py --only ''       # only the page's table, from the file

Every tensor of every layer may take 8, 16 or 24 bits, and one compiled training step runs three times: from
8 bits with the widths that the data ask for, from 16 bits, and from 24. At 24 bits the gradient must be
float32's but for rounding, which shows that the replay is right; the first shows the price of few bits.
The step counts how often the model was traced and compiled. Rows go to results/<cpu>/ and docs/frameworks.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import traceback
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from harness import results
from harness.foreign_models import CASES, Case, Model
from harness.machine import cpu_key, describe

import jax_apt as apt

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "frameworks.md"
RESULTS = pathlib.Path(__file__).parent / "results"
BENCHMARK = pathlib.Path(__file__).stem
BEGIN, END = "<!-- foreign models: ", "<!-- end of foreign models -->"

WIDTHS = (8, 16, 24)
LARGEST_ERROR = 2e-3  # of a gradient at 24 bits: codes as fine as float32's mantissa, and other sums
ANY = apt.Adaptive(*WIDTHS)


def measure(case: Case) -> dict[str, Any]:
    """One row: layers, gradient errors, traces and compilations."""
    model = case.build()
    traces = 0

    def counted(parameters, *args):
        nonlocal traces
        traces += 1
        return model.fn(parameters, *args)

    q = apt.apt_quantize(counted, [apt.Rule("", acts=ANY, weights=ANY, grads=ANY)])
    state = q.init(model.parameters, *model.args)
    loss_of = _loss(model)

    @jax.jit
    def step(parameters, state, args):
        return apt.value_and_grad(lambda p, s: loss_of(q.apply(p, s, *args)), q)(parameters, state)

    expected = jax.jit(jax.grad(lambda p, args: loss_of(model.fn(p, *args))))(model.parameters, model.args)
    traces, errors, chosen = 0, {}, []
    for bits in WIDTHS:
        _, gradients, after = step(model.parameters, _starting_at(state, bits), model.args)
        errors[bits] = _error(gradients, expected)
        chosen.append(_widths(after))
    layout = state.layout
    return {
        "model": case.name,
        "package": case.package,
        "version": importlib.metadata.version(case.package),
        "jax": jax.__version__,
        "found": len(layout.layers) + len(layout.left_in_float),
        "quantized": len(layout.layers),
        "left": sorted({left.reason for left in layout.left_in_float}),
        "widths": chosen[0],
        "errors": {str(bits): error for bits, error in errors.items()},
        "width_changes": chosen[0] != chosen[-1],
        "traces": traces,
        "compilations": step._cache_size(),
    }


def misses(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row; nothing if the model runs as it should."""
    found = []
    if row["errors"]["24"]["relative"] > LARGEST_ERROR:
        found.append(f"gradient at 24 bits is off by {row['errors']['24']['relative']:.1e}")
    if row["traces"] != 1 or row["compilations"] != 1:
        found.append(f"{row['traces']} traces and {row['compilations']} compilations instead of one")
    if not row["quantized"] or not row["width_changes"]:
        found.append("no layer changed its width")
    return [f"{row['package']} {row['model']}: {what}" for what in found]


def _loss(model: Model):
    """Mean squared distance of the outputs from random targets: a gradient reaches all of them."""

    def loss(out):
        leaves = [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.inexact)]
        targets = [jax.random.normal(jax.random.key(i), y.shape, y.dtype) for i, y in enumerate(leaves)]
        return sum(jnp.mean((y - t) ** 2) for y, t in zip(leaves, targets, strict=True))

    return loss


def _starting_at(state: apt.AptState, bits: int) -> apt.AptState:
    precision = state.precision
    return replace(state, precision=precision._replace(bits=jnp.full_like(precision.bits, bits)))


def _widths(state: apt.AptState) -> dict[str, int]:
    """How many tensors are at each width."""
    bits = state.precision.bits.tolist()
    return {str(width): bits.count(width) for width in WIDTHS}


def _error(gradients, expected) -> dict[str, float]:
    """Of the whole gradient, as one vector: norm of the difference over float32's norm, and cosine."""
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients, expected))
    norms = jnp.linalg.norm(a), jnp.linalg.norm(b)
    return {
        "relative": float(jnp.linalg.norm(a - b) / norms[1]),
        "cosine": float(jnp.vdot(a, b) / (norms[0] * norms[1])),
    }


# Command


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="packages and models whose name holds one of these", nargs="*")
    options = parser.parse_args()
    failures = []
    for case in CASES:
        if options.only is None or any(
            text and text in f"{case.package} {case.name}" for text in options.only
        ):
            failures += _run(case)
    document = newest()
    PAGE.write_text(with_table(PAGE.read_text(), document))
    print(table(document["rows"]))
    print("\n".join(failures) or "every model runs as it should", file=sys.stderr)
    return 1 if failures else 0


def _run(case: Case) -> list[str]:
    """Measures and saves one row; what is wrong with it."""
    name = f"{case.package} {case.name}"
    try:
        row = measure(case)
    except ModuleNotFoundError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return []
    except Exception as error:
        traceback.print_exc()
        return [f"{name}: {type(error).__name__}"]
    print(table([row]).splitlines()[-1], file=sys.stderr)
    _save(row)
    return misses(row)


def _save(row: dict[str, Any]) -> None:
    """Puts the row into this processor's file, in the place of an older one of the same model."""
    path = results.FOLDER / cpu_key() / f"{BENCHMARK}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    by_model = {(r["package"], r["model"]): r for r in [*rows, row]}
    document = {
        "benchmark": BENCHMARK,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe(threads=os.cpu_count() or 1),
        "rows": [by_model[c.package, c.name] for c in CASES if (c.package, c.name) in by_model],
    }
    results.save(BENCHMARK, document)


def newest() -> dict[str, Any]:
    """The file that was measured last, on whatever processor."""
    documents = [json.loads(path.read_text()) for path in RESULTS.glob(f"*/{BENCHMARK}.json")]
    return max(documents, key=lambda document: document["when"])


# Page


def with_table(page: str, document: dict[str, Any]) -> str:
    """The page with its table between the two marks replaced."""
    pattern = re.compile(rf"({re.escape(BEGIN)}.*?-->\n).*?({re.escape(END)})", re.DOTALL)
    text, count = pattern.subn(lambda m: f"{m[1]}\n{quote(document)}\n\n{m[2]}", page)
    if count != 1:
        raise ValueError(f"the page has {count} tables between {BEGIN!r} and {END!r} instead of one")
    return text


def quote(document: dict[str, Any]) -> str:
    """The table and what it was made with."""
    versions = sorted({row["jax"] for row in document["rows"]})
    return f"{table(document['rows'])}\n\nMade with jax {', '.join(versions)} and backend `auto`."


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row for each model."""
    header = ("model", "package", "layers found", "quantized", "tensors at 8 / 16 / 24")
    header += ("error (cosine)", "error at 16", "error at 24", "traces")
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *map(_line, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: dict[str, Any]) -> list[str]:
    errors = row["errors"]
    return [
        row["model"],
        f"{row['package']} {row['version']}",
        str(row["found"]),
        str(row["quantized"]),
        " / ".join(str(count) for count in row["widths"].values()),
        f"{errors['8']['relative']:.1e} ({errors['8']['cosine']:.4f})",
        f"{errors['16']['relative']:.1e}",
        f"{errors['24']['relative']:.1e}",
        str(row["traces"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
