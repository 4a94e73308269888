"""The comparison as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jax_apt.zoo.compare import gradient_interval, gradient_shares, overall
from jax_apt.zoo.precisions import LABELS

TENSORS = {"x": "X", "w": "W", "dy": "dY"}
WIDTH = 110  # characters, where standard output is no terminal


def print_tables(entries: list[dict[str, Any]], configs: dict[str, dict[str, Any]]) -> None:
    """Prints the summary, then each network's layers, to standard output.

    Args:
      entries: of the networks in the results.
      configs: by task, the method's constants, all of them.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(summary_table(entries))
    if entries[0]["others"]:
        console.print(others_table(entries))
    for line in summary_lines(entries):
        console.print(line, markup=False)
    for task, config in configs.items():
        prefix = f"{task}: " if len(configs) > 1 else ""
        console.print(prefix + describe_start(config))
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
        unit = _unit(entry["metric"])
        table.add_row(
            entry["name"],
            entry["task"],
            f"{entry['float32']:.2f} {unit}",
            f"{entry['apt']:.2f} {unit}",
            format_difference(entry["difference"]),
            *(f"{entry['step_ms'][p]['median']:.2f} ms" for p in ("float32", "apt")),
        )
    return table


def others_table(entries: list[dict[str, Any]]) -> Table:
    """One row per network and precision beside float32 and APT."""
    table = Table(title="difference from float32, in points, at other widths of the gradients")
    _add_columns(table, ("network", "gradients"), ("score", "difference [95 % CI]", "step"))
    for entry in entries:
        for name, other in entry["others"].items():
            step = f"{entry['step_ms'][name]['median']:.2f} ms"
            score = f"{other['mean']:.2f}"
            table.add_row(entry["name"], LABELS[name], score, format_difference(other["difference"]), step)
    return table


def summary_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Mean over the networks, where there are several."""
    if len(entries) < 2:
        return []
    return [
        f"{LABELS[name]} - float32, mean over {len(entries)} networks: {format_difference(difference)} points"
        for name, difference in overall(entries).items()
    ]


def markdown(entries: list[dict[str, Any]], command: str, environment: dict[str, Any]) -> str:
    """The results as a Markdown table, with the command and the machine that made them."""
    widths = sorted({w for entry in entries for w in gradient_shares(entry["bits"])}, key=int)
    others = [LABELS[name] for name in entries[0]["others"]]
    head = ["network", "task", "metric", "float32", "APT", "APT - float32 [95 % CI]"]
    head += [f"dY at int{width}" for width in widths] + ["update every", "step, float32 / APT"]
    head += [f"{label} - float32" for label in others]
    rows = [_markdown_row(entry, widths) for entry in entries]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    seeds = len(entries[0]["seeds"]["apt"])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    about = f"`{command}`; {seeds} paired seeds; {environment['cpu']}, {environment['cores']} cores"
    notes = ["", *(f"- {line}" for line in summary_lines(entries)), f"- {about}; {versions}"]
    return "\n".join([*lines, *notes]) + "\n"


def _markdown_row(entry: dict[str, Any], widths: list[str]) -> list[str]:
    shares, step = gradient_shares(entry["bits"]), entry["step_ms"]
    scores = [f"{entry[p]:.2f}" for p in ("float32", "apt")]
    cells = [entry["name"], entry["task"], entry["metric"], *scores, format_difference(entry["difference"])]
    cells += [_percent(shares.get(width)) for width in widths]
    cells += [f"{gradient_interval(entry['bits']):.1f} steps"]
    cells += [f"{step['float32']['median']:.1f} / {step['apt']['median']:.1f} ms"]
    return cells + [format_difference(other["difference"]) for other in entry["others"].values()]


def _unit(metric: str) -> str:
    return "%" if metric == "top-1" else metric


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
