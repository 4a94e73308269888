"""Exact sums of integers beyond 32 bits, rounded once to float32, with 32-bit operations alone.

JAX disables 64-bit types by default, so a 64-bit two's complement integer is held as a pair of words.
Every function is pure and works under any JAX transformation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_apt.fixed_point import power_of_two


class Wide(NamedTuple):
    """64-bit two's complement integers, elementwise."""

    high: Array  # uint32, any shape
    low: Array  # uint32, same shape


def widen(x: Array, shift: int = 0) -> Wide:
    """`x * 2**shift` of an int32 array; 0 <= shift < 64."""
    low = lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)
    high = lax.bitcast_convert_type(jnp.right_shift(x.astype(jnp.int32), 31), jnp.uint32)
    if shift == 0:
        return Wide(high, low)
    if shift >= 32:
        return Wide(low << (shift - 32), jnp.zeros_like(low))
    return Wide((high << shift) | (low >> (32 - shift)), low << shift)


def add(a: Wide, b: Wide) -> Wide:
    """a + b modulo 2**64; the operands broadcast."""
    low = a.low + b.low
    carry = (low < a.low).astype(jnp.uint32)
    return Wide(a.high + b.high + carry, low)


def to_float32(x: Wide) -> Array:
    """Nearest float32, ties to even, in one rounding."""
    is_negative = x.high >> 31 == 1
    magnitude = _select(is_negative, _negate(x), x)
    leading = jnp.where(magnitude.high == 0, 32 + lax.clz(magnitude.low), lax.clz(magnitude.high))
    leading = jnp.minimum(leading, 63).astype(jnp.uint32)
    normal = _shift_left(magnitude, leading)
    # Bits below the top word only matter as "not a tie": a sticky bit keeps that.
    top = normal.high | (normal.low != 0).astype(jnp.uint32)
    value = top.astype(jnp.float32) * power_of_two(32 - leading.astype(jnp.int32))
    return jnp.where(is_negative, -value, value)


def _negate(x: Wide) -> Wide:
    low = ~x.low + jnp.uint32(1)
    return Wide(~x.high + (low == 0).astype(jnp.uint32), low)


def _select(condition: Array, a: Wide, b: Wide) -> Wide:
    return Wide(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def _shift_left(x: Wide, count: Array) -> Wide:
    """x * 2**count for a uint32 array 0 <= count < 64; lax shifts by 32 or more give 0."""
    below = lax.shift_right_logical(x.low, jnp.uint32(32) - jnp.minimum(count, jnp.uint32(32)))
    within = lax.shift_left(x.high, count) | jnp.where(count == 0, jnp.uint32(0), below)
    beyond = lax.shift_left(x.low, jnp.maximum(count, jnp.uint32(32)) - jnp.uint32(32))
    return Wide(jnp.where(count < 32, within, beyond), lax.shift_left(x.low, count))
