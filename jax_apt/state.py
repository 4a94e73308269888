"""The precision state: one pytree of arrays for all layers, and the taps that bring statistics back.

Struct of arrays inside, looked up by layer name outside. A tap is a float zero passed in beside the state;
its cotangent is a vector of *additive* statistics, so a layer used twice, a scan over time, microbatches
and several devices need no special case, and a layer that the loss did not use keeps its state:

    [uses measured, non-finite values, sum|x|, error sum per width, one-hot of the exponent per width]

The largest magnitude of several uses is the highest exponent that any of them marked.
"""

import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_apt.config import GEMMS, Config
from jax_apt.fixed_point import MAX_EXPONENT, MIN_EXPONENT
from jax_apt.qpa import Measurement, TensorPrecision, adjust

TENSORS = ("x", "w", "dy")  # activation, weight (or second activation), output gradient
OPERANDS = {"fwd": ("x", "w"), "dx": ("dy", "w"), "dw": ("x", "dy")}  # what each product takes

_EXPONENTS = MAX_EXPONENT - MIN_EXPONENT + 1


class Layer(NamedTuple):
    """What is fixed of a quantized layer when the function is traced."""

    name: str
    primitive: str  # "dot_general" or "conv_general_dilated"
    stack: tuple[int, ...]  # lengths of the scans over layers around it: one precision per slice
    weight_shape: tuple[int, ...] | None  # None: a product of two activations
    widths: tuple[tuple[int, ...], ...]  # candidate bit-widths of x, w, dy
    backend: str  # "native", "xla" or "emulate"
    reason: str  # why this backend
    rule: str | None  # conditions of the rule that hit it; None: the default
    gemms: tuple[str, ...] = GEMMS  # which of its products are quantized
    rounding: str = "nearest"  # of dy

    def is_quantized(self, tensor: str) -> bool:
        """Whether some quantized product of the layer takes the tensor "x", "w" or "dy"."""
        return any(tensor in OPERANDS[gemm] for gemm in self.gemms)


class LeftInFloat(NamedTuple):
    """A product that is not quantized."""

    name: str
    primitive: str
    reason: str


class Replaced(NamedTuple):
    """A float32 operation that XLA runs slowly here, with an exact custom call in its place."""

    name: str
    primitive: str
    by: str


@dataclass(frozen=True)
class Layout:
    """The static half of a state: what its arrays mean."""

    layers: tuple[Layer, ...]
    left_in_float: tuple[LeftInFloat, ...] = ()
    unused_rules: tuple[str, ...] = ()
    replaced: tuple[Replaced, ...] = ()

    def rows(self) -> Iterator[tuple[Layer, slice]]:
        """Each layer with its rows in the state's arrays: `stack` times three tensors."""
        start = 0
        for layer in self.layers:
            stop = start + 3 * math.prod(layer.stack)
            yield layer, slice(start, stop)
            start = stop

    def padded_widths(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Per layer, candidate widths of x, w, dy, the last one repeated to one length for all."""
        most = max((len(w) for layer in self.layers for w in layer.widths), default=1)
        return {
            layer.name: tuple(w + w[-1:] * (most - len(w)) for w in layer.widths) for layer in self.layers
        }

    def candidates(self) -> np.ndarray:
        """int32 (tensors, W): the padded candidate widths, row by row as in the state's arrays."""
        padded = self.padded_widths()
        table = [padded[x.name] for x in self.layers for _ in range(math.prod(x.stack))]
        return np.array(table, np.int32).reshape(3 * len(table), -1 if table else 1)

    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AptState:
    """Precision of every tensor of every quantized layer; a pytree of arrays.

    `state["Conv_0"]` gives the layer's `TensorPrecision` by tensor name: "x", "w", "dy".
    """

    step: Array  # int32, shape (); training steps taken
    precision: TensorPrecision  # arrays (tensors, ...), rows as in `layout.rows()`
    taps: dict[str, Array] | None = None  # float32 stack + (3, S) per layer; None outside training
    layout: Layout = field(default=Layout(()), metadata={"static": True})

    def __getitem__(self, name: str) -> dict[str, TensorPrecision]:
        for layer, rows in self.layout.rows():
            if layer.name == name:
                return {t: _rows_of(self.precision, layer, rows, i) for i, t in enumerate(TENSORS)}
        raise KeyError(f"no quantized layer {name!r}; there are {', '.join(self.layout.names())}")


def _rows_of(precision: TensorPrecision, layer: Layer, rows: slice, tensor: int) -> TensorPrecision:
    def select(x):
        return x[rows].reshape(*layer.stack, 3, *x.shape[1:]).take(tensor, axis=len(layer.stack))

    return TensorPrecision(*map(select, precision))


def initial_state(layout: Layout) -> AptState:
    """State before the first step: narrowest widths, nothing measured."""
    candidates = layout.candidates()
    count, most = candidates.shape
    zeros = np.zeros(count, np.int32)
    return AptState(
        step=jnp.zeros((), jnp.int32),
        precision=TensorPrecision(
            bits=jnp.asarray(candidates[:, 0]),
            exponent=jnp.asarray(zeros),
            range_average=jnp.asarray(zeros, jnp.float32),
            next_update=jnp.asarray(zeros),
            updates=jnp.asarray(zeros),
            nonfinite=jnp.asarray(zeros),
            steps_at_width=jnp.zeros((count, most), jnp.int32),
        ),
        layout=layout,
    )


# Formats: what a quantized product reads


def formats(state: AptState) -> dict[str, Array]:
    """Per layer, int32 `stack + (3, 4)`: bits, exponent, whether to measure and step, of x, w and dy.

    With taps (training) a tensor is measured when its update is due; without them only if it never was.
    """
    p = state.precision
    is_due = p.updates == 0
    if state.taps is not None:
        is_due = is_due | (p.next_update <= state.step)
    step = jnp.broadcast_to(state.step, p.bits.shape)
    table = jnp.stack([p.bits, p.exponent, is_due.astype(jnp.int32), step], axis=-1)
    return {layer.name: table[rows].reshape(*layer.stack, 3, 4) for layer, rows in state.layout.rows()}


# Taps: what a quantized product reports


@dataclass
class Watch:
    """Which states a loss was traced with; keeps no tracer of the loss."""

    outer_step: Any  # of the state that `value_and_grad` was called with
    used_taps: bool = False
    used_outer: bool = False

    def see(self, state: AptState) -> None:
        self.used_taps = self.used_taps or state.taps is not None
        self.used_outer = self.used_outer or (state.taps is None and state.step is self.outer_step)


WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def zero_taps(layout: Layout) -> dict[str, Array]:
    """Taps of every layer: float32 zeros, `stack + (3, S)`."""
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in _tap_shapes(layout).items()}


