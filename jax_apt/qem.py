"""Quantization error measurement (QEM): how far quantization moves a tensor's distribution.

    Diff = log2(|sum|x| - sum|x^|| / sum|x| + 1)

Source: Zhang et al., arXiv 1911.00361. It compares mean magnitudes, so it sees a change of the
distribution, not the error of each element. Two other measures stand beside it for comparison:

    elementwise   log2(sum|x - x^| / sum|x| + 1)
    resolution    log2((r / 4) / mean|x| + 1), from the resolution r and the mean alone: r / 4 is the
                  mean rounding error of a uniform distribution

Each is log2(|error| / sum|x| + 1) with a sum `error` that adds over uses, time steps and devices.
"""

import jax.numpy as jnp
from jax import Array

from jax_apt.config import check_bits, check_measure
from jax_apt.fixed_point import as_float32, exponent_for, power_of_two, rounded


def error_sums(x: Array, bits: Array, exponents: Array, measure: str = "mean_magnitude") -> Array:
    """The additive numerator of an error measure at several widths.

    The terms are differences, |x| - |x^|, so that a shift far below float32's precision of sum|x| is
    still seen.

    Args:
      x: float32, any shape, finite.
      bits: int32 (W,).
      exponents: int32 (W,).
      measure: "mean_magnitude", "elementwise" or "resolution".

    Returns:
      float32 (W,).
    """
    if measure == "resolution":
        return x.size * power_of_two(exponents) / 4
    axes = tuple(range(1, x.ndim + 1))
    bits, exponents = (jnp.expand_dims(v, axes) for v in (bits, exponents))
    x = x[None]
    value = rounded(x, bits, exponents) * power_of_two(exponents)
    if measure == "elementwise":
        return jnp.sum(jnp.abs(x - value), axes)
    return jnp.sum(jnp.abs(x) - jnp.abs(value), axes)


def diff(error: Array, abs_sum: Array) -> Array:
    """log2(|error| / sum|x| + 1), elementwise; 0 where sum|x| is 0."""
    ratio = jnp.abs(error) / jnp.where(abs_sum > 0, abs_sum, 1.0)
    return jnp.log1p(ratio) / jnp.log(jnp.float32(2.0))


def measure_error(x: Array, bits: int, measure: str = "mean_magnitude") -> Array:
    """Diff of a whole tensor quantized to `bits` bits at its own range.

    Args:
      x: float32, any shape, finite; NumPy arrays and lists are converted.
      bits: width including the sign, 2..24.
      measure: "mean_magnitude" (the method's), "elementwise" or "resolution".

    Returns:
      float32 scalar >= 0.

    Raises:
      ValueError: `bits` is outside 2..24, or the measure is unknown.
      TypeError: `x` is not of a real floating-point type.

    >>> float(measure_error(jnp.array([1.0, 0.5, 0.25]), 8))
    0.0
    """
    check_bits(bits)
    check_measure(measure)
    x = as_float32(x)
    exponent = exponent_for(jnp.max(jnp.abs(x), initial=0.0), bits)
    (error,) = error_sums(x, jnp.array([bits]), exponent[None], measure)
    return diff(error, jnp.sum(jnp.abs(x)))
