"""Quantization error measurement: the anchors, additivity, and three measures against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diff_oracle

from jax_apt import exponent_for, measure_error
from jax_apt.qem import diff, error_sums
from jax_apt.qpa import choose_width

SAMPLES, SEEDS, WIDTHS = 100_000, 15, (8, 16, 24)
MEASURES = ["mean_magnitude", "elementwise", "resolution"]
DRAWS = {
    "normal": lambda rng: rng.standard_normal(SAMPLES),
    "laplace": lambda rng: rng.laplace(size=SAMPLES),
    "student": lambda rng: rng.standard_t(3, SAMPLES),
    "lognormal2": lambda rng: rng.lognormal(0, 2, SAMPLES),
    "lognormal3": lambda rng: rng.lognormal(0, 3, SAMPLES),
}


@functools.cache
def sample(name):
    """float32 (SEEDS, SAMPLES)."""
    rngs = map(np.random.default_rng, range(SEEDS))
    return np.stack([DRAWS[name](rng) for rng in rngs]).astype(np.float32)


@functools.cache
def errors(name):
    """Diff of every sample at every width: (SEEDS, WIDTHS)."""
    measures = [jax.jit(functools.partial(measure_error, bits=n)) for n in WIDTHS]
    return np.array([[float(measure(x)) for measure in measures] for x in sample(name)])


# An anchor is one draw of 1e5 values. Diff rests on the draw's largest value, so draws scatter: over a
# hundred of them, by this factor either way of the anchor at most, from the 5th to the 95th percentile.
ANCHORS = [
    ("normal", 8, 4.9e-5, 9),
    ("normal", 16, 3.6e-7, 25),  # signed rounding errors that nearly cancel: a near-zero Diff is common
    ("laplace", 8, 6e-4, 2.5),
    ("laplace", 16, 5e-7, 20),
    ("student", 8, 0.039, 5),
    ("student", 16, 6e-6, 60),
    ("lognormal2", 8, 0.30, 2.5),
    ("lognormal2", 16, 2e-4, 40),
    ("lognormal3", 8, 0.50, 1.8),
    ("lognormal3", 16, 0.032, 5.5),
]


@pytest.mark.parametrize(("name", "bits", "anchor", "factor"), ANCHORS)
def test_anchor(name, bits, anchor, factor):
    measured = errors(name)[:, WIDTHS.index(bits)]
    within = (anchor / factor <= measured) & (measured <= anchor * factor)
    assert np.mean(within) >= 0.8, measured
    assert np.min(measured) <= anchor * 1.25 and anchor <= np.max(measured) * 1.25  # and it is typical


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_draw_equals_float64(name, bits):
    expected = [diff_oracle(x, bits) for x in sample(name)]
    # Float32 sums of 1e5 differences, each at most half a step: errors far below a step per sample.
    np.testing.assert_allclose(errors(name)[:, WIDTHS.index(bits)], expected, rtol=2e-3, atol=2e-9)


@pytest.mark.parametrize(
    ("diffs", "bits"),
    [((4.9e-5, 3.6e-7, 0), 8), ((6e-4, 5e-7, 0), 8), ((0.039, 6e-6, 0), 16),
     ((0.30, 2e-4, 0), 16), ((0.50, 0.032, 1e-4), 24)],
)  # fmt: skip
def test_width_at_the_anchors_themselves(diffs, bits):
    assert WIDTHS[int(choose_width(jnp.array(diffs, jnp.float32), jnp.int32(0), 0.03))] == bits


# The anchors of Student t3 at 8 bits (0.039) and of lognormal 3 at 16 bits (0.032) lie just above T, so
# some draws need the width of the anchor and some the width below it.
@pytest.mark.parametrize(
    ("name", "widths"),
    [("normal", {8}), ("laplace", {8}), ("student", {8, 16}), ("lognormal2", {16}), ("lognormal3", {16, 24})],
)  # fmt: skip
def test_widths_that_draws_of_each_distribution_get(name, widths):
    starts = jnp.zeros(SEEDS, jnp.int32)
    chosen = jax.vmap(choose_width, (0, 0, None))(jnp.float32(errors(name)), starts, 0.03)
    got = [WIDTHS[i] for i in chosen.tolist()]
    needed = [next((n for n in WIDTHS if diff_oracle(x, n) <= 0.03), 24) for x in sample(name)]  # by float64
    assert got == needed and set(got) == widths


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("name", ["normal", "student", "lognormal2"])
def test_measures_equal_their_formulas(measure, bits, name):
    x = sample(name)[0, :2000]
    expected = diff_oracle(x, bits, measure)
    assert float(measure_error(jnp.asarray(x), bits, measure)) == pytest.approx(expected, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("parts", [2, 4])
def test_numerators_add_over_parts(measure, parts, leak_checks):
    x = jnp.asarray(sample("student")[1, :4000])
    widths = jnp.array(WIDTHS, jnp.int32)
    exponents = exponent_for(jnp.max(jnp.abs(x))[None], widths)
    pieces = [error_sums(part, widths, exponents, measure) for part in jnp.split(x, parts)]
    whole = error_sums(x, widths, exponents, measure)
    scale = float(jnp.sum(jnp.abs(x)))  # signed terms may cancel: float32 error is relative to their size
    np.testing.assert_allclose(sum(pieces), whole, rtol=1e-5, atol=1e-7 * scale)


def test_the_mean_magnitude_sees_shifts_not_noise():
    x = jnp.array([1.0, 0.25, 0.75]) + jnp.array([126.0, 0.0, 0.0])  # exponent 0: 0.25 -> 0, 0.75 -> 1
    assert measure_error(x, 8) == 0
    assert measure_error(x, 8, "elementwise") > 0
    shrunk = jnp.array([127.0, 0.4, 0.4])
    assert float(measure_error(shrunk, 8)) == pytest.approx(np.log2(0.8 / 127.8 + 1), rel=1e-5)


@pytest.mark.parametrize("measure", ["mean_magnitude", "elementwise"])
def test_zeros_have_no_error(measure):
    assert measure_error(jnp.zeros(5), 8, measure) == 0
    assert diff(jnp.float32(0.0), jnp.float32(0.0)) == 0
    assert diff(jnp.float32(-1.0), jnp.float32(1.0)) == 1  # |error|: log2(1 + 1)