def _tap_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    size = tap_size(layout.candidates().shape[1])
    return {layer.name: (*layer.stack, 3, size) for layer in layout.layers}


def tap_size(widths: int) -> int:
    return 3 + widths + widths * _EXPONENTS


def to_tap(measured: Measurement) -> Array:
    """Additive float32 vector of one measurement; zero where nothing was measured."""
    marks = _exponents_like(measured.exponents) == measured.exponents[:, None]
    marks = marks & (measured.count > 0) & (measured.abs_sum > 0)
    head = jnp.stack([measured.count, measured.nonfinite, measured.abs_sum])
    return jnp.concatenate([head, measured.error_sums, marks.astype(jnp.float32).reshape(-1)])


def from_tap(tap: Array, widths: int) -> Measurement:
    """The measurement that a sum of taps (..., S) stands for."""
    marks = tap[..., 3 + widths :].reshape(*tap.shape[:-1], widths, _EXPONENTS)
    exponents = _exponents_like(marks[..., 0])
    highest = jnp.max(jnp.where(marks > 0, exponents, MIN_EXPONENT), axis=-1)
    return Measurement(tap[..., 0], tap[..., 1], tap[..., 2], tap[..., 3 : 3 + widths], highest)


def _exponents_like(x: Array) -> Array:
    """Every exponent along a new last axis: int32, shape of `x` + (253,)."""
    return lax.broadcasted_iota(jnp.int32, (*x.shape, _EXPONENTS), x.ndim) + MIN_EXPONENT


def check_state(state: Any, call: str) -> None:
    """Raises TypeError if `state` is no AptState; `call` shows how the function is called."""
    if not isinstance(state, AptState):
        raise TypeError(
            f"{call}: the state must be an AptState, as init() makes it; got {type(state).__name__}"
        )


def check_taps(state: AptState, taps: Any) -> None:
    """Raises TypeError or ValueError if these are not the taps of the state; names the difference."""
    if not isinstance(taps, dict):
        raise TypeError(
            f"taps must be a dictionary by layer name, as taps() makes it; got {type(taps).__name__}"
        )
    if set(taps) != set(state.layout.names()):
        difference = sorted(set(taps) ^ set(state.layout.names()))
        raise ValueError(f"taps and state have different layers: {', '.join(map(str, difference))}")
    for name, shape in _tap_shapes(state.layout).items():
        if np.shape(taps[name]) != shape:
            raise ValueError(
                f"taps of layer {name} must have shape {shape}, got {np.shape(taps[name])}; "
                "statistics of microbatches or devices are summed, not stacked"
            )


def update(state: AptState, taps: dict[str, Array], config: Config) -> AptState:
    """The state after a training step, from the cotangents of its taps. Pure, vectorized over tensors.

    Args:
      state: the state that the step was run with.
      taps: gradient of the loss with respect to the taps; sums over microbatches or devices are fine.
      config: constants of the method.

    Raises:
      TypeError: `state` is no AptState, or the taps are no dictionary.
      ValueError: the taps are not those of the state's layers; the message names the difference.
    """
    check_state(state, "update(state, taps)")
    check_taps(state, taps)
    candidates = jnp.asarray(state.layout.candidates())
    if not state.layout.layers:
        return replace(state, step=state.step + 1, taps=None)
    size = tap_size(candidates.shape[1])
    flat = jnp.concatenate([taps[name].reshape(-1, size) for name in state.layout.names()])
    measured = from_tap(flat, candidates.shape[1])
    precision = adjust(state.precision, measured, candidates, state.step, config)
    return replace(state, step=state.step + 1, precision=precision, taps=None)


def check_same_layers(state: AptState, layout: Layout) -> None:
    """Raises ValueError if the state cannot serve a function with these layers; names every difference."""
    known = {layer.name: layer for layer in state.layout.layers}
    differences = []
    for layer in layout.layers:
        other = known.get(layer.name)
        if other is None:
            differences.append(f"{layer.name}: not in the state")
            continue
        for what in ("primitive", "stack", "weight_shape", "widths"):
            if getattr(layer, what) != getattr(other, what):
                differences.append(
                    f"{layer.name}: {what} is {getattr(layer, what)} in the function "
                    f"and {getattr(other, what)} in the state"
                )
    if differences:
        raise ValueError(
            "the precision state belongs to another function; make one with init(). " + "; ".join(differences)
        )
