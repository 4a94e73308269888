"""The command line that the benchmarks share, and the running of their cases."""

import argparse
import ctypes.util
import datetime
import os
import pathlib
import sys
import time
from collections.abc import Callable

from harness import ceilings, machine, results
from harness.timing import Pace, interleave
from harness.workers import ENVIRONMENTS, Key, Team


def options(claim: str, rounds: int, block_ms: float, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=claim)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=min(2, cores), help="cores for every contender")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds; medians are quoted")
    parser.add_argument("--block-ms", type=float, default=block_ms, help="length of one timed block")
    parser.add_argument("--only", default="", help="cases whose name holds one of these texts, by comma")
    parser.add_argument("--merge", action="store_true", help="put the rows in the file of all cases")
    parser.add_argument("--without", default="", help="contenders to leave out, by comma: torch,aqt")
    parser.add_argument("--nonnegative", action="store_true", help="activations are a ReLU's output")
    parser.add_argument("--allocator", default="", help="of all contenders, such as tcmalloc_minimal")
    parser.add_argument("--avx2", action="store_true", help="all contenders use AVX2 and FMA at most")
    parser.add_argument("--every-width", action="store_true", help="steps: all contenders, long compilations")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; saves nothing")
    parser.add_argument("--out", default=None, help="folder of the JSON file, instead of results/<cpu>")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.block_ms = 2, 1.0
    if args.allocator:
        os.environ["LD_PRELOAD"] = _library(args.allocator)  # workers inherit it
    if args.avx2:
        os.environ["JAX_APT_ISA"] = "avx2"  # workers inherit it
    return args


def _library(allocator: str) -> str:
    library = ctypes.util.find_library(allocator)
    if library is None:
        raise SystemExit(
            f"--allocator {allocator}: no lib{allocator} is installed; Debian has libtcmalloc-minimal4"
        )
    return library


def run(
    benchmark: str,
    args: argparse.Namespace,
    cases: list[dict],
    contenders: Callable[[dict], dict[str, list[str]]],
    rows_of: Callable[..., list[dict]],
) -> dict:
    """Times the cases, prints each, saves the document.

    Args:
      benchmark: name of the JSON file.
      args: from `options`.
      cases: what the workers build.
      contenders: of a case, names by worker kind.
      rows_of: (case, milliseconds by (contender, pass), infos) -> rows with "group", "name", "pass", "ms".
    """
    start = time.monotonic()
    about = machine.describe(args.threads)
    print(f"{about['cpu']}, {args.threads} threads, ISA {about['isa']}", file=sys.stderr)
    measured = ceilings.measure(args.threads) if args.rounds > 1 else {}  # once: nothing is timed
    kinds = [kind for kind in ENVIRONMENTS if kind not in args.without.split(",")]
    cases = [case | ({"nonnegative": True} if args.nonnegative else {}) for case in cases]
    pace, rows, unavailable = Pace(args.rounds, args.block_ms / 1000), [], {}
    with Team(kinds, args.threads, args.avx2) as team:
        for case in cases:
            if not any(text in case["name"] for text in args.only.split(",")):
                continue
            chosen = _without(contenders(case), args.without, kinds)
            print(f"{case['name']} ...", file=sys.stderr)
            infos = team.prepare(case, chosen)
            unavailable |= {n: i["unavailable"] for n, i in infos.items() if "unavailable" in i}
            ms = _milliseconds(team, infos, pace)
            rows += [row | {"ratios": results.ratios(row["ms"])} for row in rows_of(case, ms, infos)]
            team.clear()
            print("\n".join(_line(row) for row in rows if row["name"] == case["name"]), file=sys.stderr)
    document = {
        "benchmark": benchmark,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start),
        "machine": about,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "quick")},
        "ceilings": measured,
        "unavailable": unavailable,
        "rows": _with_ceilings(rows, measured, about["isa"]),
        "means": results.group_means(rows),
    }
    _save(benchmark, document, args)
    return document


def _milliseconds(team: Team, infos: dict[str, dict], pace: Pace) -> dict[Key, float]:
    keys = [(name, one) for name, info in infos.items() for one in info.get("passes", [])]
    return {key: 1000 * value for key, value in interleave(team.run, keys, pace).items()}


def _without(contenders: dict[str, list[str]], left_out: str, kinds: list[str]) -> dict[str, list[str]]:
    names = left_out.split(",")
    return {kind: [n for n in contenders[kind] if n not in names] for kind in kinds if kind in contenders}


def _with_ceilings(rows: list[dict], measured: dict[str, float], isa: str) -> list[dict]:
    """Gop/s of each contender, and the ceiling of the widths that a row of jax_apt multiplies."""
    for row in rows:
        if "operations" in row:
            row["gops"] = {n: row["operations"] / ms / 1e6 for n, ms in row["ms"].items()}
            row["ceilings"] = {
                n: ceilings.bounds(measured, isa, widths) for n, widths in row.get("widths", {}).items()
            }
    return rows


def _save(benchmark: str, document: dict, args: argparse.Namespace) -> None:
    isa = None if args.avx2 else os.environ.get("JAX_APT_ISA")
    parts = [benchmark, isa, args.nonnegative and "nonnegative"]
    parts += [args.allocator, args.threads != 2 and f"{args.threads}-threads"]
    if not args.merge:
        parts += [args.only and "only-" + "".join(c if c.isalnum() else "-" for c in args.only)]
    name = "@".join(str(part) for part in parts if part)
    if args.quick and args.out is None:
        return
    folder = pathlib.Path(args.out) if args.out else results.FOLDER / machine.cpu_key(args.avx2)
    if args.merge:
        document = results.merged(name, document, folder)
    path = results.save(name, document, folder)
    print(f"{path} ({document['seconds']} s)", file=sys.stderr)


def _line(row: dict) -> str:
    times = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
    return f"{row['group']:12} {row['name']:20} {row['pass']:8} ms: {times}"
