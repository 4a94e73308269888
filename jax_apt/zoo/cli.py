"""The command line: `jax-apt compare` trains in float32 and in adaptive fixed point."""

import argparse
import json
import math
import pathlib
import shlex
import shutil
import sys
from typing import Any

EXTRA = "pip install 'jax-apt[cli]'"
EXTRA_PACKAGES = ("flax", "optax", "sklearn", "scipy", "matplotlib", "rich")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 bad usage, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(arguments)
        return _compare(options, shlex.join(["jax-apt", *arguments]))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_PACKAGES:
            raise
        return _fail(f"jax-apt: the package {package!r} is missing; install the extra: {EXTRA}")
    except KeyboardInterrupt:
        _fail("interrupted; finished runs are kept, the same command goes on from there")
        return 130


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


# Options


def _parser() -> argparse.ArgumentParser:
    about = "Adaptive Precision Training for JAX."
    parser = argparse.ArgumentParser(prog="jax-apt", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        help="train in float32 and in adaptive fixed point and compare",
        description="Trains the same networks with the same seeds, batches and hyper-parameters in "
        "float32 and in adaptive fixed point (APT). Prints scores, their paired difference, widths "
        "and step times; writes results.json and a picture per network. Finished runs are kept in "
        "the folder: after an interruption the same command goes on from there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training_options(compare)
    add = compare.add_argument
    add("--out", type=pathlib.Path, default=pathlib.Path("apt-compare"), help="folder to write to")
    add("--fresh", action="store_true", help="forget the finished runs in the folder")
    add("--json", action="store_true", help="print one JSON object alone on standard output")
    return parser


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    from jax_apt.config import BACKENDS, MODES
    from jax_apt.zoo.networks import NETWORKS
    from jax_apt.zoo.tasks import TASKS
    from jax_apt.zoo.trainer import Settings

    add, defaults = parser.add_argument, Settings()
    add("--task", choices=sorted(TASKS), default=defaults.task, help="what is learnt")
    add(
        "--network",
        choices=sorted(NETWORKS),
        action="append",
        default=argparse.SUPPRESS,
        help="may be repeated; all if not given",
    )
    add("--seeds", type=_positive, default=5, help="pairs of runs per network")
    add("--epochs", type=_positive, default=defaults.epochs, help="passes over the training data")
    add("--batch-size", type=_positive, default=defaults.batch_size, help="examples per step")
    add("--learning-rate", type=_rate, default=defaults.learning_rate, help="of Adam, at first")
    add("--mode", choices=MODES, default=defaults.mode, help="how an update searches a width")
    add("--widths", type=_widths, default="8,16,24", help="ascending bit-widths of the gradients")
    add(
        "--initial-fraction",
        type=_fraction,
        default=defaults.initial_fraction,
        help="part of the first epoch in which APT adjusts at every step (published code: 0.1)",
    )
    add("--backend", choices=BACKENDS, default=defaults.backend, help="what runs integer products")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number > 0")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _number(text: str) -> float:
    """NaN, which no range contains, if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _widths(text: str) -> tuple[int, ...]:
    from jax_apt.config import Adaptive

    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        message = f"{text!r} is not a list of whole numbers such as 8,16,24"
        raise argparse.ArgumentTypeError(message) from None
    try:
        return Adaptive(*widths).widths
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


# Comparison


def _compare(options: argparse.Namespace, command: str) -> int:
    # The whole extra is imported before the first step: no package may turn out missing at the end.
    from jax_apt.zoo import environment, figures, tables
    from jax_apt.zoo.networks import NETWORKS
    from jax_apt.zoo.runs import Runs, write_whole
    from jax_apt.zoo.trainer import describe_config

    settings = _settings(options)
    problem = _find_problem(options, settings)
    if problem:
        return _fail(f"jax-apt compare: error: {problem}")
    names = list(dict.fromkeys(getattr(options, "network", NETWORKS)))
    machine, config = environment.describe(), describe_config(settings)
    runs = Runs(options.out / "runs", {"settings": settings.to_dict(), "environment": machine})
    entries = _run(names, settings, options.seeds, runs)
    results = {
        "command": command,
        "environment": machine,
        "settings": settings.to_dict() | {"seeds": options.seeds},
        "config": config,
        "networks": entries,
    }
    write_whole(options.out / "results.json", json.dumps(results, indent=1, allow_nan=False))
    for entry in entries:
        figures.draw(entry, options.out / f"{entry['name']}.png")
    if options.json:
        print(json.dumps(results | {"networks": [_without_history(e) for e in entries]}))
    else:
        tables.print_tables(entries, config)
        print(f"results.json and pictures are in {options.out}")
    return 0


def _settings(options: argparse.Namespace):
    from dataclasses import fields

    from jax_apt.zoo.trainer import Settings

    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


def _find_problem(options: argparse.Namespace, settings) -> str:
    """Makes the folder ready; returns what is wrong, or ""."""
    from jax_apt.plan import choose_backend
    from jax_apt.zoo.tasks import TASKS

    examples = len(TASKS[settings.task].load(0).train_labels)
    if settings.batch_size > examples:
        size = settings.batch_size
        return f"argument --batch-size: {size} exceeds the {examples} training examples"
    try:
        choose_backend(settings.backend)
    except RuntimeError as error:
        return f"argument --backend: {error}"
    try:
        if options.fresh:
            shutil.rmtree(options.out / "runs", ignore_errors=True)
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"argument --out: {error}"
    return ""


def _run(names: list[str], settings, seeds: int, runs) -> list[dict[str, Any]]:
    from jax_apt.zoo.compare import compare_network
    from jax_apt.zoo.trainer import PRECISIONS, count_steps

    steps = len(names) * seeds * len(PRECISIONS) * settings.epochs * count_steps(settings)
    with _Progress(steps) as progress:
        entries = [compare_network(n, settings, seeds, runs, progress.advance) for n in names]
    for entry in entries:
        _report_reuse(entry, seeds * len(PRECISIONS), runs.folder)
    for path in runs.damaged:
        print(f"{path} was damaged; it has been made anew", file=sys.stderr)
    return entries


def _report_reuse(entry: dict[str, Any], total: int, folder: pathlib.Path) -> None:
    if entry["reused_runs"]:
        count = f"{entry['reused_runs']} of {total} runs"
        note = f"{entry['name']}: reused {count} from {folder} (--fresh forgets them)"
        print(note, file=sys.stderr)


def _without_history(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("history", "curves")}


class _Progress:
    """A bar on standard error."""

    def __init__(self, total: int):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description:24}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("compiling", total=total)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def advance(self, description: str, steps: int) -> None:
        self.bar.update(self.task, advance=steps, description=description)


if __name__ == "__main__":
    sys.exit(main())
