"""The fixed-point number: exact exponents, rounding, clipping, marks of non-finite values, scaling."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import codes as draw
from helpers import exponent_oracle, quantize_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_apt import Fixed, dequantize, exponent_for, measure_error, quantize, quantize_to
from jax_apt.fixed_point import container, count_nonfinite, marker, max_code, power_of_two, scale

BITS = range(2, 25)
TINY, HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max
# XLA's CPU flushes subnormal numbers to zero, so values start at the least normal one.
NORMAL = st.floats(float(TINY), float(HUGE), width=32)
fast_exponent, fast_quantize = jax.jit(exponent_for), jax.jit(quantize, static_argnums=3)


def neighbours(values):
    values = np.asarray(values, np.float32)
    return np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, np.float32(np.inf))])


@pytest.mark.parametrize("bits", BITS)
def test_exponent_is_exact_around_every_boundary(bits):
    with np.errstate(over="ignore"):
        boundaries = np.ldexp(np.float32(2 ** (bits - 1) - 1), np.arange(-126 - bits, 129))
        values = neighbours(boundaries.astype(np.float32))
    values = values[np.isfinite(values) & (values >= TINY)]
    expected = [exponent_oracle(v, bits) for v in values]
    assert fast_exponent(values, jnp.int32(bits)).tolist() == expected
    assert exponent_for(jnp.asarray(values), bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_exponent_of_tiny_and_huge_values_and_powers_of_two(bits):
    values = neighbours([TINY * 2, HUGE / 2, *2.0 ** np.arange(-125, 127)])
    values = np.append(values, np.array([0.0, TINY, HUGE], np.float32))
    assert exponent_for(jnp.asarray(values), bits).tolist() == [exponent_oracle(v, bits) for v in values]


@given(value=NORMAL, bits=st.integers(2, 24))
@settings(max_examples=300, deadline=None)
def test_exponent_of_any_value(value, bits):
    got = int(fast_exponent(np.float32(value), np.int32(bits)))
    assert got == exponent_oracle(value, bits)
    largest = 2 ** (bits - 1) - 1
    if got < 126:  # beyond, no exponent that is in range holds the value
        assert largest * Fraction(2) ** got >= Fraction(value)
    if got > -126:
        assert largest * Fraction(2) ** (got - 1) < Fraction(value)


def test_widths_broadcast_with_magnitudes():
    magnitudes, widths = np.float32([1.0, 127.0, 127.5, 0.0]), np.int32([8, 16, 24])
    got = exponent_for(jnp.asarray(magnitudes)[:, None], jnp.asarray(widths)[None])
    assert got.tolist() == [[exponent_oracle(m, int(n)) for n in widths] for m in magnitudes]


@given(data=st.data(), bits=st.integers(2, 24), sign=st.sampled_from([-1, 1]))
@settings(max_examples=200, deadline=None)
def test_codes_of_any_value_at_any_exponent(data, bits, sign):
    x = np.float32(sign * data.draw(NORMAL))
    exponent = data.draw(st.integers(-126, 126))
    codes = fast_quantize(x, np.int32(bits), np.int32(exponent), jnp.int32)
    scaled = abs(Fraction(float(x)) / Fraction(2) ** exponent)
    if scaled == 0 or scaled >= Fraction(float(TINY)):  # else x / 2**exponent is subnormal: zero anyway
        assert int(codes) == quantize_oracle(x, bits, exponent)
    else:
        assert int(codes) == 0


@pytest.mark.parametrize("bits", BITS)
def test_nothing_clips_at_an_update(bits):
    x = np.random.default_rng(bits).standard_t(2, 500).astype(np.float32)
    exponent = exponent_for(jnp.max(jnp.abs(x)), bits)
    codes = quantize(jnp.asarray(x), bits, exponent, container(bits))
    assert codes.dtype == container(bits)
    assert np.array_equal(codes, quantize_oracle(x, bits, int(exponent)))
    error = np.abs(np.asarray(dequantize(Fixed(codes, jnp.int32(bits), exponent))) - x)
    assert np.max(error) <= 2.0 ** int(exponent) / 2  # half a step: nothing was clipped


@pytest.mark.parametrize("bits", [4, 8, 16, 24])
def test_the_largest_floats_do_not_clip_either(bits):
    x = jnp.asarray([HUGE, -HUGE])
    exponent = exponent_for(jnp.float32(HUGE), bits)
    exact = [round(Fraction(float(v)) / Fraction(2) ** int(exponent)) for v in x]
    assert quantize(x, bits, exponent).tolist() == exact


def test_halves_round_to_even():
    x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    assert quantize(x, 8, 0, jnp.int8).tolist() == [0, 2, 2, 0, -2, -2, 126, -126]


@pytest.mark.parametrize("bits", BITS)
def test_stale_ranges_clip_symmetrically(bits):
    limit = 2 ** (bits - 1) - 1
    for width in (bits, jnp.int32(bits)):
        x = jnp.array([1e9, -1e9, HUGE, -HUGE, limit, -limit, limit + 1, -limit - 1], jnp.float32)
        assert quantize(x, width, jnp.int32(0), container(bits)).tolist() == [limit, -limit] * 4
        assert int(max_code(width)) == limit


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.int32])
def test_nonfinite_values_are_marked_and_come_back_as_nan(dtype):
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, -1e38])
    codes = quantize(x, 8, 0, dtype)
    is_marked = [False, True, True, True, False]
    assert (np.asarray(codes) == np.iinfo(dtype).min).tolist() == is_marked
    assert marker(dtype) == np.iinfo(dtype).min and count_nonfinite(codes) == 3
    assert jnp.isnan(dequantize(Fixed(codes, jnp.int32(8), jnp.int32(0)))).tolist() == is_marked


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_no_code_of_a_number_is_the_marker(bits):
    codes = jnp.asarray(draw(np.random.default_rng(0), (64,), bits, "extreme"), container(bits))
    assert count_nonfinite(codes) == 0


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_codes_survive_a_round_trip(bits):
    codes = draw(np.random.default_rng(bits), (1000,), bits)
    for exponent in (-100, -3, 0, 100):
        number = Fixed(jnp.asarray(codes, container(bits)), jnp.int32(bits), jnp.int32(exponent))
        again = quantize(dequantize(number), bits, number.exponent, container(bits))
        assert np.array_equal(again, codes)


def test_power_of_two_is_exact():
    exponents = np.arange(-126, 128, dtype=np.int32)
    assert np.array_equal(power_of_two(exponents), np.ldexp(np.float32(1), exponents))


@given(total=st.integers(-(2**24), 2**24), first=st.integers(-126, 126), second=st.integers(-126, 126))
@settings(max_examples=300, deadline=None)
def test_scaling_leaves_the_range_only_if_the_result_does(total, first, second):
    got = float(jax.jit(scale)(np.float32(total), np.int32(first), np.int32(second)))
    exact = Fraction(total) * Fraction(2) ** (first + second)
    if abs(exact) > Fraction(float(HUGE)):
        assert got == (np.inf if total > 0 else -np.inf)
    elif total and abs(exact) < Fraction(float(TINY)):
        assert abs(got) <= float(TINY)  # subnormal: flushed or kept, by the machine
    else:
        assert Fraction(got) == exact


def test_quantize_to_looks_at_its_own_range():
    assert quantize_to(jnp.array([1.0, 0.3, -0.3]), 4).tolist() == [1.0, 0.25, -0.25]
    assert quantize_to(jnp.zeros(3), 8).tolist() == [0.0, 0.0, 0.0]
    assert quantize_to(jnp.zeros((0, 2)), 8).shape == (0, 2)


@pytest.mark.parametrize("bits", [1, 25, 8.0, True])
def test_bad_widths_are_named(bits):
    x = jnp.ones(3)
    for call in (
        lambda: quantize(x, bits, 0),
        lambda: exponent_for(x, bits),
        lambda: quantize_to(x, bits),
        lambda: measure_error(x, bits),
    ):
        with pytest.raises(ValueError, match=f"bits must be an int in 2..24, got {bits}"):
            call()


def test_bad_tensors_and_containers_are_named():
    for dtype in ("int32", "complex64"):
        x = jnp.ones(3, dtype)
        with pytest.raises(TypeError, match=f"quantize takes float32, got {dtype}"):
            quantize(x, 8, 0)
        for call in (quantize_to, measure_error):
            with pytest.raises(TypeError, match=f"must be floating point, got {dtype}; cast it first"):
                call(x, 8)
    with pytest.raises(ValueError, match="codes of 16 bits do not fit into int8"):
        quantize(jnp.ones(3), 16, 0, jnp.int8)
    with pytest.raises(ValueError, match=r"measure must be one of mean_magnitude, .*; got 'median'"):
        measure_error(jnp.ones(3), 8, "median")


def test_lists_and_other_floats_are_converted():
    assert quantize_to([1.0, 0.3], 4).tolist() == [1.0, 0.25]
    assert quantize_to(np.array([1.0, 0.3]), 4).dtype == jnp.float32
    assert quantize_to(jnp.array([1.0, 0.3], jnp.bfloat16), 4).tolist() == [1.0, 0.25]
