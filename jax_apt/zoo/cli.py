"""The command line: `jax-apt compare`, `observe` and `train`."""

import argparse
import json
import math
import pathlib
import shlex
import shutil
import sys
from typing import Any

EXTRA = "pip install 'jax-apt[cli]'"
DATA_EXTRA, DATA_PACKAGES = "pip install 'jax-apt[data]'", ("grain", "orbax", "PIL")
EXTRA_PACKAGES = ("flax", "optax", "sklearn", "scipy", "matplotlib", "rich", "sacrebleu", "num2words")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 bad usage, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(arguments)
        return options.function(options, shlex.join(["jax-apt", *arguments]))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*EXTRA_PACKAGES, *DATA_PACKAGES):
            raise
        extra = DATA_EXTRA if package in DATA_PACKAGES else EXTRA
        return _fail(f"jax-apt: the package {package!r} is missing; install the extra: {extra}")
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
    compare.set_defaults(function=_compare)
    _add_results(commands)
    _add_observe(commands)
    _add_train(commands)
    return parser


def _add_results(commands) -> None:
    results = commands.add_parser(
        "results",
        help="write the table of the runs that a comparison has finished so far",
        description="Trains nothing. Reads the finished runs of `jax-apt compare --out FOLDER`, also of an "
        "interrupted or still running one, and writes results.json and results.md; each network is compared "
        "over the seeds that are there.",
    )
    add = results.add_argument
    add("folder", type=pathlib.Path, metavar="FOLDER", help="of a comparison")
    add(
        "--into",
        type=pathlib.Path,
        action="append",
        default=[],
        help="file whose marked table is replaced; may be repeated",
    )
    add("--pictures", type=pathlib.Path, help="folder to draw a picture per network to")
    add(
        "--across-versions",
        action="store_true",
        help="let runs of several versions of the code count together; sound only where networks and tasks "
        "have not changed between them",
    )
    results.set_defaults(function=_results)


