"""What runs where and with how many bits: each layer once, what was left in float or replaced."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_apt.config import GEMMS
from jax_apt.qpa import TensorPrecision
from jax_apt.state import TENSORS, AptState, Layer, Layout


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a layer; lists where a scan over layers gives each slice its own precision."""

    bits: int | list[int]
    exponent: int | list[int]
    share: dict[int, float]  # width -> share of the training steps spent at it
    mean_interval: float  # training steps per update; 0 before the first
    updates: int
    nonfinite: int  # NaN and infinite values seen


@dataclass(frozen=True)
class Report:
    """Readable with `print`, as data with `to_dict`."""

    steps: int
    layout: Layout
    tensors: dict[str, dict[str, TensorReport]]  # layer name -> tensor name ->

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON-serializable dictionary."""
        return {
            "steps": self.steps,
            "layers": [
                {
                    "name": layer.name,
                    "primitive": layer.primitive,
                    "backend": layer.backend,
                    "reason": layer.reason,
                    "rule": layer.rule,
                    "gemms": list(layer.gemms),
                    "rounding": layer.rounding,
                    "tensors": {t: _as_json(r) for t, r in self.tensors[layer.name].items()},
                }
                for layer in self.layout.layers
            ],
            "left_in_float": [left._asdict() for left in self.layout.left_in_float],
            "unused_rules": list(self.layout.unused_rules),
            "replaced": [replaced._asdict() for replaced in self.layout.replaced],
        }

    def __str__(self) -> str:
        rows = [("layer", "product", "backend", "rule", *(f"{t} bits" for t in TENSORS), "dy interval")]
        rows += [self._row(layer) for layer in self.layout.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        reasons = {f"{x.backend}: {x.reason}": None for x in self.layout.layers}
        lines += [f"backend {reason}" for reason in reasons]
        lines += [
            f"{x.name}: of its products only {', '.join(x.gemms)} in fixed point"
            for x in self.layout.layers
            if x.gemms != GEMMS
        ]
        lines += [
            f"{x.name}: gradients rounded to nearest" for x in self.layout.layers if x.rounding == "nearest"
        ]
        lines += [f"left in float: {x.name} ({x.primitive}): {x.reason}" for x in self.layout.left_in_float]
        lines += [f"replaced: {x.name} ({x.primitive}): {x.by}" for x in self.layout.replaced]
        lines += [f"rule {rule!r} hit no layer" for rule in self.layout.unused_rules]
        lines += [
            f"{name}: not measured in {self.steps} training step(s): the loss did not use it"
            for name, tensors in self.tensors.items()
            if self.steps and not any(r.updates or r.nonfinite for r in tensors.values())
        ]
        lines += [
            f"{name}: {r.nonfinite} NaN or infinite values in {t}"
            for name, tensors in self.tensors.items()
            for t, r in tensors.items()
            if r.nonfinite
        ]
        return "\n".join([*lines, f"after {self.steps} training steps"])

    def _row(self, layer: Layer) -> tuple[str, ...]:
        tensors = self.tensors[layer.name]
        bits = [_brief(tensors[t].bits) if layer.is_quantized(t) else "float" for t in TENSORS]
        rule = "default" if layer.rule is None else repr(layer.rule)
        interval = f"{tensors['dy'].mean_interval:.1f}"
        return (layer.name, layer.primitive, layer.backend, rule, *bits, interval)


def make_report(state: AptState) -> Report:
    """The report of a precision state."""
    steps = int(state.step)
    tensors = {}
    for layer in state.layout.layers:
        precisions = state[layer.name]
        tensors[layer.name] = {
            t: _tensor_report(precisions[t], layer.widths[i], steps) for i, t in enumerate(TENSORS)
        }
    return Report(steps, state.layout, tensors)


def _tensor_report(p: TensorPrecision, widths: tuple[int, ...], steps: int) -> TensorReport:
    at_width = np.asarray(p.steps_at_width).reshape(-1, p.steps_at_width.shape[-1]).sum(0)
    updates = np.asarray(p.updates)
    return TensorReport(
        bits=np.asarray(p.bits).tolist(),
        exponent=np.asarray(p.exponent).tolist(),
        share={n: float(at_width[i] / max(at_width.sum(), 1)) for i, n in enumerate(widths)},
        mean_interval=float(steps * updates.size / updates.sum()) if updates.sum() else 0.0,
        updates=int(updates.sum()),
        nonfinite=int(np.asarray(p.nonfinite).sum()),
    )


def _as_json(r: TensorReport) -> dict[str, Any]:
    share = {str(n): value for n, value in r.share.items()}
    return {
        "bits": r.bits,
        "exponent": r.exponent,
        "share": share,
        "mean_interval": r.mean_interval,
        "updates": r.updates,
        "nonfinite": r.nonfinite,
    }


def _brief(bits: int | list) -> str:
    if isinstance(bits, int):
        return str(bits)
    values = sorted(set(np.ravel(bits).tolist()))
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
