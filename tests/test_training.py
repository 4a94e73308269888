"""Training steps: one compilation, statistics that add up, and a state that learns formats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_apt as apt
from jax_apt import xla_ops

BACKEND = "native" if xla_ops.is_available() else "xla"


def network(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def start(**config):
    """Rounded to nearest: two programs' values may differ in their last bit, and then draw differently."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (6, 8), "b": (8, 4)}
    p = {n: {"kernel": jax.random.normal(k, shapes[n])} for n, k in zip(shapes, keys, strict=False)}
    q = apt.apt_quantize(network, apt.PRESETS["published"], config=apt.Config(**config), backend=BACKEND)
    x = jax.random.normal(keys[2], (16, 6))
    return q, p, x


def equal(a, b):
    return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


def test_one_compilation_while_bits_change():
    q, p, _ = start(steps_per_epoch=10, initial_fraction=1.0, mode="restart")
    x = jax.random.normal(jax.random.key(1), (1024, 6))

    @jax.jit
    def step(p, state, weight):
        def loss_fn(p, state):
            return jnp.sum(q.apply(p, state, x) * weight)

        return apt.value_and_grad(loss_fn, q)(p, state)

    state, seen = q.init(p, x), []
    for rest in (1.0, 2.0**-9, 2.0**-17, 1.0):  # beside one 1: 4095 values that 8, 16, 24 bits can hold
        weight = jnp.full((1024, 4), rest).at[0, 0].set(1.0)
        _, _, state = step(p, state, weight)
        seen.append(int(state["b"]["dy"].bits))
    assert seen == [8, 16, 24, 8]
    assert step._cache_size() == 1


def test_explicit_taps_are_value_and_grad():
    q, p, x = start()
    state = q.init(p, x)

    def loss_fn(p, state):
        return jnp.mean(q.apply(p, state, x) ** 2)

    expected = jax.jit(apt.value_and_grad(loss_fn, q))(p, state)

    @jax.jit
    def by_hand(p, state):
        def tapped(p, taps):
            return loss_fn(p, q.with_taps(state, taps))

        value, (grads, statistics) = jax.value_and_grad(tapped, argnums=(0, 1))(p, q.taps(state))
        return value, grads, q.update(state, statistics)

    assert equal(by_hand(p, state), expected)


def test_statistics_of_microbatches_add_up():
    """Two halves in one update choose the formats of the whole batch: no halves are seen twice."""
    q, p, x = start()
    state = q.init(p, x)
    x = x.at[0].mul(9.0)

    def statistics(x):
        def loss(taps):
            return jnp.sum(q.apply(p, q.with_taps(state, taps), x) ** 2)

        return jax.grad(loss)(q.taps(state))

    statistics = jax.jit(statistics)
    halves = jax.tree.map(jnp.add, statistics(x[:8]), statistics(x[8:]))
    merged, whole = q.update(state, halves), q.update(state, statistics(x))
    for tensor in ("x", "w", "dy"):
        assert merged["a"][tensor].exponent == whole["a"][tensor].exponent
        assert merged["a"][tensor].updates == whole["a"][tensor].updates == 1
    assert merged.step == 1


def test_a_layer_that_the_loss_does_not_use_keeps_its_state():
    q, p, x = start()
    state = q.init(p, x)
    step = jax.jit(apt.value_and_grad(lambda p, state: jnp.sum(p["a"]["kernel"]), q))
    _, _, after = step(p, state)
    assert after.step == 1
    for field in ("bits", "exponent", "range_average", "next_update", "updates", "nonfinite"):
        assert equal(getattr(after.precision, field), getattr(state.precision, field))


def test_apply_without_training_leaves_no_trace():
    q, p, x = start()
    state = q.init(p, x)
    apply = jax.jit(q.apply)
    fresh = apply(p, state, x)
    _, _, trained = jax.jit(apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x)), q))(p, state)
    np.testing.assert_array_equal(apply(p, trained, x), fresh)  # the formats that training found
    assert trained.taps is None


