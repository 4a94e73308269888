"""What `freeze` makes: integer weights with exponents in the parameters' structure, and operands' formats.

parameter that only products use, all in one format    `Fixed`: codes, bits, exponent
parameter with several formats, or with other uses     `SharedWeight`: a `Fixed` per format, and its value
any other parameter                                    as it was
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jax_apt.fixed_point import Fixed


class SharedWeight(NamedTuple):
    """A parameter that products take in several formats, or that something else uses too."""

    numbers: tuple[Fixed, ...]  # one per format
    value: Array | None  # None: products alone use it


class FrozenLayer(NamedTuple):
    """What is fixed of a layer's forward product."""

    name: str
    stack: tuple[int, ...]  # lengths of the scans over layers around it
    widths: tuple[tuple[int, ...], ...]  # of x and w, those in use, ascending; and the candidates of dy
    has_weight: bool  # whether its forward product takes a quantized weight
    is_settled: bool  # whether x and w were measured; else by their own range at each call


class FrozenWeight(NamedTuple):
    """What became of one parameter."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    layers: tuple[tuple[str, int], ...]  # that take its codes, each with the number of its format
    in_float: tuple[str, ...]  # uses of its float value
    requantized: tuple[tuple[str, str], ...] = ()  # layers that quantize it at each call, and why

    @property
    def is_frozen(self) -> bool:
        return bool(self.layers)


@dataclass(frozen=True)
class FrozenLayout:
    """The static half of a frozen model."""

    layers: tuple[FrozenLayer, ...]
    weights: tuple[FrozenWeight, ...]  # one per parameter that is an array, in order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """A frozen model: a pytree of arrays, for `apply_frozen`."""

    variables: Any  # structure of the parameters; leaves `Fixed`, `SharedWeight` or arrays
    formats: dict[str, Array]  # layer -> int32 stack + (2, 4): bits, exponent, never measured, 0; of x and w
    layout: FrozenLayout = field(metadata={"static": True})

    def report(self) -> "FrozenReport":
        """What became of every parameter, and the bytes that it takes."""
        leaves = [leaf for leaf in frozen_leaves(self.variables)[0] if is_array(leaf) or is_frozen(leaf)]
        rows = [(weight, _bytes(leaf)) for weight, leaf in zip(self.layout.weights, leaves, strict=True)]
        return FrozenReport(tuple(rows), self.layout.layers)


def is_frozen(leaf) -> bool:
    return isinstance(leaf, (Fixed, SharedWeight))


def is_array(leaf) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def leaf_name(path) -> str:
    """A parameter's path as text: "params/Dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "variables"


def frozen_leaves(variables: Any) -> tuple[list, Any]:
    """Parameters in order, a frozen one as a whole, and the tree."""
    return jax.tree.flatten(variables, is_leaf=is_frozen)


def _bytes(leaf) -> int:
    return sum(np.dtype(x.dtype).itemsize * int(np.prod(x.shape)) for x in jax.tree.leaves(leaf))


@dataclass(frozen=True)
class FrozenReport:
    """Readable with `print`, as data with `to_dict`."""

    rows: tuple[tuple[FrozenWeight, int], ...]  # every parameter and its bytes
    layers: tuple[FrozenLayer, ...]

    @property
    def bytes(self) -> int:
        """Of all parameters as they are now."""
        return sum(size for _, size in self.rows)

    @property
    def bytes_before(self) -> int:
        return sum(_bytes_before(weight) for weight, _ in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON-serializable dictionary."""
        return {
            "bytes": self.bytes,
            "bytes_before": self.bytes_before,
            "weights": [
                weight._asdict() | {"bytes": size, "bytes_before": _bytes_before(weight)}
                for weight, size in self.rows
            ],
            "requantized": dict(self._requantized()),
            "not_settled": [layer.name for layer in self.layers if not layer.is_settled],
        }

    def _requantized(self) -> list[tuple[str, str]]:
        """Layers whose weight is quantized at each call, and why."""
        frozen = {name for weight, _ in self.rows for name, _ in weight.layers}
        why = {name: reason for weight, _ in self.rows for name, reason in weight.requantized}
        names = [layer.name for layer in self.layers if layer.has_weight and layer.name not in frozen]
        return [(name, why.get(name, "it is computed from parameters, not one of them")) for name in names]

    def __str__(self) -> str:
        frozen = [(weight, size) for weight, size in self.rows if weight.is_frozen]
        lines = [
            f"{weight.path}: integer, {size} bytes for {_bytes_before(weight)}: {_names(weight.layers)}"
            for weight, size in frozen
        ]
        lines += [f"{w.path}: in float too: {'; '.join(w.in_float)}" for w, _ in frozen if w.in_float]
        lines += [
            f"{w.path}: stays float: {'; '.join(w.in_float) or 'not used'}"
            for w, _ in self.rows
            if not w.is_frozen
        ]
        lines += [f"{name}: its weight is quantized at each call: {why}" for name, why in self._requantized()]
        lines += [
            f"{layer.name}: a tensor was never measured, its own range is taken at each call"
            for layer in self.layers
            if not layer.is_settled
        ]
        return "\n".join([*lines, f"{self.bytes} bytes for {self.bytes_before}"])


def _bytes_before(weight: FrozenWeight) -> int:
    return np.dtype(weight.dtype).itemsize * int(np.prod(weight.shape))


def _names(layers: Sequence[tuple[str, int]]) -> str:
    return ", ".join(name for name, _ in layers)
