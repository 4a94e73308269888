"""Quantization parameter adjustment against the method's table and an independent scalar version."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_apt import Config, update_interval
from jax_apt.qpa import Measurement, TensorPrecision, adjust, choose_width, width_index

WIDTHS = jnp.array([[8, 16, 24]], jnp.int32)


@pytest.mark.parametrize(("diff", "steps"), [(0.018, 1), (0.01, 8), (0.005, 38), (0.003, 109), (0.001, 998)])
def test_interval_table(diff, steps):
    assert update_interval(jnp.float32(diff), jnp.float32(0.0), Config(steps_per_epoch=10_000)) == steps


def test_interval_is_capped_by_the_epoch_and_shortened_by_a_moving_range():
    assert update_interval(jnp.float32(0.0), jnp.float32(0.0), Config(steps_per_epoch=50)) == 50
    assert update_interval(jnp.float32(0.0), jnp.float32(0.04), Config()) == 1  # round(0.1 / 0.04 - 2) = 0
    assert update_interval(jnp.float32(0.0), jnp.float32(0.004), Config()) == 23


def test_width_choice():
    diffs = jnp.array([0.5, 0.02, 0.001])
    assert choose_width(diffs, jnp.int32(0), 0.03) == 1
    assert choose_width(diffs, jnp.int32(2), 0.03) == 2
    assert choose_width(jnp.array([1.0, 1.0, 1.0]), jnp.int32(0), 0.03) == 2  # none is good: the widest
    assert choose_width(jnp.array([0.03, 0.0, 0.0]), jnp.int32(0), 0.03) == 0  # T itself is good
    assert width_index(jnp.array([8, 16, 24]), jnp.array([[8, 16, 24]] * 3)).tolist() == [0, 1, 2]


def precision(**fields):
    start = {"bits": 8, "exponent": -7, "range_average": -7.0, "next_update": 0, "updates": 1, "nonfinite": 0}
    start |= fields
    arrays = {k: jnp.array([v], jnp.float32 if k == "range_average" else jnp.int32) for k, v in start.items()}
    return TensorPrecision(**arrays, steps_at_width=jnp.zeros((1, 3), jnp.int32))


def measurement(diffs, exponents, count=1.0, nonfinite=0.0, abs_sum=10.0):
    errors = (2.0 ** np.asarray(diffs, np.float64) - 1) * abs_sum
    return Measurement(
        jnp.array([count], jnp.float32),
        jnp.array([nonfinite], jnp.float32),
        jnp.array([abs_sum], jnp.float32),
        jnp.array([errors], jnp.float32),
        jnp.array([exponents], jnp.int32),
    )


LATE = jnp.int32(500)  # after the initial phase of Config()


def test_grow_never_narrows_and_restart_does():
    measured = measurement([0.0, 0.0, 0.0], [-7, -15, -23])
    wide = precision(bits=24, exponent=-23, range_average=-23.0)
    assert adjust(wide, measured, WIDTHS, LATE, Config(mode="grow")).bits == 24
    narrowed = adjust(wide, measured, WIDTHS, LATE, Config(mode="restart"))
    assert narrowed.bits == 8 and narrowed.exponent == -7
    assert narrowed.range_average == -7.0  # shifted by the change of the width, back and forth


def test_range_average_follows_a_growing_width():
    after = adjust(precision(), measurement([0.5, 0.0, 0.0], [-7, -15, -23]), WIDTHS, LATE, Config())
    assert after.bits == 16 and after.exponent == -15
    assert after.range_average == -15.0  # R -= 8, then alpha * 0
    assert after.next_update - LATE == 1000  # neither range nor error moves: one epoch


def test_initial_phase_updates_every_step():
    config = Config(steps_per_epoch=100, initial_fraction=0.1)
    measured = measurement([0.0, 0.0, 0.0], [-7, -15, -23])
    assert adjust(precision(), measured, WIDTHS, jnp.int32(9), config).next_update == 10
    assert adjust(precision(), measured, WIDTHS, jnp.int32(10), config).next_update == 110


@pytest.mark.parametrize("fields", [{"count": 0.0}, {"abs_sum": 0.0}, {"nonfinite": 2.0}])
def test_tensors_without_a_range_keep_their_format(fields):
    before = precision(next_update=500)
    after = adjust(before, measurement([0.5, 0.5, 0.5], [9, 9, 9], **fields), WIDTHS, LATE, Config())
    for name in ("bits", "exponent", "range_average", "next_update", "updates"):
        assert getattr(after, name) == getattr(before, name), name
    assert int(after.nonfinite[0]) == fields.get("nonfinite", 0)


def scalar_adjust(state, diffs, exponents, step, config):
    """The method's pseudo-code, one tensor, plain Python."""
    n, r, first = state["n"], state["r"], state["updates"] == 0
    if config.mode == "restart":
        r -= 8 - n
        n = 8
    index = (8, 16, 24).index(n)
    while diffs[index] > config.threshold and n < 24:
        index, n, r = index + 1, n + 8, r - 8
    s = exponents[index]
    if first:
        r = float(s)
    change = config.alpha * abs(s - r)
    largest = max(change, config.delta * diffs[index] ** 2)
    interval = config.steps_per_epoch
    if largest > 0:
        interval = min(max(round(config.beta / largest - config.gamma), 1), config.steps_per_epoch)
    if step < config.initial_steps:
        interval = 1
    r = config.alpha * s + (1 - config.alpha) * r
    return {"n": n, "s": s, "r": r, "next": step + interval, "updates": state["updates"] + 1}


@pytest.mark.parametrize("mode", ["grow", "restart"])
def test_many_steps_equal_the_scalar_version(mode):
    config = Config(mode=mode, steps_per_epoch=60)
    rng = np.random.default_rng(3)
    vector = precision(updates=0, exponent=0, range_average=0.0)
    scalar = {"n": 8, "s": 0, "r": 0.0, "next": 0, "updates": 0}
    for step in range(300):
        if scalar["next"] > step:
            continue
        base = int(np.round(3 * np.sin(step / 40) - 7))
        exponents = [base, base - 8, base - 16]
        diffs = np.sort(rng.lognormal(-5, 1.5, 3))[::-1].astype(np.float32).tolist()
        measured = measurement(diffs, exponents)
        vector = adjust(vector, measured, WIDTHS, jnp.int32(step), config)
        exact = np.log2(np.asarray(measured.error_sums[0], np.float64) / 10 + 1).tolist()
        scalar = scalar_adjust(scalar, exact, exponents, step, config)
        assert (int(vector.bits[0]), int(vector.exponent[0])) == (scalar["n"], scalar["s"]), step
        assert float(vector.range_average[0]) == pytest.approx(scalar["r"], abs=1e-3)
        assert abs(int(vector.next_update[0]) - scalar["next"]) <= 1, step  # a rounding half may differ
        scalar["next"] = int(vector.next_update[0])
    assert scalar["updates"] > 20
