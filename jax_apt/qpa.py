"""Quantization parameter adjustment (QPA): when a tensor is looked at again, and with how many bits.

At an update of a tensor at step t:

    repeat: s from max|x| and n; Diff;  if Diff > T and n < n_max:  n += 8, R -= 8
    I1  = |R_t - R_(t-1)| = alpha * |s - R_(t-1)|        how fast the range moves
    I2  = delta * Diff**2                                how large the error still is
    Itv = clip(round(beta / max(I1, I2) - gamma), 1, steps_per_epoch)
    R_t = alpha * s + (1 - alpha) * R_(t-1)
    next update = t + Itv

Source: Zhang et al., arXiv 1911.00361. Pure functions over any number of tensors at once; the candidate
widths may be any ascending list, so "8 more bits" reads "the next width" here.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_apt.config import Config
from jax_apt.qem import diff


class TensorPrecision(NamedTuple):
    """Fixed-point format of tensors, carried between steps; all fields have the same leading shape."""

    bits: Array  # int32; width including the sign
    exponent: Array  # int32; resolution = 2**exponent
    range_average: Array  # float32; R, moving average of the exponent
    next_update: Array  # int32; training step of the next adjustment
    updates: Array  # int32; adjustments so far; 0: never measured
    nonfinite: Array  # int32; NaN and infinite values seen so far
    steps_at_width: Array  # int32 (..., W); training steps spent at each candidate width


class Measurement(NamedTuple):
    """Statistics of tensors at one step, for each candidate width; the sums add over uses."""

    count: Array  # float32; uses that were measured, 0 outside updates
    nonfinite: Array  # float32; NaN and infinite values
    abs_sum: Array  # float32; sum|x|
    error_sums: Array  # float32 (..., W); numerator of Diff
    exponents: Array  # int32 (..., W); exponent that the largest magnitude needs


def width_index(bits: Array, widths: Array) -> Array:
    """Position of `bits` (...) among the ascending candidates `widths` (..., W)."""
    return jnp.sum(bits[..., None] > widths, axis=-1, dtype=jnp.int32)


def error_limit(threshold: float) -> float:
    """The ratio |error sum| / sum|x| at which Diff is the threshold T: 2**T - 1.

    Widths are chosen by the ratio: a division rounds alike everywhere, and a logarithm does not.
    """
    return math.expm1(min(threshold, 120.0) * math.log(2.0))


def choose_width(errors: Array, start: Array, limit: float) -> Array:
    """First candidate from `start` on whose error is at most the limit, else the widest.

    Args:
      errors: float32 (..., W), the error at each candidate width.
      start: int32 (...), index of the width at which the search begins.
      limit: of the error.

    Returns:
      int32 (...), index of the chosen width.
    """
    index = lax.broadcasted_iota(jnp.int32, errors.shape, errors.ndim - 1)
    is_good = (errors <= jnp.float32(limit)) & (index >= start[..., None])
    is_good = is_good | (index == errors.shape[-1] - 1)
    return jnp.argmax(is_good, axis=-1).astype(jnp.int32)


def update_interval(diff: Array, range_change: Array, config: Config) -> Array:
    """Steps until the next update, at least 1 and at most `steps_per_epoch`.

    Args:
      diff: float32, the error at the chosen width.
      range_change: float32, I1 = |R_t - R_(t-1)|.
      config: beta, gamma, delta and steps_per_epoch.

    Returns:
      int32, same shape.

    >>> update_interval(jnp.float32(0.01), jnp.float32(0.0), Config()).item()
    8
    """
    largest = jnp.maximum(range_change, config.delta * diff**2)
    steps = jnp.round(config.beta / jnp.maximum(largest, 1e-30) - config.gamma)
    return jnp.clip(steps, 1, config.steps_per_epoch).astype(jnp.int32)


def choose(bits: Array, measured: Measurement, widths: Array, config: Config):
    """Index of the width that an update chooses and the errors it rests on.

    Args:
      bits: int32 (...), widths as they are.
      measured: statistics of the same tensors.
      widths: int32 (..., W), ascending candidates.
      config: threshold and mode.

    Returns:
      (int32 (...), index of the chosen width; float32 (..., W), Diff at each width).
    """
    abs_sum = measured.abs_sum[..., None]
    ratios = jnp.abs(measured.error_sums) / jnp.where(abs_sum > 0, abs_sum, 1.0)
    start = width_index(bits, widths)
    if config.mode == "restart":
        start = jnp.zeros_like(start)
    chosen = choose_width(ratios, start, error_limit(config.threshold))
    return chosen, diff(measured.error_sums, abs_sum)


def adjust(
    precision: TensorPrecision, measured: Measurement, widths: Array, step: Array, config: Config
) -> TensorPrecision:
    """The precision after a training step, from what the step measured.

    A tensor that was not measured keeps its format. So does one of zeros alone or with NaN or infinite
    values: it carries no range, and is looked at again at the next step.

    Args:
      precision: state of the tensors, shape (...).
      measured: statistics of this step, the same shape.
      widths: int32 (..., W), ascending candidates.
      step: int32 scalar, the training step that was measured.
      config: constants of the method.
    """
    chosen, diffs = choose(precision.bits, measured, widths, config)

    def at_chosen(values):
        return jnp.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]

    bits, exponent = at_chosen(widths), at_chosen(measured.exponents)
    target = exponent.astype(jnp.float32)
    shifted = precision.range_average - (bits - precision.bits).astype(jnp.float32)
    previous = jnp.where(precision.updates == 0, target, shifted)
    range_change = config.alpha * jnp.abs(target - previous)
    interval = update_interval(at_chosen(diffs), range_change, config)
    interval = jnp.where(step < config.initial_steps, 1, interval)
    is_measured = (measured.count > 0) & (measured.abs_sum > 0) & (measured.nonfinite == 0)

    def keep(new, old):
        return jnp.where(is_measured, new, old)

    bits = keep(bits, precision.bits)
    index = lax.broadcasted_iota(jnp.int32, widths.shape, widths.ndim - 1)
    now = index == width_index(bits, widths)[..., None]
    return TensorPrecision(
        bits=bits,
        exponent=keep(exponent, precision.exponent),
        range_average=keep(previous + config.alpha * (target - previous), precision.range_average),
        next_update=keep(step + interval, precision.next_update),
        updates=precision.updates + is_measured.astype(jnp.int32),
        nonfinite=precision.nonfinite + measured.nonfinite.astype(jnp.int32),
        steps_at_width=precision.steps_at_width + now.astype(jnp.int32),
    )
