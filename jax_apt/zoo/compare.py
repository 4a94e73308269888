"""float32 against adaptive fixed point over paired seeds, resumable run by run."""

import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

import jax_apt
from jax_apt import xla_ops
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.trainer import PRECISIONS, Settings, Trainer


class Runs:
    """Finished runs on disk, one JSON file each, found again by all that they depend on."""

    def __init__(self, folder: pathlib.Path, settings: Settings):
        self.folder, self.settings = folder / "runs", settings
        self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, network: str, seed: int, precision: str) -> dict[str, Any]:
        run = {"network": network, "seed": seed, "precision": precision, "jax_apt": jax_apt.__version__}
        return run | self.settings.to_dict()

    def path(self, network: str, seed: int, precision: str) -> pathlib.Path:
        text = json.dumps(self.key(network, seed, precision), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder / f"{network}-seed{seed}-{precision}-{digest}.json"

    def load(self, network: str, seed: int, precision: str) -> dict[str, Any] | None:
        """The finished run, or None if there is none or its file is damaged."""
        try:
            record = json.loads(self.path(network, seed, precision).read_text())
            return record["result"] if record["key"] == self.key(network, seed, precision) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, network: str, seed: int, precision: str, result: dict[str, Any]) -> None:
        """Writes a run whole or not at all."""
        path = self.path(network, seed, precision)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps({"key": self.key(network, seed, precision), "result": result}))
        temporary.replace(path)


def compare_network(
    network: str, settings: Settings, seeds: int, runs: Runs, progress: Callable[[str, int], None]
) -> dict[str, Any]:
    """Trains one network at both precisions with every seed and compares the scores.

    Args:
      network: name in `NETWORKS`.
      settings: what the runs share.
      seeds: how many; seed k gives both precisions the same initial values and batches.
      runs: finished runs are read from here and new ones kept here.
      progress: called with (description, finished steps).

    Returns:
      The network's entry in the results, scores and differences in points.
    """
    trainer = Trainer(network, settings, TASKS[settings.task].load())
    results: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
    reused = 0
    for seed in range(seeds):
        for precision in PRECISIONS:
            result = runs.load(network, seed, precision)
            label = f"{network} {precision} seed {seed}"
            if result is not None:
                reused += 1
                progress(label, settings.epochs * trainer.steps_per_epoch)
            else:
                result = trainer.run(seed, precision, lambda label=label: progress(label, 1))
                runs.save(network, seed, precision, result)
            results[precision].append(result)
    return _entry(network, settings, results, reused) | {"step_seconds": trainer.step_times()}


def _entry(network, settings, results, reused) -> dict[str, Any]:
    float32 = [r["score"] for r in results["float32"]]
    quantized = [r["score"] for r in results["apt"]]
    return {
        "name": network,
        "task": settings.task,
        "float32": float(np.mean(float32)),
        "apt": float(np.mean(quantized)),
        "difference": paired_difference(float32, quantized),
        "bits": merge_reports([r["report"] for r in results["apt"]]),
        "seeds": {"float32": float32, "apt": quantized},
        "reused_runs": reused,
        "curves": {p: np.mean([r["scores"] for r in results[p]], axis=0).tolist() for p in PRECISIONS},
        "history": results["apt"][0]["history"],
    }


def paired_difference(float32: Sequence[float], quantized: Sequence[float]) -> dict[str, Any]:
    """Mean of quantized - float32 with its 95 % confidence interval (Student's t over the pairs).

    The interval is None for a single pair.
    """
    differences = np.subtract(quantized, float32)
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return {"mean": mean, "low": None, "high": None, "each": differences.tolist()}
    error = float(stats.sem(differences))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": differences.tolist()}


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per layer and tensor over the seeds: mean share of steps at each width, and mean update interval."""
    merged: dict[str, Any] = {}
    for i, layer in enumerate(reports[0]["layers"]):
        tensors = {}
        for name in layer["tensors"]:
            entries = [report["layers"][i]["tensors"][name] for report in reports]
            tensors[name] = {
                "share": {
                    width: float(np.mean([e["share"][width] for e in entries]))
                    for width in entries[0]["share"]
                },
                "mean_interval": float(np.mean([e["mean_interval"] for e in entries])),
                "final_bits": [e["bits"] for e in entries],
                "nonfinite": sum(e["nonfinite"] for e in entries),
            }
        merged[layer["name"]] = {"backend": layer["backend"], "reason": layer["reason"], "tensors": tensors}
    return merged


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": xla_ops.isa() if xla_ops.is_available() else f"none: {xla_ops.unavailable_reason()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jax_apt": jax_apt.__version__,
        "devices": [str(d.device_kind) for d in jax.devices()],
    }


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    model = names.get("model name", platform.machine())
    return f"{model} (family {names.get('cpu family', '?')}, model {names.get('model', '?')})"
