"""The precision state: rows and names, additive taps, due tensors, and a pytree that travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_apt as apt
from jax_apt.qpa import Measurement
from jax_apt.state import Layer, Layout, formats, from_tap, initial_state, tap_size, to_tap, update, zero_taps


def layer(name, stack=(), widths=((8,), (8,), (8, 16, 24))):
    return Layer(name, "dot_general", stack, (3, 3), widths, "xla", "asked for", None)


LAYOUT = Layout((layer("a"), layer("b", (2,)), layer("c", widths=((4,), (6,), (8,)))))


def measurement(abs_sum=1.0, exponents=(-7, -15, -23), errors=(0.5, 0.25, 0.0), nonfinite=0.0):
    return Measurement(
        jnp.float32(1.0),
        jnp.float32(nonfinite),
        jnp.float32(abs_sum),
        jnp.float32(errors),
        jnp.int32(exponents),
    )


def test_rows_start_at_the_narrowest_width():
    state = initial_state(LAYOUT)
    assert state.precision.bits.tolist() == [8, 8, 8] + [8, 8, 8] * 2 + [4, 6, 8]
    assert state["b"]["dy"].bits.shape == (2,) and state["a"]["x"].bits.shape == ()
    assert state["c"]["w"].bits == 6 and state["c"]["x"].steps_at_width.shape == (3,)
    with pytest.raises(KeyError, match="no quantized layer 'd'; there are a, b, c"):
        state["d"]


def test_a_tap_carries_a_measurement():
    tap = to_tap(measurement())
    assert tap.shape == (tap_size(3),)
    got = from_tap(tap, 3)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, measurement()))


def test_added_taps_are_sums_and_the_widest_range():
    parts = [measurement(1.0, (-7, -15, -23)), measurement(2.0, (-9, -12, -30), nonfinite=3.0)]
    got = from_tap(sum(map(to_tap, parts)), 3)
    assert got.exponents.tolist() == [-7, -12, -23]
    assert (got.count, got.abs_sum, got.nonfinite) == (2.0, 3.0, 3.0)
    assert got.error_sums.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("exponent", [-126, -1, 0, 126])
def test_taps_carry_every_exponent(exponent):
    assert from_tap(to_tap(measurement(exponents=(exponent,) * 3)), 3).exponents.tolist() == [exponent] * 3


def test_nothing_measured_is_a_zero_tap():
    nothing = jax.tree.map(jnp.zeros_like, measurement())
    assert not np.any(to_tap(nothing))


def test_formats_are_due_when_their_time_has_come():
    state = initial_state(LAYOUT)
    taps = jax.tree.map(lambda t: t.at[:].set(to_tap(measurement())), zero_taps(LAYOUT))
    config = apt.Config(steps_per_epoch=3, initial_fraction=0.0, threshold=1.0)
    after = update(state, taps, config)
    assert after.precision.updates.tolist() == [1] * 12
    interval = int(after["a"]["x"].next_update)

    def is_due(state):
        return [int(v) for v in np.concatenate([f[..., 2].ravel() for f in formats(state).values()])]

    assert interval == 1  # an error of 0.5: 0.1 / (100 * 0.58 ** 2) rounds to nothing
    assert is_due(state) == [1] * 12  # never measured: also outside training
    assert is_due(after) == [0] * 12  # outside training formats are read, never chosen
    due = apt.AptState(after.step, after.precision, zero_taps(LAYOUT), LAYOUT)
    assert is_due(due) == [1] * 12
    later = apt.AptState(after.step - 1, after.precision, zero_taps(LAYOUT), LAYOUT)
    assert is_due(later) == [0] * 12


def test_a_state_travels_through_jit_donation_and_tree_functions():
    state = initial_state(LAYOUT)
    again = jax.jit(lambda s: s, donate_argnums=0)(jax.tree.map(jnp.copy, state))
    assert again.layout is state.layout or again.layout == state.layout
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, state))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_an_empty_layout_counts_steps():
    state = update(initial_state(Layout(())), {}, apt.Config())
    assert state.step == 1
