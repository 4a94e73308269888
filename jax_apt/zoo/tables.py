"""The comparison as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jax_apt.zoo.compare import gradient_interval, gradient_shares, overall
from jax_apt.zoo.precisions import LABELS

TENSORS = {"x": "X", "w": "W", "dy": "dY"}
NEAREST = "apt-nearest"
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
    return list(_means(entries).values()) if len(entries) > 1 else []


def _means(entries: list[dict[str, Any]]) -> dict[str, str]:
    """By precision."""
    return {
        name: f"{LABELS[name]} - float32, mean over {each['networks']} networks: "
        f"{format_difference(each)} points"
        for name, each in overall(entries).items()
    }


def markdown(entries: list[dict[str, Any]]) -> str:
    """The results as Markdown: float32 and APT with what is behind each row, then the other precisions."""
    widths = sorted({w for entry in entries for w in gradient_shares(entry["bits"])}, key=int)
    head = ["network", "task (score)", "pairs", "float32 [spread]", "APT", "APT - float32 [95 % CI]", "least"]
    head += ["within"] + [f"dY at int{width}" for width in widths] + ["update every", "step, APT : float32"]
    table = _markdown_table(head, [_markdown_row(entry, widths) for entry in entries])
    return table + _others_markdown(entries) + "".join(f"- {line}\n" for line in summary_lines(entries))


def _others_markdown(entries: list[dict[str, Any]]) -> str:
    """Differences from float32 at the precisions beside float32 and APT; empty without them."""
    others = [p for p in LABELS if any(p in entry["others"] for entry in entries)]
    rows = [[entry["name"], *(_markdown_other(entry["others"].get(p)) for p in others)] for entry in entries]
    text = "Differences from float32 [95 % CI] (pairs) of the other precisions:\n\n"
    return text + _markdown_table(["network", *(LABELS[p] for p in others)], rows) if others else ""


def brief_markdown(entries: list[dict[str, Any]]) -> str:
    """Scores and their differences alone."""
    head = ["network", "task (score)", "float32", "APT", "APT - float32 [95 % CI] (pairs)"]
    head += [f"{LABELS[NEAREST]} - float32"]
    rows = [
        [
            entry["name"],
            f"{entry['task']} ({entry['metric']})",
            f"{entry['float32']:.2f}",
            f"{entry['apt']:.2f}",
            _markdown_other(entry),
            _markdown_other(entry["others"].get(NEAREST)),
        ]
        for entry in entries
    ]
    kept = ("apt", NEAREST)
    means = [line for name, line in _means(entries).items() if name in kept]
    return _markdown_table(head, rows) + "".join(f"- {line}\n" for line in means)


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", ""])


def _markdown_row(entry: dict[str, Any], widths: list[str]) -> list[str]:
    shares, difference = gradient_shares(entry["bits"]), entry["difference"]
    cells = [entry["name"], f"{entry['task']} ({entry['metric']})", str(len(difference["each"]))]
    cells += [f"{entry['float32']:.2f} [{_spread(entry)}]", f"{entry['apt']:.2f}"]
    cells += [format_difference(difference), f"{min(difference['each']):+.2f}", describe_verdict(entry)]
    cells += [_percent(shares.get(width)) for width in widths]
    return [*cells, f"{gradient_interval(entry['bits']):.1f} steps", _step_ratio(entry["step_ms"])]


def _spread(entry: dict[str, Any]) -> str:
    return f"{entry['float32_spread']:.2f}" if len(entry["seeds"]["float32"]) > 1 else "-"


def describe_origin(command: str, environment: dict[str, Any]) -> str:
    """A line on the command, the machine and the versions."""
    return f"{_origin(command, environment)}; code {environment['jax_apt']['digest']}\n"


def _origin(command: str, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['isa']}"
    return f"- `{command}`; {machine}; {versions}"


def describe_origins(entries: list[dict[str, Any]]) -> str:
    """A line for each machine that runs of finished entries come from, with the versions of the code."""
    codes: dict[str, dict[str, None]] = {}
    for entry in entries:
        for origin in entry["origins"]:
            environment = origin["environment"]
            line = _origin("jax-apt compare", environment)
            codes.setdefault(line, {})[environment["jax_apt"]["digest"]] = None
    return "".join(f"{line}; code {', '.join(each)}\n" for line, each in codes.items())


def _step_ratio(times: dict[str, Any]) -> str:
    """Of medians that were timed in turn in one process."""
    return f"{times['apt']['median'] / times['float32']['median']:.2f}" if times else "-"


def _markdown_other(other: dict[str, Any] | None) -> str:
    if other is None:
        return "-"
    return f"{format_difference(other['difference'])} ({len(other['difference']['each'])})"


FULL, BRIEF = "networks", "networks in brief"  # marks of a table in a file
PAPER_RANGE = (-1.40, 1.3)  # points; of the paper's networks


def describe_verdict(entry: dict[str, Any]) -> str:
    """Where the mean difference lies: in the paper's range, or within the span of float32's own seeds."""
    low, high = PAPER_RANGE
    if low <= entry["difference"]["mean"] <= high:
        return "paper's range"
    is_within = abs(entry["difference"]["mean"]) <= entry["float32_spread"]
    return "float32's spread" if is_within else "neither"


def put(entries: list[dict[str, Any]], text: str) -> str:
    """The text with what lies between its two marks replaced: all columns, or those of `brief_markdown`.

    Raises:
      ValueError: the marks are not there, each once.
    """
    is_brief = BRIEF in text
    begin, end = f"<!-- {BRIEF if is_brief else FULL} -->", f"<!-- end of {FULL} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"the file must have the marks <!-- {FULL} --> (or <!-- {BRIEF} -->) and {end}, in this order, "
            "once each"
        )
    table = brief_markdown(entries) if is_brief else markdown(entries) + describe_origins(entries)
    return text[: text.index(begin) + len(begin)] + f"\n\n{table}\n" + text[text.index(end) :]


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
