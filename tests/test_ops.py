"""The differentiable product: its three products are those of the quantized values, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exponent_oracle, quantize_oracle
from jax import lax

import jax_apt as apt
from jax_apt import xla_ops

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])


def matmul(w, x):
    return x @ w


def weight_first(w, x):
    return w @ x


def convolution(w, x):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def attention(w, x):
    return jnp.einsum("bqhd,bkhd->bhqk", x, w)


CASES = {  # weight shape, input shape
    matmul: ((7, 5), (4, 7)),
    weight_first: ((5, 7), (7, 4)),
    convolution: ((3, 3, 4, 5), (2, 6, 5, 4)),
    attention: ((2, 5, 3, 4), (2, 6, 3, 4)),
}


def rounded(x, bits):
    """float64 values of a tensor quantized at its own range, by exact fractions."""
    exponent = exponent_oracle(np.max(np.abs(x)), bits)
    return quantize_oracle(x, bits, exponent) * 2.0**exponent


WIDTHS = {  # of x, w and dy; every kind of product meets narrow ones and odd ones
    matmul: [(8, 8, 8), (8, 8, 16), (8, 8, 24), (16, 8, 16), (12, 5, 20)],
    weight_first: [(8, 8, 16), (12, 5, 20)],
    convolution: [(8, 8, 16), (12, 5, 20)],
    attention: [(8, 8, 16), (12, 5, 20)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fn", "bits"),
    [(fn, bits) for fn, widths in WIDTHS.items() for bits in widths],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value)),
)
def test_equals_the_float64_computation_on_quantized_values(fn, bits, backend):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in CASES[fn])
    dy = rng.standard_t(3, jax.eval_shape(fn, w, x).shape).astype(np.float32)
    rule = apt.Rule("", acts=bits[0], weights=bits[1], grads=bits[2], rounding="nearest")
    q = apt.apt_quantize(fn, [rule], backend=backend)
    state = q.init(w, x)

    @jax.jit
    def products(w, x, dy):
        y, pullback = jax.vjp(lambda w, x: q.apply(w, state, x), w, x)
        return y, *pullback(dy)

    with jax.enable_x64(True):
        exact_y, pullback = jax.vjp(fn, rounded(w, bits[1]), rounded(x, bits[0]))
        exact = (exact_y, *pullback(jnp.asarray(rounded(dy, bits[2]))))
        assert exact_y.dtype == jnp.float64
        exact = [np.asarray(e).astype(np.float32) for e in exact]
    for got, expected in zip(products(w, x, dy), exact, strict=True):
        np.testing.assert_array_equal(got, expected)


def residuals(q, w, x, policy=None):
    """Arrays kept between the forward and the backward pass."""
    state = q.init(w, x)

    def fn(w, x):
        return jnp.tanh(q.apply(w, state, x))

    fn = fn if policy is None else jax.checkpoint(fn, policy=policy)
    _, pullback = jax.vjp(fn, w, x)
    return [leaf for leaf in jax.tree.leaves(pullback) if leaf.ndim]


def test_residuals_are_integer_codes():
    w, x = jnp.ones((40, 50)), jnp.ones((30, 40))
    kept = residuals(apt.apt_quantize(matmul, backend="xla"), w, x)
    assert {leaf.dtype for leaf in kept if leaf.shape in (w.shape, x.shape)} == {jnp.dtype("int8")}


def test_a_policy_keeps_the_codes_by_name():
    w, x = jnp.ones((40, 50)), jnp.ones((30, 40))
    policy = jax.checkpoint_policies.save_only_these_names(apt.CODES_NAME)
    kept = residuals(apt.apt_quantize(matmul, backend="xla"), w, x, policy)
    shapes = [leaf.shape for leaf in kept if leaf.dtype == jnp.int8]
    assert w.shape in shapes and x.shape in shapes
    assert (30, 50) not in [leaf.shape for leaf in kept]  # tanh's output is computed again


def test_stale_ranges_clip_until_the_next_update():
    """Between updates formats are used as they are."""
    q = apt.apt_quantize(matmul, config=apt.Config(steps_per_epoch=100, initial_fraction=0.0), backend="xla")
    w, x = jnp.eye(3), jnp.ones((1, 3))
    step = apt.value_and_grad(lambda w, s, x: jnp.sum(q.apply(w, s, x)), q)
    _, _, state = jax.jit(step)(w, q.init(w, x), x)
    exponent = int(state["parameter"]["x"].exponent)
    np.testing.assert_array_equal(q.apply(w, state, 100 * x), jnp.full((1, 3), 127 * 2.0**exponent))


@pytest.mark.parametrize("measure", ["mean_magnitude", "elementwise", "resolution"])
def test_a_step_uses_the_width_that_it_chooses(measure):
    """Gradients of a heavy-tailed loss go to more than 8 bits in the very first step."""
    w, x = jnp.eye(16), jnp.ones((64, 16))
    heavy = np.random.default_rng(0).lognormal(0, 3, (64, 16)).astype(np.float32)
    rule, config = apt.Rule(rounding="nearest"), apt.Config(measure=measure)
    q = apt.apt_quantize(matmul, [rule], config=config, backend="xla")
    loss = apt.value_and_grad(lambda w, s, dy: jnp.sum(q.apply(w, s, x) * dy), q)
    _, grads, state = jax.jit(loss)(w, q.init(w, x), heavy)
    bits = int(state["parameter"]["dy"].bits)
    assert bits > 8
    exact = rounded(np.ones((64, 16)), 8).T @ rounded(heavy, bits)
    np.testing.assert_array_equal(grads, exact.astype(np.float32))


def test_zeros_have_a_product_and_keep_their_format():
    w, x = jnp.zeros((3, 2)), jnp.zeros((4, 3))
    q = apt.apt_quantize(matmul, backend="xla")
    step = jax.jit(apt.value_and_grad(lambda w, s: jnp.sum(q.apply(w, s, x)), q))
    _, grads, state = step(w, q.init(w, x))
    assert not np.any(grads)
    assert state["parameter"]["x"].updates == 0 and state["parameter"]["dy"].updates == 1
    assert state["parameter"]["x"].bits == 8
