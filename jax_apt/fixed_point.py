"""The fixed-point number: symmetric integer codes times a power-of-two resolution.

    exponent = ceil(log2(max_abs / (2**(bits-1) - 1)))
    codes    = clip(round_half_even(x / 2**exponent), -(2**(bits-1) - 1), 2**(bits-1) - 1)
    value    = codes * 2**exponent

Source: Zhang et al., arXiv 1911.00361, section 3. Pure functions, no state. The least integer of a
container, which the symmetric range never uses, marks a value that was NaN or infinite.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_apt.config import check_bits

MIN_EXPONENT, MAX_EXPONENT = -126, 126  # both 2**e and 2**-e are normal float32 numbers
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it spread over all of uint32


class Fixed(NamedTuple):
    """A quantized tensor; its value is `codes * 2**exponent`."""

    codes: Array  # int8, int16 or int32; any shape
    bits: Array  # int32, shape (); width including the sign
    exponent: Array  # int32, shape ()


def container(bits: int):
    """Smallest integer dtype that holds codes of `bits` bits."""
    return jnp.int8 if bits <= 8 else jnp.int16 if bits <= 16 else jnp.int32


def marker(dtype) -> int:
    """The code that stands for NaN or infinity in a container."""
    return int(jnp.iinfo(dtype).min)


def max_code(bits):
    """Largest code of a width, 2**(bits-1) - 1; `bits` is an int or an int32 array."""
    return (1 << (bits - 1)) - 1 if isinstance(bits, int) else jnp.left_shift(1, bits - 1) - 1


def power_of_two(exponent) -> Array:
    """2**exponent as float32, exact for exponents in -126..127."""
    biased = jnp.asarray(exponent, jnp.int32) + 127
    return lax.bitcast_convert_type(lax.shift_left(biased, jnp.full_like(biased, 23)), jnp.float32)


def exponent_for(max_abs: Array, bits) -> Array:
    """Least exponent at which `max_abs` does not clip: ceil(log2(max_abs / (2**(bits-1) - 1))).

    Read from the float's own bits, so that it is exact where log2 would round.

    Args:
      max_abs: float32, any shape; finite and >= 0. Zero gives the least exponent, -126.
      bits: int or int32 array that broadcasts with `max_abs`.

    Returns:
      int32 exponents, clipped to -126..126.

    Raises:
      ValueError: `bits` is an int outside 2..24.

    >>> int(exponent_for(jnp.float32(127.0), 8)), int(exponent_for(jnp.float32(127.5), 8))
    (0, 1)
    """
    _check_static_bits(bits)
    pattern = lax.bitcast_convert_type(jnp.asarray(max_abs, jnp.float32), jnp.int32)
    octave = jnp.right_shift(pattern, 23) - 127  # max_abs = (1 + fraction / 2**23) * 2**octave
    fraction = jnp.bitwise_and(pattern, (1 << 23) - 1)
    # (2**(bits-1) - 1) * 2**s >= max_abs at s = octave - (bits - 2) iff 1 + f/2**23 <= 2 - 2**(2-bits)
    is_above = fraction > (1 << 23) - jnp.left_shift(1, 25 - jnp.asarray(bits, jnp.int32))
    exponent = octave - (bits - 2) + is_above.astype(jnp.int32)
    return jnp.clip(exponent, MIN_EXPONENT, MAX_EXPONENT).astype(jnp.int32)


def quantize(x: Array, bits, exponent, dtype=jnp.int32) -> Array:
    """Integer codes of `x`.

    Args:
      x: float32, any shape.
      bits: int or int32 scalar, 2..24.
      exponent: int32 scalar, -126..126.
      dtype: container of the codes; must hold `bits` bits.

    Returns:
      Codes of dtype `dtype` and the shape of `x`; NaN and infinities give `marker(dtype)`.

    Raises:
      ValueError: `bits` is an int outside 2..24, or more than `dtype` holds.
      TypeError: `x` is not float32.

    >>> quantize(jnp.array([0.5, 1.5, 2.5, 999.0]), 8, 0).tolist()
    [0, 2, 2, 127]
    """
    _check_static_bits(bits)
    if isinstance(bits, int) and bits > jnp.iinfo(dtype).bits:
        raise ValueError(f"codes of {bits} bits do not fit into {jnp.dtype(dtype)}")
    if jnp.result_type(x) != jnp.float32:
        raise TypeError(f"quantize takes float32, got {jnp.result_type(x)}")
    codes = jnp.where(jnp.isfinite(x), rounded(x, bits, exponent), jnp.float32(marker(dtype)))
    return codes.astype(dtype)


def _check_static_bits(bits) -> None:
    """A width that is known before the program runs; run-time widths come from checked rules."""
    if not hasattr(bits, "dtype"):
        check_bits(bits)


def as_float32(x) -> Array:
    """`x` as float32; raises TypeError if it is not of a real floating-point type."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"a tensor to quantize must be floating point, got {x.dtype}; cast it first")
    return x.astype(jnp.float32)


