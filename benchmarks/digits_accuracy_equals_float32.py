"""Accuracy of networks trained in adaptive fixed point equals float32's: `jax-apt compare`, kept and quoted.

    python benchmarks/digits_accuracy_equals_float32.py            # trains (about two minutes a mode)
    python benchmarks/digits_accuracy_equals_float32.py --readme   # writes the README's table anew

Both modes of choosing a width run with otherwise default settings. Results lie in
results/<cpu>/digits_accuracy_equals_float32.json; finished runs lie in apt-compare/<mode>, so that the
command goes on after an interruption. The README's table quotes the newest file.
"""

import argparse
import datetime
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(__file__).parent / "results"
BENCHMARK = pathlib.Path(__file__).stem
BEGIN, END = "<!-- digits: ", "<!-- end of digits -->"

LARGEST_MEAN, LARGEST_LOSS = 0.5, 1.40  # points: of a network's mean difference, and of any one pair


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="only write the README's table from the file")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs per network")
    options = parser.parse_args()
    if not options.readme:
        _save({mode: _compare(mode, options.seeds) for mode in ("grow", "restart")})
    document = newest()
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), document))
    print(table(document))
    failures = misses(document)
    print("\n".join(failures) or "every difference lies within the limits", file=sys.stderr)
    return 1 if failures else 0


def _compare(mode: str, seeds: int) -> dict[str, Any]:
    """The object that `jax-apt compare --json` prints."""
    options = ["--mode", mode, "--seeds", str(seeds), "--out", f"apt-compare/{mode}"]
    command = [sys.executable, "-m", "jax_apt.zoo.cli", "compare", "--json", *options]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def _save(runs: dict[str, dict[str, Any]]) -> None:
    about = next(iter(runs.values()))["environment"]
    kept = ("command", "settings", "config", "networks")
    document = {
        "benchmark": BENCHMARK,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": about,
        "modes": {mode: {key: run[key] for key in kept} for mode, run in runs.items()},
    }
    path = RESULTS / _cpu_key(about["cpu"]) / f"{BENCHMARK}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _cpu_key(cpu: str) -> str:
    """Name of a folder for a processor's results."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


def newest() -> dict[str, Any]:
    """The file that was measured last, on whatever processor."""
    documents = [json.loads(path.read_text()) for path in RESULTS.glob(f"*/{BENCHMARK}.json")]
    return max(documents, key=lambda document: document["when"])


def misses(document: dict[str, Any]) -> list[str]:
    """Networks whose accuracy differs by more than the limits."""
    found = []
    for mode, entry in _entries(document):
        difference = entry["difference"]
        if abs(difference["mean"]) > LARGEST_MEAN or min(difference["each"]) < -LARGEST_LOSS:
            found.append(f"{entry['name']} ({mode}): differences {difference['each']}")
    return found


def _entries(document: dict[str, Any]):
    return [(mode, entry) for mode, run in document["modes"].items() for entry in run["networks"]]


# README


def with_table(readme: str, document: dict[str, Any]) -> str:
    """The README with its table between the two marks replaced."""
    pattern = re.compile(rf"({re.escape(BEGIN)}.*?-->\n).*?({re.escape(END)})", re.DOTALL)
    text, count = pattern.subn(lambda m: f"{m[1]}\n{quote(document)}\n\n{m[2]}", readme)
    if count != 1:
        raise ValueError(f"the README has {count} tables between {BEGIN!r} and {END!r} instead of one")
    return text


def quote(document: dict[str, Any]) -> str:
    """The table with the machine and the versions it was measured with."""
    about, versions = document["machine"], document["machine"]["versions"]
    seeds = len(_entries(document)[0][1]["difference"]["each"])
    return (
        f"Test accuracy on handwritten digits, mean of {seeds} paired seeds, and the median time of a "
        f"training step at both\nprecisions, in turn in one process. {about['cpu']}, {about['cores']} cores, "
        f"{about['isa']}, jax {versions['jax']}, Python {about['python']}.\n\n{table(document)}"
    )


def table(document: dict[str, Any]) -> str:
    """Markdown, one row for each network and mode."""
    widths = ("dY: steps at 8 / 16 / 24", "dY: at the end")
    scores = ("float32", "APT", "difference [95 % CI]", "least")
    header = ("network", "mode", *scores, *widths, "float32 step", "APT step")
    rows = [_row(mode, entry) for mode, entry in _entries(document)]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(mode: str, entry: dict[str, Any]) -> list[str]:
    difference, times = entry["difference"], entry["step_ms"]
    return [
        entry["name"],
        mode,
        f"{entry['float32']:.2f} %",
        f"{entry['apt']:.2f} %",
        f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]",
        f"{min(difference['each']):+.2f}",
        " / ".join(f"{100 * share:.0f} %" for share in _shares(entry).values()),
        _final_widths(entry),
        *(f"{times[precision]['median']:.2f} ms" for precision in ("float32", "apt")),
    ]


def _gradients(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer["tensors"]["dy"] for layer in entry["bits"].values()]


def _shares(entry: dict[str, Any]) -> dict[str, float]:
    """Share of the training steps at each width, mean over the layers' gradients."""
    shares = [gradient["share"] for gradient in _gradients(entry)]
    return {width: sum(share[width] for share in shares) / len(shares) for width in shares[0]}


def _final_widths(entry: dict[str, Any]) -> str:
    """How many gradients, of all layers and seeds, ended at each width: "3 x 8, 12 x 16"."""
    widths = [bits for gradient in _gradients(entry) for bits in gradient["final_bits"]]
    return ", ".join(f"{widths.count(width)} x {width}" for width in sorted(set(widths)))


if __name__ == "__main__":
    sys.exit(main())
