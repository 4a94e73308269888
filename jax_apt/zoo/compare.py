"""float32 against fixed point over paired seeds, resumable run by run."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from jax_apt.zoo.precisions import ALL_PRECISIONS, PRECISIONS, Settings
from jax_apt.zoo.runs import Runs, read_runs
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.trainer import Trainer

Results = dict[str, dict[int, dict[str, Any]]]  # precision, seed: one result of `Trainer.run`


class Job(NamedTuple):
    """The networks of one task, and where their finished runs are."""

    settings: Settings
    networks: Sequence[str]
    precisions: Sequence[str]  # names in `ALL_PRECISIONS`, "float32" and "apt" among them
    runs: Runs


class Run(NamedTuple):
    """One training."""

    job: Job
    network: str
    seed: int
    precision: str


def in_order(jobs: Sequence[Job], seeds: int) -> Iterator[Run]:
    """A pair of every network, then the next pair of every network; the other precisions after those.

    So whatever has finished when a comparison is interrupted says something about all networks.
    """
    others = list(dict.fromkeys(p for job in jobs for p in job.precisions if p not in PRECISIONS))
    for group in (PRECISIONS, *([other] for other in others)):
        for seed in range(seeds):
            for job in jobs:
                for network in job.networks:
                    yield from (Run(job, network, seed, p) for p in group if p in job.precisions)


def compare(jobs: Sequence[Job], seeds: int, progress: Callable[[str, int], None]) -> list[dict[str, Any]]:
    """Trains each network at each precision with every seed, where no run is kept, and compares the scores.

    Args:
      jobs: what is compared.
      seeds: how many; seed k gives all precisions the same initial values, data and batches.
      progress: called with (description, steps just finished).

    Returns:
      The networks' entries in the results; scores and differences in points.
    """
    trainers = {(job.settings.task, n): Trainer(n, job.settings) for job in jobs for n in job.networks}
    results = {key: {p: {} for p in job.precisions} for job in jobs for key in _keys(job)}
    reused = dict.fromkeys(results, 0)
    for run in in_order(jobs, seeds):
        key = run.job.settings.task, run.network
        result, is_kept = _train_or_load(trainers[key], run, progress)
        results[key][run.precision][run.seed] = result
        reused[key] += is_kept
    entries = []
    for job in jobs:
        for key in _keys(job):
            trainer, network = trainers[key], key[1]
            progress(f"{network} step times", 0)
            times = _step_times(trainer, network, job.runs, job.precisions)
            entry = make_entry(network, job.settings.task, results[key], times)
            entries.append(entry | {"reused_runs": reused[key]})
    return entries


def _keys(job: Job) -> list[tuple[str, str]]:
    return [(job.settings.task, network) for network in job.networks]


def _train_or_load(trainer: Trainer, run: Run, progress: Callable) -> tuple[dict[str, Any], bool]:
    """(the result, whether it was kept from before)."""
    which = {"network": run.network, "seed": run.seed, "precision": run.precision}
    label = f"{run.network} seed {run.seed} {run.precision}"
    progress(label, 0)
    result = run.job.runs.load(**which)
    if result is not None:
        progress(label, result["steps"])
        return result, True
    result = trainer.run(run.seed, run.precision, lambda: progress(label, 1))
    run.job.runs.save(result, **which)
    return result, False


def _step_times(trainer: Trainer, network: str, runs: Runs, precisions: Sequence[str]) -> dict[str, Any]:
    which = {"network": network, "measurement": "step-times", "precisions": "+".join(precisions)}
    times = runs.load(**which)
    if times is None:
        times = trainer.step_times(precisions)
        runs.save(times, **which)
    return times


def finished_entries(folder: pathlib.Path, across_versions: bool = False) -> list[dict[str, Any]]:
    """Entries of the networks with a finished pair in a folder of runs, whatever code has made them.

    Args:
      folder: with one file per run.
      across_versions: whether runs of one network from several versions and machines count together if their
        settings are the same. Only whoever knows that networks and tasks are the same can say so; otherwise
        those with the most runs count. Of two runs of one seed the last by file name counts.
    """
    by_origin: dict[tuple[str, str], dict[str, list]] = {}
    for key, result in read_runs(folder):
        network = key["common"]["settings"]["task"], key["network"]
        origin = key["common"]["settings"] if across_versions else key["common"]
        mixed = by_origin.setdefault(network, {}).setdefault(json.dumps(origin, sort_keys=True), [])
        mixed.append((key, result))
    entries = []
    for task, network in sorted(by_origin, key=_place):
        found = max(by_origin[task, network].values(), key=len)
        results: Results = {}
        times = {}
        for key, result in found:
            if "precision" in key:
                results.setdefault(key["precision"], {})[key["seed"]] = result
            else:
                times |= result
        if results.get("float32", {}).keys() & results.get("apt", {}).keys():
            origins = [key["common"] for key, _ in found]
            entries.append(make_entry(network, task, results, times) | {"origins": origins})
    return entries


def _place(network: tuple[str, str]) -> tuple[int, int]:
    """Order of tasks and of their networks."""
    task, name = network
    return list(TASKS).index(task), TASKS[task].networks.index(name)


def make_entry(network: str, task: str, results: Results, times: dict[str, Any]) -> dict[str, Any]:
    """A network's entry; each precision is compared with float32 over the seeds that both have.

    Args:
      times: of `Trainer.step_times`; {} where they were not measured.
    """
    pairs = {p: sorted(results["float32"].keys() & found.keys()) for p, found in results.items()}
    seeds = pairs["apt"]
    others = {p: _other(results, p, pairs[p]) for p in ALL_PRECISIONS if pairs.get(p) and p not in PRECISIONS}
    scores = {p: [results[p][k]["score"] for k in pairs[p]] for p in results}
    difference = paired_difference(*([results[p][k]["score"] for k in seeds] for p in PRECISIONS))
    adaptive = [results["apt"][k] for k in seeds]
    return {
        "name": network,
        "task": task,
        "metric": TASKS[task].metric,
        "float32": float(np.mean([results["float32"][k]["score"] for k in seeds])),
        "apt": float(np.mean([result["score"] for result in adaptive])),
        "difference": difference,
        "float32_spread": float(np.ptp(scores["float32"])),
        "bits": merge_reports([result["report"] for result in adaptive]),
        "left_in_float": adaptive[0]["report"]["left_in_float"],
        "seeds": scores,
        "curves": {p: _curves([results[p][k] for k in pairs[p]]) for p in results if pairs[p]},
        "steps": adaptive[0]["steps"],
        "history": adaptive[0]["history"],
        "others": others,
        "step_ms": times,
    }


def _other(results: Results, precision: str, seeds: list[int]) -> dict[str, Any]:
    """A precision beside float32 and APT, compared with float32."""
    found = [results[precision][seed] for seed in seeds]
    scores = [result["score"] for result in found]
    return {
        "mean": float(np.mean(scores)),
        "difference": paired_difference([results["float32"][seed]["score"] for seed in seeds], scores),
        "bits": merge_reports([result["report"] for result in found]),
    }


def overall(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per precision, the mean over networks of the mean difference from float32, and its interval."""
    differences = {"apt": [entry["difference"]["mean"] for entry in entries]}
    for name in (p for p in ALL_PRECISIONS if any(p in entry["others"] for entry in entries)):
        have = [entry["others"][name] for entry in entries if name in entry["others"]]
        differences[name] = [other["difference"]["mean"] for other in have]
    return {
        name: paired_difference([0.0] * len(each), each) | {"networks": len(each)}
        for name, each in differences.items()
    }