def test_aux_and_further_arguments_pass_through():
    q, p, x = start()

    def loss_fn(p, state, x, *, weight):
        y = q.apply(p, state, x)
        return weight * jnp.sum(y), {"y": y}

    step = jax.jit(apt.value_and_grad(loss_fn, q, has_aux=True))
    (value, aux), grads, _ = step(p, q.init(p, x), x, weight=2.0)
    np.testing.assert_allclose(value, 2 * jnp.sum(aux["y"]), rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(p)


def test_taps_of_other_layers_are_refused():
    q, p, x = start()
    state = q.init(p, x)
    taps = q.taps(state)
    taps["c"] = taps.pop("a")
    with pytest.raises(ValueError, match="taps and state have different layers: a, c"):
        q.update(state, taps)
    with pytest.raises(ValueError, match="taps and state have different layers: a, c"):
        q.apply(p, q.with_taps(state, taps), x)
    with pytest.raises(TypeError, match=r"taps must be a dictionary by layer name, .*got NoneType"):
        q.update(state, None)
    stacked = jax.tree.map(lambda tap: jnp.stack([tap, tap]), q.taps(state))
    with pytest.raises(ValueError, match=r"taps of layer a must have shape \(3, \d+\), got \(2, 3, \d+\)"):
        q.update(state, stacked)


def test_a_donated_state_trains_and_a_closed_over_state_is_read():
    q, p, x = start()
    step = apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q)
    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=1)
    state, donated = q.init(p, x), q.init(p, x)
    for _ in range(3):
        *expected, state = plain(p, state)
        *got, donated = donating(p, donated)
        assert equal(got, expected) and equal(donated, state)
    np.testing.assert_array_equal(jax.jit(lambda x: q.apply(p, state, x))(x), q.apply(p, state, x))


def test_a_loss_that_reads_the_state_from_outside_warns():
    q, p, x = start()
    state = q.init(p, x)

    def step(p, state):
        return apt.value_and_grad(lambda p, _: jnp.sum(q.apply(p, state, x)), q)(p, state)

    with pytest.warns(UserWarning, match="the precision state learns nothing") as caught:
        _, _, after = jax.jit(step)(p, state)
    assert len(caught) == 1 and not np.any(after.precision.updates)
    assert "a: not measured in 1 training step(s): the loss did not use it" in str(q.report(after))
    with pytest.warns(UserWarning, match="the precision state learns nothing"):
        jax.eval_shape(lambda: step(p, state))  # with arrays, as without jit

    def teacher(p, given):  # reading the outer state beside the given one is no mistake
        return jnp.sum(q.apply(p, given, x) - jax.lax.stop_gradient(q.apply(p, state, x)))

    jax.eval_shape(lambda: apt.value_and_grad(teacher, q)(p, state))


def test_optax_trains_as_well_as_in_float32():
    """A regression to noise-free targets: both losses fall alike."""
    q, p, x = start(steps_per_epoch=20)
    target = network(jax.tree.map(lambda w: w[::-1] * 0.5, p), x)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(3e-2)))

    def float32(p, state):
        return *jax.value_and_grad(lambda p: jnp.mean((network(p, x) - target) ** 2))(p), state

    adaptive = apt.value_and_grad(lambda p, s: jnp.mean((q.apply(p, s, x) - target) ** 2), q)

    def train(value_and_grad, state):
        @jax.jit
        def step(p, opt, state):
            value, grads, state = value_and_grad(p, state)
            updates, opt = tx.update(grads, opt, p)
            return optax.apply_updates(p, updates), opt, state, value

        params, opt, losses = p, tx.init(p), []
        with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic
            for _ in range(150):
                params, opt, state, value = step(params, opt, state)
                losses.append(float(value))
        return losses, state

    plain, _ = train(float32, None)
    quantized, state = train(adaptive, q.init(p, x))
    assert plain[-1] < 0.02 * plain[0]
    assert quantized[-1] < 0.04 * quantized[0]
    assert state.step == 150 and np.all(np.asarray(state.precision.updates) < 150)  # intervals grew
