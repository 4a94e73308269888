"""float32 against fixed point over paired seeds, resumable run by run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jax_apt.zoo.precisions import PRECISIONS, Settings
from jax_apt.zoo.runs import Runs
from jax_apt.zoo.trainer import Trainer

Results = dict[str, list[dict[str, Any]]]  # precision -> one result of `Trainer.run` per seed


def compare_network(
    network: str,
    settings: Settings,
    seeds: int,
    runs: Runs,
    progress: Callable[[str, int], None],
    precisions: Sequence[str] = PRECISIONS,
) -> dict[str, Any]:
    """Trains one network at each precision with every seed and compares the scores.

    Args:
      network: name in `NETWORKS`.
      settings: what the runs share.
      seeds: how many; seed k gives all precisions the same initial values, data and batches.
      runs: finished runs are read from here and new ones kept here.
      progress: called with (description, steps just finished).
      precisions: names in `ALL_PRECISIONS`, "float32" and "apt" among them.

    Returns:
      The network's entry in the results; scores and differences in points.
    """
    trainer = Trainer(network, settings)
    results: Results = {precision: [] for precision in precisions}
    reused = 0
    for seed in range(seeds):
        for precision in precisions:
            which = {"network": network, "seed": seed, "precision": precision}
            label = f"{network} seed {seed} {precision}"
            progress(label, 0)
            result = runs.load(**which)
            if result is None:
                result = trainer.run(seed, precision, lambda label=label: progress(label, 1))
                runs.save(result, **which)
            else:
                reused += 1
                progress(label, settings.epochs * trainer.steps_per_epoch)
            results[precision].append(result)
    progress(f"{network} step times", 0)
    times = _step_times(trainer, network, runs, precisions)
    entry = _entry(network, settings, results) | {"metric": trainer.task.metric}
    return entry | {"step_ms": times, "reused_runs": reused}


def _step_times(trainer: Trainer, network: str, runs: Runs, precisions: Sequence[str]) -> dict[str, Any]:
    which = {"network": network, "measurement": "step-times", "precisions": "+".join(precisions)}
    times = runs.load(**which)
    if times is None:
        times = trainer.step_times(precisions)
        runs.save(times, **which)
    return times


def _entry(network: str, settings: Settings, results: Results) -> dict[str, Any]:
    scores = {p: [result["score"] for result in found] for p, found in results.items()}
    return {
        "name": network,
        "task": settings.task,
        "float32": float(np.mean(scores["float32"])),
        "apt": float(np.mean(scores["apt"])),
        "difference": paired_difference(scores["float32"], scores["apt"]),
        "bits": merge_reports([result["report"] for result in results["apt"]]),
        "left_in_float": results["apt"][0]["report"]["left_in_float"],
        "seeds": scores,
        "curves": {p: _curves(found) for p, found in results.items()},
        "history": results["apt"][0]["history"],
        "others": {p: _other(scores, p, results[p]) for p in results if p not in PRECISIONS},
    }


def _other(scores: dict[str, list[float]], precision: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A precision beside float32 and APT, compared with float32."""
    return {
        "mean": float(np.mean(scores[precision])),
        "difference": paired_difference(scores["float32"], scores[precision]),
        "bits": merge_reports([result["report"] for result in results]),
    }


def overall(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per precision, the mean over networks of the mean difference from float32, and its interval."""
    differences = {"apt": [entry["difference"]["mean"] for entry in entries]}
    for name in entries[0]["others"]:
        differences[name] = [entry["others"][name]["difference"]["mean"] for entry in entries]
    return {name: paired_difference([0.0] * len(each), each) for name, each in differences.items()}


def gradient_shares(bits: dict[str, Any]) -> dict[str, float]:
    """Share of a training that the gradients spend at each width, each layer counting alike."""
    tensors = [layer["tensors"]["dy"] for layer in bits.values()]
    widths = sorted({width for t in tensors for width in t["share"]}, key=int)
    return {w: float(np.mean([t["share"].get(w, 0.0) for t in tensors])) for w in widths}


def gradient_interval(bits: dict[str, Any]) -> float:
    """Training steps per update of a gradient, mean over the layers."""
    return float(np.mean([layer["tensors"]["dy"]["mean_interval"] for layer in bits.values()]))


def _curves(results: list[dict[str, Any]]) -> dict[str, list[list[float | None]]]:
    """By seed and epoch."""
    return {curve: [result[curve] for result in results] for curve in ("scores", "losses")}


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