def gradient_shares(bits: dict[str, Any]) -> dict[str, float]:
    """Share of a training that the gradients spend at each width, each layer counting alike."""
    tensors = [layer["tensors"]["dy"] for layer in bits.values()]
    widths = sorted({width for t in tensors for width in t["share"]}, key=int)
    return {w: float(np.mean([t["share"].get(w, 0.0) for t in tensors])) for w in widths}


def gradient_interval(bits: dict[str, Any]) -> float:
    """Training steps per update of a gradient, mean over the layers."""
    return float(np.mean([layer["tensors"]["dy"]["mean_interval"] for layer in bits.values()]))


def _curves(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By seed and epoch."""
    curves: dict[str, Any] = {curve: [result[curve] for result in results] for curve in ("scores", "losses")}
    return curves | {"scored_epochs": results[0]["scored_epochs"]}


def paired_difference(float32: Sequence[float], apt: Sequence[float]) -> dict[str, Any]:
    """Mean of apt - float32 over the pairs and its 95 % confidence interval (Student's t).

    Returns:
      "mean", "low", "high" and the differences "each"; low and high are None for a single pair.
    """
    differences = np.subtract(apt, float32)
    mean = float(np.mean(differences))
    low = high = None
    if len(differences) > 1:
        quantile = stats.t.ppf(0.975, len(differences) - 1)
        half = float(quantile * np.std(differences, ddof=1) / np.sqrt(len(differences)))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "each": differences.tolist()}


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of steps at each width and update interval, by layer and tensor, mean over seeds."""
    return {
        layers[0]["name"]: {
            "backend": layers[0]["backend"],
            "reason": layers[0]["reason"],
            "tensors": {
                name: _merge_tensors([layer["tensors"][name] for layer in layers])
                for name in layers[0]["tensors"]
            },
        }
        for layers in zip(*(report["layers"] for report in reports), strict=True)
    }


def _merge_tensors(tensors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    widths = tensors[0]["share"]
    return {
        "share": {width: float(np.mean([t["share"][width] for t in tensors])) for width in widths},
        "mean_interval": float(np.mean([t["mean_interval"] for t in tensors])),
        "final_bits": [t["bits"] for t in tensors],
        "nonfinite": sum(t["nonfinite"] for t in tensors),
    }
