"""The comparison as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

TENSORS = {"x": "X", "w": "W", "dy": "dY"}
WIDTH = 110  # characters, where standard output is no terminal


def print_tables(entries: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Prints the summary, then each network's layers, to standard output.

    Args:
      entries: of the networks in the results.
      config: the method's constants, all of them.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(summary_table(entries))
    console.print(describe_start(config))
    for entry in entries:
        console.print(layer_table(entry))
        for left in entry["left_in_float"]:
            console.print(f"left in float: {left['name']} ({left['reason']})", markup=False)


def summary_table(entries: list[dict[str, Any]]) -> Table:
    """One row per network: scores, their paired difference and the step times."""
    seeds = len(entries[0]["seeds"]["apt"])
    table = Table(title=f"float32 and adaptive fixed point (APT): mean over {seeds} paired seeds")
    columns = ("float32", "APT", "difference [95 % CI]", "float32 step", "APT step")
    _add_columns(table, ("network", "task"), columns)
    for entry in entries:
        table.add_row(
            entry["name"],
            entry["task"],
            f"{entry['float32']:.2f} %",
            f"{entry['apt']:.2f} %",
            format_difference(entry["difference"]),
            *(f"{entry['step_ms'][p]['median']:.2f} ms" for p in ("float32", "apt")),
        )
    return table


def describe_start(config: dict[str, Any]) -> str:
    """How long every format is adjusted at every step; short trainings depend on it."""
    steps = config["initial_steps"]
    fraction = f"initial fraction {config['initial_fraction']:g}; published code: 0.1"
    return f"APT adjusts every format at each of the first {steps} steps ({fraction})"


def format_difference(difference: dict[str, Any]) -> str:
    """Mean and interval in percentage points."""
    if difference["low"] is None:
        return f"{difference['mean']:+.2f} [needs 2 seeds]"
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def layer_table(entry: dict[str, Any]) -> Table:
    """One row per tensor of each layer: how long it spent at each width."""
    layers = entry["bits"]
    shares = [t["share"] for layer in layers.values() for t in layer["tensors"].values()]
    widths = sorted({width for share in shares for width in share}, key=int)
    table = Table(title=f"{entry['name']}: share of the training steps at each width")
    columns = (*(f"int{width}" for width in widths), "update every")
    _add_columns(table, ("layer", "backend", "tensor"), columns)
    for name, layer in layers.items():
        for i, (tensor, values) in enumerate(layer["tensors"].items()):
            heading = (name, layer["backend"]) if i == 0 else ("", "")
            share = (_percent(values["share"].get(width)) for width in widths)
            interval = f"{values['mean_interval']:.1f} steps"
            table.add_row(*heading, TENSORS[tensor], *share, interval)
    return table


def _add_columns(table: Table, words: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
