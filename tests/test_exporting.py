"""jax.export, ahead-of-time compilation, eval_shape and donation of training steps and frozen models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_apt as apt
from jax_apt import xla_ops


def network(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def quantized(backend):
    return apt.apt_quantize(network, [apt.Rule("", grads=8)], backend=backend)


def parameters():
    rng = np.random.default_rng(0)
    return {k: {"kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)} for k in "ab"}


X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)


def make_step(q):
    def step(p, state, x):
        loss = apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q)
        value, gradients, state = loss(p, state)
        return jax.tree.map(lambda w, g: w - 0.01 * g, p, gradients), state, value

    return step


@pytest.fixture(scope="module")
def trained():
    """(quantized function, compiled step, parameters, state, result of the next step)"""
    q = quantized("xla")
    shapes = jax.eval_shape(lambda p, x: (p, q.init(p, x), x), parameters(), X)
    assert shapes[1].layout.names() == ("a", "b") and shapes[1].precision.bits.shape == (6,)
    step = jax.jit(make_step(q)).lower(*shapes).compile()  # ahead of time, from shapes alone
    p, state, _ = step(parameters(), q.init(parameters(), X), X)
    return q, step, p, state, step(p, state, X)


def assert_equal(a, b):
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_eval_shape_and_compilation_ahead_of_time(trained):
    q, _, p, state, after = trained
    shapes = jax.eval_shape(make_step(q), p, state, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(after)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda s: (s.shape, s.dtype), after
    )
    assert after[1].step == 2 and after[1].precision.updates.tolist() == [2] * 6


def test_an_exported_training_step_takes_and_returns_the_state(trained):
    q, _, p, state, after = trained
    program = export.export(jax.jit(make_step(q)))(p, state, X).serialize()
    got = export.deserialize(program).call(p, state, X)
    assert got[1].layout == state.layout
    assert_equal(got, after)


def test_a_frozen_model_exported_with_its_weights_inside(trained):
    """For any number of rows and every platform, in a quarter of the bytes."""
    q, _, p, state, _ = trained
    frozen = apt.freeze(q, p, state, X)
    rows = export.symbolic_shape("rows, 4")
    exported = export.export(
        jax.jit(lambda x: apt.apply_frozen(q, frozen, x)), platforms=("cpu", "cuda", "tpu")
    )(jax.ShapeDtypeStruct(rows, jnp.float32))
    assert "tensor<4x4xi8>" in exported.mlir_module() and "tensor<4x4xf32>" not in constants(exported)
    loaded = export.deserialize(exported.serialize())
    for x in (X, jnp.concatenate([X, 2 * X])):
        assert_equal(loaded.call(x), q.apply(p, state, x))


def constants(exported):
    return "\n".join(line for line in exported.mlir_module().splitlines() if "stablehlo.constant" in line)


def test_a_frozen_model_as_an_argument(trained):
    q, _, p, state, _ = trained
    frozen = apt.freeze(q, p, state, X)
    program = export.export(jax.jit(lambda f, x: apt.apply_frozen(q, f, x)))(frozen, X).serialize()
    assert_equal(export.deserialize(program).call(frozen, X), q.apply(p, state, X))


@pytest.mark.skipif(not xla_ops.is_available(), reason="no native backend here")
def test_native_is_exported_only_knowingly(trained):
    _, _, p, state, _ = trained
    q = quantized("native")
    frozen = apt.freeze(q, p, state, X)
    function = jax.jit(lambda x: apt.apply_frozen(q, frozen, x))
    with pytest.raises(ValueError, match="jax_apt_"):
        export.export(function)(X)
    program = export.export(function, disabled_checks=apt.native_export_checks())(X).serialize()
    apt.load_native()
    assert_equal(export.deserialize(program).call(X), q.apply(p, state, X))


def test_donated_parameters_and_states_are_given_up(trained):
    q, _, p, state, after = trained
    donating = jax.jit(make_step(q), donate_argnums=(0, 1))
    given = jax.tree.map(jnp.copy, (p, state))
    assert_equal(donating(*given, X), after)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    fresh = (parameters(), q.init(parameters(), X))
    assert donating(*fresh, X)[1].step == 1  # what init makes may be donated as it is
