"""Rows of figures: ratios, geometric means, JSON files kept per processor, and markdown tables."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from harness.machine import cpu_key

FOLDER = pathlib.Path(__file__).parents[1] / "results"

XLA = ("jax/float32", "jax_ynn_off/float32")  # XLA's float32 under both settings of its flag
TORCH = "torch/float32"


def best_xla(ms: dict[str, float]) -> float | None:
    return min((ms[name] for name in XLA if name in ms), default=None)


def ratios(ms: dict[str, float]) -> dict[str, dict[str, float]]:
    """How many times as fast as XLA's better setting and as PyTorch each contender is; above 1 is faster."""
    references = {"xla": best_xla(ms), "torch": ms.get(TORCH)}
    return {
        name: {against: ref / own for against, ref in references.items() if ref is not None}
        for name, own in ms.items()
    }


def geometric_mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def group_means(rows: list[dict]) -> list[dict[str, Any]]:
    """Geometric mean and least ratio of each contender in each (group, pass)."""
    collected: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        for name, by in row["ratios"].items():
            for against, ratio in by.items():
                collected.setdefault((row["group"], row["pass"], name, against), []).append(ratio)
    return [
        {
            "group": group,
            "pass": one,
            "contender": name,
            "against": against,
            "geometric_mean": geometric_mean(values),
            "least": min(values),
            "rows": len(values),
        }
        for (group, one, name, against), values in collected.items()
    ]


def save(benchmark: str, document: dict, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes results/<cpu>/<benchmark>.json; a file of another processor lies in another folder."""
    path = (folder or FOLDER / cpu_key()) / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def merged(benchmark: str, document: dict, folder: pathlib.Path | None = None) -> dict:
    """The document with the rows of the file that are there already and that it lacks; means are of all rows.

    A row that another run measured keeps its ratios, which are of that run; "machine", "settings" and
    "ceilings" are those of the last one.
    """
    path = (folder or FOLDER / cpu_key()) / f"{benchmark}.json"
    if not path.exists():
        return document
    before, new = json.loads(path.read_text()), {(row["name"], row["pass"]) for row in document["rows"]}
    rows = [row for row in before["rows"] if (row["name"], row["pass"]) not in new] + document["rows"]
    return document | {
        "seconds": before["seconds"] + document["seconds"],
        "unavailable": before["unavailable"] | document["unavailable"],
        "rows": rows,
        "means": group_means(rows),
    }


def load_all(folder: pathlib.Path = FOLDER) -> dict[str, dict[str, dict]]:
    """Documents by processor key, then by benchmark."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    return found


def table(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table, padded so that it reads as text too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in (header, rule, *lines)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