def _add_observe(commands) -> None:
    from jax_apt.zoo.tasks.digits import DIGITS

    observe = commands.add_parser(
        "observe",
        help="draw the paper's observations from a finished comparison",
        description="Draws how ranges and widths of gradients differ by layer and settle, and what gradients "
        "of 8 bits cost, from results.json; measures with --correlate how well three error measures foretell "
        "the loss of accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = observe.add_argument
    add("--results", type=pathlib.Path, default=pathlib.Path("apt-compare"), help="folder of a comparison")
    add("--out", type=pathlib.Path, default=pathlib.Path("apt-observe"), help="folder to write to")
    add("--correlate", choices=DIGITS.networks, default=argparse.SUPPRESS, help="network to measure")
    add("--epochs", type=_positive, default=DIGITS.recipe.epochs, help="of each training of --correlate")
    observe.set_defaults(function=_observe)


def _add_train(commands) -> None:
    from jax_apt.config import BACKENDS
    from jax_apt.zoo.precisions import ALL_PRECISIONS

    train = commands.add_parser(
        "train",
        help="train a published recipe on real data",
        description="Trains a network on a data set that is on this machine, as its paper does, on all "
        "devices. Goes on from the last checkpoint in the output folder. Needs jax-apt[data].",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = train.add_argument
    add("recipe", help="for example resnet50-imagenet; an unknown name lists all")
    add("--data", type=pathlib.Path, required=True, help="folder of the data set")
    add("--out", type=pathlib.Path, default=pathlib.Path("apt-train"), help="folder to write to")
    add("--precision", choices=ALL_PRECISIONS, default="apt", help="of the products")
    add("--size", choices=("published", "small"), default="published", help="of the network")
    add("--epochs", type=_positive, default=argparse.SUPPRESS, help="other than the recipe's")
    add("--batch-size", type=_positive, default=argparse.SUPPRESS, help="other than the recipe's")
    add("--seed", type=int, default=0, help="of initial values, order and augmentation")
    add("--backend", choices=BACKENDS, default="auto", help="what runs integer products")
    train.set_defaults(function=_train)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    from jax_apt.config import BACKENDS, MODES
    from jax_apt.zoo.networks import NETWORKS
    from jax_apt.zoo.precisions import ALL_PRECISIONS, Settings
    from jax_apt.zoo.tasks import TASKS

    add, defaults = parser.add_argument, Settings()
    add("--task", choices=sorted(TASKS), default=defaults.task, help="what is learnt")
    add(
        "--network",
        choices=sorted(NETWORKS),
        action="append",
        default=argparse.SUPPRESS,
        help="may be repeated; all of the task if not given",
    )
    add("--all", action="store_true", help="every task with every network at every precision")
    add(
        "--precision",
        choices=ALL_PRECISIONS,
        action="append",
        default=argparse.SUPPRESS,
        help="beside float32 and apt; may be repeated; apt-nearest: gradients rounded to nearest, as "
        "published; apt-14: widths 8, 14, 16, 24; int8, int8-nearest, int16: gradients of that one width",
    )
    add("--seeds", type=_positive, default=5, help="pairs of runs per network")
    hyper: dict[str, Any] = {"default": argparse.SUPPRESS}
    add("--epochs", type=_positive, **hyper, help=f"passes over the data; {_recipes('epochs')}")
    add("--batch-size", type=_positive, **hyper, help=f"examples per step; {_recipes('batch_size')}")
    add(
        "--learning-rate",
        type=_rate,
        **hyper,
        help=f"of Adam, the greatest; {_recipes('learning_rate')}",
    )
    add("--mode", choices=MODES, default=defaults.mode, help="how an update searches a width")
    add("--widths", type=_widths, default="8,16,24", help="ascending bit-widths of the gradients")
    add(
        "--initial-fraction",
        type=_fraction,
        default=defaults.initial_fraction,
        help="part of the first epoch in which APT adjusts at every step (published code: 0.1)",
    )
    add("--backend", choices=BACKENDS, default=defaults.backend, help="what runs integer products")


def _recipes(name: str) -> str:
    """The tasks' own values of a hyper-parameter, for the help."""
    from jax_apt.zoo.tasks import TASKS

    return "default: " + ", ".join(f"{getattr(t.recipe, name):g} ({t.name})" for t in TASKS.values())


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
    import num2words  # noqa: F401
    import sacrebleu  # noqa: F401

    from jax_apt.zoo import environment, figures, tables
    from jax_apt.zoo.compare import overall
    from jax_apt.zoo.runs import write_whole
    from jax_apt.zoo.trainer import describe_config

    jobs = _jobs(options)
    problem = _find_problem(options, jobs)
    if problem:
        return _fail(f"jax-apt compare: error: {problem}")
    machine = environment.describe()
    entries = _run(jobs, options.seeds, options.out)
    tasks = {
        job.settings.task: {
            "settings": job.settings.to_dict() | {"seeds": options.seeds},
            "config": describe_config(job.settings),
        }
        for job in jobs
    }
    about = {"tasks": tasks} if options.all else tasks[options.task]
    results = {"command": command, "environment": machine, **about, "networks": entries}
    results["overall"] = overall(entries)
    write_whole(options.out / "results.json", json.dumps(results, allow_nan=False))
    write_whole(
        options.out / "results.md", tables.markdown(entries) + tables.describe_origin(command, machine)
    )
    for entry in entries:
        figures.draw(entry, options.out / f"{entry['name']}.png")
    if options.json:
        print(json.dumps(results | {"networks": [_without_history(e) for e in entries]}))
    else:
        tables.print_tables(entries, {task: about["config"] for task, about in tasks.items()})
        print(f"results.json, results.md and pictures are in {options.out}")
    return 0


def _jobs(options: argparse.Namespace) -> list:
    from jax_apt.zoo import environment
    from jax_apt.zoo.compare import Job
    from jax_apt.zoo.precisions import ALL_PRECISIONS, PRECISIONS
    from jax_apt.zoo.runs import Runs
    from jax_apt.zoo.tasks import TASKS

    chosen = getattr(options, "precision", ALL_PRECISIONS if options.all else ())
    precisions = [p for p in ALL_PRECISIONS if p in PRECISIONS or p in chosen]
    jobs = []
    for name in TASKS if options.all else [options.task]:
        networks = list(dict.fromkeys(getattr(options, "network", TASKS[name].networks)))
        settings = _settings(options, name)
        common = {"settings": settings.to_dict(), "environment": environment.describe()}
        jobs.append(Job(settings, networks, precisions, Runs(options.out / "runs", common)))
    return jobs


def _settings(options: argparse.Namespace, task: str):
    from dataclasses import fields

    from jax_apt.zoo.precisions import Settings
    from jax_apt.zoo.trainer import settings_for

    names = {field.name for field in fields(Settings)} - {"task"}
    return settings_for(task, **{name: getattr(options, name, None) for name in names})


def _find_problem(options: argparse.Namespace, jobs: list) -> str:
    """Makes the folder ready; returns what is wrong, or ""."""
    from jax_apt.plan import choose_backend
    from jax_apt.zoo.trainer import count_examples

    if options.all and hasattr(options, "network"):
        return "argument --all: every network is meant; leave out --network"
    for job in jobs:
        problem = _find_misfit(job)
        if problem:
            return problem
        examples, size = count_examples(job.settings.task), job.settings.batch_size
        if size > examples:
            return f"argument --batch-size: {size} exceeds the {examples} training examples"
    try:
        choose_backend(options.backend)
    except RuntimeError as error:
        return f"argument --backend: {error}"
    try:
        if options.fresh:
            shutil.rmtree(options.out / "runs", ignore_errors=True)
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"argument --out: {error}"
    return ""


def _find_misfit(job) -> str:
    from jax_apt.zoo.tasks import TASKS

    task = TASKS[job.settings.task]
    wrong = [name for name in job.networks if name not in task.networks]
    if not wrong:
        return ""
    return f"argument --network: {wrong[0]} does not do the task {task.name}; {', '.join(task.networks)} do"


def _run(jobs: list, seeds: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    from jax_apt.zoo.compare import compare
    from jax_apt.zoo.trainer import count_steps

    total = sum(
        len(job.networks) * seeds * len(job.precisions) * job.settings.epochs * count_steps(job.settings)
        for job in jobs
    )
    with _Progress(total) as progress:
        entries = compare(jobs, seeds, progress.advance)
    for entry in entries:
        _report_reuse(entry, seeds * len(entry["seeds"]), folder / "runs")
    for path in (path for job in jobs for path in job.runs.damaged):
        print(f"{path} was damaged; it has been made anew", file=sys.stderr)
    return entries


def _results(options: argparse.Namespace, _: str) -> int:
    from jax_apt.zoo import figures, tables
    from jax_apt.zoo.compare import finished_entries, overall
    from jax_apt.zoo.runs import write_whole

    entries = finished_entries(options.folder / "runs", options.across_versions)
    if not entries:
        return _fail(f"jax-apt results: error: no network has a finished pair in {options.folder / 'runs'}")
    results = {"networks": entries, "overall": overall(entries)}
    write_whole(options.folder / "results.json", json.dumps(results, allow_nan=False))
    text = tables.markdown(entries) + tables.describe_origins(entries)
    write_whole(options.folder / "results.md", text)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            figures.draw(entry, options.pictures / f"{entry['name']}.png")
    for page in options.into:
        try:
            write_whole(page, tables.put(entries, page.read_text()))
        except (OSError, ValueError) as error:
            return _fail(f"jax-apt results: error: argument --into: {page}: {error}")
    print(text)
    return 0


def _observe(options: argparse.Namespace, _: str) -> int:
    from jax_apt.zoo import observations
    from jax_apt.zoo.runs import write_whole
    from jax_apt.zoo.trainer import settings_for

    path = options.results / "results.json"
    if not path.exists():
        return _fail(
            f"jax-apt observe: error: argument --results: {path} is not there; run jax-apt compare, or "
            "jax-apt results on the folder of its runs"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text())["networks"]
    for entry in entries:
        observations.draw_ranges(entry, options.out / f"ranges-{entry['name']}.png")
    if not observations.draw_costs(entries, options.out / "costs.png"):
        print("no costs.png: the comparison has no --precision int8", file=sys.stderr)
    network = getattr(options, "correlate", None)
    if network:
        settings = settings_for("digits", epochs=options.epochs)
        result = observations.correlate_errors(network, settings, lambda line: print(line, file=sys.stderr))
        write_whole(options.out / f"correlation-{network}.json", json.dumps(result, indent=1))
        observations.draw_correlation(result, options.out / f"correlation-{network}.png")
    print(f"pictures are in {options.out}")
    return 0


def _train(options: argparse.Namespace, command: str) -> int:
    from jax_apt.zoo import environment
    from jax_apt.zoo.data.recipes import RECIPES
    from jax_apt.zoo.data.training import Options, train
    from jax_apt.zoo.runs import write_whole

    if options.recipe not in RECIPES:
        return _fail(f"jax-apt train: error: {options.recipe!r} is none of {', '.join(RECIPES)}")
    chosen = {k: v for k, v in vars(options).items() if k not in ("command", "function")}
    try:
        result = train(Options(**chosen), lambda line: print(line, file=sys.stderr))
    except (FileNotFoundError, ValueError) as error:
        return _fail(f"jax-apt train: error: {error}")
    record = {"command": command, "environment": environment.describe(), **result}
    write_whole(options.out / "result.json", json.dumps(record, indent=1))
    print(f"score {result['score']:.2f} after {result['steps']} steps; result.json is in {options.out}")
    return 0


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
