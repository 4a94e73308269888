"""What a user chooses: the method's constants and the rules that pick layers and widths.

Source of every default: Zhang et al., arXiv 1911.00361, and the published code that implements it.
"""

import math
import numbers
import re
from dataclasses import dataclass
from typing import Literal

MIN_BITS, MAX_BITS = 2, 24

Backend = Literal["auto", "native", "xla", "emulate"]
BACKENDS: tuple[str, ...] = ("auto", "native", "xla", "emulate")
Recompute = Literal["nothing", "elementwise", "short_products", "products"]
RECOMPUTE: tuple[str, ...] = ("nothing", "elementwise", "short_products", "products")
MODES: tuple[str, ...] = ("grow", "restart")
ROUNDINGS: tuple[str, ...] = ("nearest", "stochastic")
GEMMS: tuple[str, ...] = ("fwd", "dx", "dw")
MEASURES: tuple[str, ...] = ("mean_magnitude", "elementwise", "resolution")


def check_bits(bits) -> None:
    if not _is_int(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an int in {MIN_BITS}..{MAX_BITS}, got {bits!r}")


def check_backend(backend) -> None:
    _check_choice("backend", backend, BACKENDS)


def check_measure(measure) -> None:
    _check_choice("measure", measure, MEASURES)


def check_recompute(recompute) -> None:
    _check_choice("recompute", recompute, RECOMPUTE)


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_range(name, value, low, high):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        limits = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a finite number {limits}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Constants of Adaptive Precision Training; the defaults are the published ones.

    Attributes:
      alpha: weight of the newest exponent in the moving average of the range.
      beta: numerator of the update interval.
      gamma: steps subtracted from the update interval.
      delta: weight of the squared quantization error in the update interval.
      threshold: largest quantization error that does not widen a tensor.
      mode: "grow": a width never falls; "restart": each update searches from the narrowest width.
      measure: error measure, one of "mean_magnitude" (the method's), "elementwise", "resolution".
      steps_per_epoch: training steps per epoch; the longest update interval.
      initial_fraction: part of the first epoch in which every step is an update.

    Raises:
      ValueError: a constant is outside its range; the message names it.
    """

    alpha: float = 0.04
    beta: float = 0.1
    gamma: float = 2.0
    delta: float = 100.0
    threshold: float = 0.03
    mode: Literal["grow", "restart"] = "grow"
    measure: Literal["mean_magnitude", "elementwise", "resolution"] = "mean_magnitude"
    steps_per_epoch: int = 1000
    initial_fraction: float = 0.1

    def __post_init__(self):
        _check_choice("mode", self.mode, MODES)
        check_measure(self.measure)
        _check_range("alpha", self.alpha, 0.0, 1.0)
        _check_range("initial_fraction", self.initial_fraction, 0.0, 1.0)
        for name in ("beta", "gamma", "delta", "threshold"):
            _check_range(name, getattr(self, name), 0.0, math.inf)
        if not _is_int(self.steps_per_epoch) or self.steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be an int >= 1, got {self.steps_per_epoch!r}")
        object.__setattr__(self, "steps_per_epoch", int(self.steps_per_epoch))

    @property
    def initial_steps(self) -> int:
        """Steps at the start of training in which every step is an update."""
        return math.ceil(self.initial_fraction * self.steps_per_epoch)


@dataclass(frozen=True)
class Adaptive:
    """Candidate bit-widths of a tensor, narrowest first: `Adaptive(8, 16, 24)`.

    Raises:
      ValueError: the widths do not ascend, or one lies outside 2..24.
    """

    widths: tuple[int, ...]

    def __init__(self, *widths: int):
        if not widths:
            raise ValueError("Adaptive needs at least one bit-width, for example Adaptive(8, 16, 24)")
        for bits in widths:
            check_bits(bits)
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"bit-widths must ascend without repetition, got {widths}")
        object.__setattr__(self, "widths", tuple(int(bits) for bits in widths))


@dataclass(frozen=True)
class Rule:
    """Widths and backend of the layers that it hits; the first rule that hits a layer wins.

    Attributes:
      match: regular expression searched in the layer's name ("" matches every layer).
      acts: bit-width of activations: an int is fixed, an `Adaptive` is chosen while training.
      weights: bit-width of weights, likewise.
      grads: bit-width of activation gradients, likewise.
      backend: "auto", "native", "xla" or "emulate"; None takes that of `apt_quantize`.
      quantize: False leaves the layer in float.
      gemms: which of the layer's three products run in fixed point: "fwd" (the forward one), "dx" (the
        gradient of the activation) and "dw" (that of the weight). The others are JAX's own float32
        products of the operands as they were before quantization.
      rounding: of the activation gradients, "stochastic" (at random, unbiased; drawn per layer and step, so
        that a run repeats) or "nearest" (ties to even, as the method was published).
      primitive: name of the primitive that the layer must be, for example "conv_general_dilated"; None:
        any.
      shape: shape that the layer's weight must have, None for a dimension that may have any size, for
        example `(1, 1, None, None)`; None: any. Products of two activations have no weight.

    Raises:
      ValueError: `match` is no regular expression, a width is outside 2..24, `gemms` is empty or names
        another product, the rounding or the backend is unknown, or `quantize` is neither True nor False.
    """

    match: str = ""
    acts: int | Adaptive = 8
    weights: int | Adaptive = 8
    grads: int | Adaptive = Adaptive(8, 16, 24)
    backend: Backend | None = None
    quantize: bool = True
    gemms: tuple[str, ...] = GEMMS
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    primitive: str | None = None
    shape: tuple[int | None, ...] | None = None

    def __post_init__(self):
        try:
            re.search(self.match, "")  # compiles it, and refuses a pattern of bytes
        except (re.error, TypeError) as error:
            raise ValueError(f"Rule match {self.match!r} is no regular expression: {error}") from None
        for widths in (self.acts, self.weights, self.grads):
            candidates(widths)
        if self.backend is not None:
            check_backend(self.backend)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        if isinstance(self.gemms, str) or not self.gemms or not set(self.gemms) <= set(GEMMS):
            raise ValueError(
                f"gemms must be a tuple of {', '.join(GEMMS)}, at least one; got {self.gemms!r} "
                "(quantize=False leaves all three in float)"
            )
        if not isinstance(self.quantize, bool):
            raise ValueError(f"quantize must be True or False, got {self.quantize!r}")

    def hits(self, name: str, primitive: str, weight_shape: tuple[int, ...] | None) -> bool:
        """Whether the rule is for a layer of this name, primitive and shape of weight."""
        return (
            re.search(self.match, name) is not None
            and self.primitive in (None, primitive)
            and (self.shape is None or _fits(self.shape, weight_shape))
        )

    def __str__(self) -> str:
        """What it hits, as the report names it."""
        conditions = {"primitive": self.primitive, "shape": self.shape}
        return " ".join([self.match, *(f"{k}={v}" for k, v in conditions.items() if v)]).strip()


def _fits(pattern: tuple[int | None, ...], shape: tuple[int, ...] | None) -> bool:
    return (
        shape is not None
        and len(pattern) == len(shape)
        and all(p is None or p == n for p, n in zip(pattern, shape, strict=True))
    )


def candidates(widths: int | Adaptive) -> tuple[int, ...]:
    """The candidate bit-widths of a rule's entry, narrowest first."""
    if isinstance(widths, Adaptive):
        return widths.widths
    check_bits(widths)
    return (int(widths),)