def round_stochastically(x: Array, exponent, key: Array) -> Array:
    """`x` moved up or down to a multiple of 2**exponent, at random so that `x` is the expected value.

    `quantize` takes the result to its code without rounding again, so this works ahead of every backend.
    The fraction is exact in float32, and is compared with a uniform number of 24 bits, so the bias is
    below 2**-24 of a step. That number is a hash of the key, the element's place and its bits: the custom
    call draws the same, and a layer that is used twice in a step draws anew. Magnitudes from 2**24 steps on,
    more than any width holds, may shrink to there; NaN and infinities stay.

    Args:
      x: float32, any shape.
      exponent: int32 scalar.
      key: uint32 scalar, from `random_key`.
    """
    top = jnp.float32(2.0**24)
    scaled = jnp.clip(x * power_of_two(-exponent), -top, top)
    below = jnp.floor(scaled)
    place = lax.iota(jnp.uint32, x.size).reshape(x.shape) * jnp.uint32(_GOLDEN)
    drawn = _mixed(lax.bitcast_convert_type(x, jnp.uint32) ^ (place + key))
    uniform = (drawn >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    codes = below + (uniform < scaled - below).astype(jnp.float32)
    return jnp.where(jnp.isfinite(x), codes * power_of_two(exponent), x)


def random_key(seed: int, step: Array) -> Array:
    """uint32 scalar: the key of a layer's random numbers in a training step (int32)."""
    return _mixed(jnp.uint32(seed) + step.astype(jnp.uint32) * jnp.uint32(_GOLDEN))


def _mixed(x: Array) -> Array:
    """A hash of uint32 in which every bit depends on all (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def rounded(x: Array, bits, exponent) -> Array:
    """The codes of finite `x` as float32; `bits` and `exponent` broadcast with it."""
    limit = jnp.asarray(max_code(bits), jnp.float32)
    scaled = lax.round(x * power_of_two(-exponent), lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.clip(scaled, -limit, limit)


def dequantize(number: Fixed) -> Array:
    """float32 value of a quantized tensor; NaN where it was not finite."""
    value = number.codes.astype(jnp.float32) * power_of_two(number.exponent)
    return jnp.where(number.codes == marker(number.codes.dtype), jnp.float32(jnp.nan), value)


def count_nonfinite(codes: Array) -> Array:
    """float32 scalar: how many values of a quantized tensor were NaN or infinite."""
    return jnp.sum((codes == marker(codes.dtype)).astype(jnp.float32))


def scale(sums: Array, first: Array, second: Array) -> Array:
    """`sums * 2**(first + second)` in float32; the smaller power goes first.

    A sum of codes is 0 or at least 1 in magnitude, so neither step leaves the float32 range unless the
    result does.
    """
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    return sums * power_of_two(low) * power_of_two(high)


def quantize_to(x: Array, bits: int) -> Array:
    """`x` rounded to `bits` bits at its own range: float32 of the same shape, for a look by eye.

    Args:
      x: float32, any shape; NumPy arrays and lists are converted.
      bits: width including the sign, 2..24.

    Raises:
      ValueError: `bits` is outside 2..24.
      TypeError: `x` is not of a real floating-point type.

    >>> quantize_to(jnp.array([1.0, 0.3]), 4).tolist()
    [1.0, 0.25]
    """
    check_bits(bits)
    x = as_float32(x)
    exponent = exponent_for(jnp.max(jnp.abs(x), initial=0.0), bits)
    return dequantize(Fixed(quantize(x, bits, exponent), jnp.int32(bits), exponent))
