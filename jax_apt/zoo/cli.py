"""The command line: `jax-apt compare` trains in float32 and in adaptive fixed point, side by side."""

import argparse
import json
import pathlib
import shlex
import shutil
import sys
from typing import Any

EXTRA = "pip install 'jax-apt[cli]'"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        from jax_apt.zoo import networks, tasks, trainer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"jax-apt: the package {error.name!r} is missing; install the extra: {EXTRA}", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        return _compare(options, arguments)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except RuntimeError as error:  # a backend that cannot run here
        print(f"jax-apt: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from jax_apt.config import BACKENDS, MODES
    from jax_apt.zoo.networks import NETWORKS
    from jax_apt.zoo.tasks import TASKS
    from jax_apt.zoo.trainer import Settings

    parser = argparse.ArgumentParser(prog="jax-apt", description="Adaptive Precision Training for JAX")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="train in float32 and in adaptive fixed point and compare",
        description="Trains the same networks with the same seeds and hyper-parameters in float32 and in "
        "adaptive fixed point. Finished runs are kept, so an interrupted comparison goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Settings()
    add = compare.add_argument
    add("--task", choices=sorted(TASKS), default=defaults.task, help="what is learnt")
    add("--network", choices=sorted(NETWORKS), action="append", help="may be repeated; all if not given")
    add("--seeds", type=_positive, default=5, help="paired runs per network")
    add("--epochs", type=_positive, default=defaults.epochs, help="passes over the training data")
    add("--batch-size", type=_positive, default=defaults.batch_size, help="examples per step")
    add("--learning-rate", type=_positive_float, default=defaults.learning_rate, help="of Adam")
    add("--mode", choices=MODES, default=defaults.mode, help="how a width is searched at an update")
    add("--widths", type=_widths, default="8,16,24", help="candidate bit-widths of gradients")
    add("--backend", choices=BACKENDS, default=defaults.backend, help="what runs the integer products")
    add("--out", type=pathlib.Path, default=pathlib.Path("apt-compare"), help="folder of the results")
    add("--fresh", action="store_true", help="forget the finished runs in the folder")
    add("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return value


def _widths(text: str) -> tuple[int, ...]:
    from jax_apt.config import Adaptive

    try:
        return Adaptive(*(int(part) for part in text.split(","))).widths
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


# Comparison


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    from rich.console import Console

    from jax_apt.zoo.compare import Runs, compare_network, machine
    from jax_apt.zoo.figures import draw
    from jax_apt.zoo.networks import NETWORKS
    from jax_apt.zoo.trainer import Settings

    settings = Settings(
        task=options.task,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        mode=options.mode,
        widths=options.widths,
        backend=options.backend,
    )
    problem = _prepare(options, settings)
    if problem:
        print(f"jax-apt compare: error: {problem}", file=sys.stderr)
        return 2
    networks = list(dict.fromkeys(options.network or NETWORKS))
    runs = Runs(options.out, settings)
    total = _total_steps(settings, options.seeds, len(networks))
    with _Progress(total) as progress:
        entries = [compare_network(n, settings, options.seeds, runs, progress.advance) for n in networks]
    results = {
        "command": shlex.join(["jax-apt", *arguments]),
        "machine": machine(),
        "settings": settings.to_dict() | {"seeds": options.seeds},
        "networks": entries,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    for entry in entries:
        draw(entry, options.out / f"{entry['name']}.png")
    if options.json:
        print(json.dumps(results))
    else:
        _print_tables(Console(), entries)
        print(f"pictures and results.json are in {options.out}")
    return 0


def _prepare(options: argparse.Namespace, settings) -> str:
    """Makes the folder ready; returns what is wrong, or ""."""
    from jax_apt.zoo.tasks import TASKS

    examples = len(TASKS[settings.task].load().train_labels)
    if settings.batch_size > examples:
        return f"argument --batch-size: {settings.batch_size} exceeds the {examples} training examples"
    try:
        if options.fresh:
            shutil.rmtree(options.out / "runs", ignore_errors=True)
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"argument --out: {error}"
    return ""


def _total_steps(settings, seeds: int, networks: int) -> int:
    from jax_apt.zoo.tasks import TASKS
    from jax_apt.zoo.trainer import PRECISIONS

    steps = len(TASKS[settings.task].load().train_labels) // settings.batch_size
    return steps * settings.epochs * seeds * networks * len(PRECISIONS)


class _Progress:
    """A bar on standard error."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("compiling", total=total)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def advance(self, description: str, steps: int) -> None:
        self.bar.update(self.task, advance=steps, description=description)


# Tables


def _print_tables(console, entries: list[dict[str, Any]]) -> None:
    from rich.table import Table

    summary = Table(title="float32 and adaptive fixed point (APT), scores in points")
    for column in ("network", "task", "float32", "APT", "difference [95 % interval]", "float32 step", "APT step"):
        summary.add_column(column, justify="left" if column in ("network", "task") else "right")
    for e in entries:
        seconds = e["step_seconds"]
        summary.add_row(
            e["name"],
            e["task"],
            f"{e['float32']:.2f}",
            f"{e['apt']:.2f}",
            _interval(e["difference"]),
            f"{1e3 * seconds['float32']:.2f} ms",
            f"{1e3 * seconds['apt']:.2f} ms",
        )
    console.print(summary)
    for e in entries:
        console.print(_layer_table(e))
        if e["reused_runs"]:
            console.print(f"{e['name']}: {e['reused_runs']} finished runs were read from the folder")


def _interval(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return f"{difference['mean']:+.2f} [one seed]"
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _layer_table(entry: dict[str, Any]):
    from rich.table import Table

    meaning = {"x": "X", "w": "W", "dy": "dY"}
    widths = sorted(
        {int(n) for layer in entry["bits"].values() for t in layer["tensors"].values() for n in t["share"]}
    )
    table = Table(title=f"{entry['name']}: share of steps at each width, mean over seeds")
    for column in ("layer", "backend", "tensor", *(f"int{n}" for n in widths), "update interval"):
        table.add_column(column, justify="left" if column in ("layer", "backend", "tensor") else "right")
    for name, layer in entry["bits"].items():
        for tensor, t in layer["tensors"].items():
            shares = [f"{100 * t['share'].get(str(n), 0.0):.1f} %" for n in widths]
            table.add_row(name, layer["backend"], meaning[tensor], *shares, f"{t['mean_interval']:.1f} steps")
    return table


if __name__ == "__main__":
    sys.exit(main())
