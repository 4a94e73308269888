"""Rules by primitive and shape, per-product switches, and stochastic rounding of gradients."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_apt as apt
from jax_apt import xla_ops
from jax_apt.fixed_point import random_key, round_stochastically

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])
GEMMS = ("fwd", "dx", "dw")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def matmul(w, x):
    return x @ w


def weight_first(w, x):
    return (w.T @ x.T).T


W, X, DY = normal(0, 6, 5), normal(1, 4, 6), normal(2, 4, 5)


@cache
def products(fn, rule, backend="xla", step=0):
    """{"fwd": y, "dw": ..., "dx": ...} of one training step, and the state after it."""
    q = apt.apt_quantize(fn, [rule], backend=backend)
    state = q.init(W, X)
    for _ in range(step):
        state = q.update(state, q.taps(state))

    @jax.jit
    def run(w, x, taps):
        y, pullback = jax.vjp(lambda w, x, t: q.apply(w, q.with_taps(state, t), x), w, x, taps)
        return y, *pullback(DY)

    y, dw, dx, taps = run(W, X, q.taps(state))
    return {"fwd": y, "dw": dw, "dx": dx}, q.update(state, taps), q


def float_products(fn):
    y, pullback = jax.vjp(fn, W, X)
    dw, dx = pullback(DY)
    return {"fwd": y, "dw": dw, "dx": dx}


# Switches


@pytest.mark.parametrize(
    ("fn", "backend"), [(weight_first, "xla"), *((matmul, backend) for backend in BACKENDS)]
)
@pytest.mark.parametrize("gemms", [("fwd",), ("dx",), ("dw",), ("fwd", "dw")], ids="+".join)
def test_each_product_is_quantized_or_that_of_float32(fn, gemms, backend):
    got, _, _ = products(fn, apt.Rule(gemms=gemms), backend)
    quantized, _, _ = products(fn, apt.Rule(), backend)
    in_float = float_products(fn)
    for gemm in GEMMS:
        if gemm in gemms:
            np.testing.assert_array_equal(got[gemm], quantized[gemm])
            assert jnp.any(got[gemm] != in_float[gemm])
        else:
            np.testing.assert_allclose(got[gemm], in_float[gemm], rtol=1e-5, atol=1e-5)
            assert jnp.max(jnp.abs(quantized[gemm] - in_float[gemm])) > 1e-3  # far more than the tolerance


def test_a_tensor_that_no_quantized_product_takes_is_not_measured():
    _, state, q = products(matmul, apt.Rule(gemms=("fwd",)))
    (name,) = state.layout.names()
    assert [int(state[name][t].updates) for t in ("x", "w", "dy")] == [1, 1, 0]
    text = str(q.report(state))
    assert "of its products only fwd in fixed point" in text
    row = next(line for line in text.splitlines() if "dot_general" in line)
    assert row.split()[-4:-1] == ["8", "8", "float"]
    assert q.report(state).to_dict()["layers"][0]["gemms"] == ["fwd"]


@pytest.mark.parametrize("gemms", [(), "fwd", ("forward",), ("fwd", "dy")])
def test_bad_gemms(gemms):
    with pytest.raises(ValueError, match="gemms must be a tuple of fwd, dx, dw, at least one; got"):
        apt.Rule(gemms=gemms)


# Conditions


def test_rules_by_primitive_and_shape():
    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        for name in ("wide", "pointwise"):
            x = lax.conv_general_dilated(x, p[name]["w"], (1, 1), "SAME", dimension_numbers=dims)
        return x.mean((1, 2)) @ p["head"]["w"] @ p["last"]["w"]

    shapes = {"wide": (3, 3, 2, 4), "pointwise": (1, 1, 4, 4), "head": (4, 3), "last": (3, 3)}
    p = {name: {"w": normal(0, *shape)} for name, shape in shapes.items()}
    rules = [
        apt.Rule(shape=(1, 1, None, None), acts=10),
        apt.Rule(primitive="conv_general_dilated", acts=11),
        apt.Rule("^head$", primitive="dot_general", shape=(4, None), acts=12),
        apt.Rule("last", shape=(3, 4)),
    ]
    with pytest.warns(UserWarning, match=r"'last shape=\(3, 4\)'"):
        state = apt.apt_quantize(fn, rules, backend="xla").init(p, normal(1, 2, 5, 5, 2))
    acts = {layer.name: layer.widths[0] for layer in state.layout.layers}
    assert acts == {"wide": (11,), "pointwise": (10,), "head": (12,), "last": (8,)}
    assert [layer.rule for layer in state.layout.layers][2] == "^head$ primitive=dot_general shape=(4, None)"


# Stochastic rounding


STOCHASTIC = apt.Rule(grads=8)  # the default


def test_rounding_goes_to_a_neighbour_with_the_right_probability():
    steps = jnp.array([0.25, -0.25, 3.9, -7.5, 2.0, 0.0])
    keys = jax.vmap(lambda step: random_key(7, step))(jnp.arange(20000))
    codes = np.asarray(jax.vmap(lambda key: round_stochastically(steps * 2.0**-5, -5, key))(keys)) * 32
    assert np.all((codes == np.floor(steps)) | (codes == np.ceil(steps)))
    np.testing.assert_allclose(codes.mean(0), steps, atol=5 * 0.5 / 20000**0.5)  # five standard errors
    np.testing.assert_array_equal(codes[:, 4:], np.broadcast_to(steps[4:], (20000, 2)))


def test_values_that_no_width_holds_and_non_finite_ones():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3e38, -3e38], jnp.float32)
    got = round_stochastically(x, -126, jnp.uint32(0))
    np.testing.assert_array_equal(got[:3], x[:3])
    assert jnp.array_equal(got[3:], jnp.array([1.0, -1.0]) * jnp.float32(2.0**-102))


@pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")
@pytest.mark.parametrize("isa", xla_ops.available_isas() if xla_ops.is_available() else ())
@pytest.mark.parametrize("bits", (3, 8, 12, 16, 24))
def test_the_custom_call_draws_the_same(isa, bits):
    """Also past the part that one task has, for values that clip, and for those that are not finite."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal(70001).astype(np.float32) * 2.0 ** rng.integers(-20, 20, 70001)
    x[[5, 40000, 70000]] = np.nan, np.inf, -np.inf
    formats = jnp.array([[bits, -7, 0, 3]] * 3, jnp.int32)
    choice = xla_ops.Choice((bits,), "mean_magnitude", False, 0.1)
    found = xla_ops.adapt(jnp.asarray(x, jnp.float32), formats, 2, choice, seed=2**32 - 5, isa=isa)
    drawn = round_stochastically(jnp.asarray(x, jnp.float32), -7, random_key(2**32 - 5, formats[2, 3]))
    planes, nonfinite = xla_ops.quantize(drawn, bits, -7, limbs=xla_ops.limb_count(bits), isa=isa)
    np.testing.assert_array_equal(found.planes, planes)
    assert found.nonfinite == nonfinite == 3
    nearest = xla_ops.adapt(jnp.asarray(x, jnp.float32), formats, 2, choice, isa=isa)
    assert np.any(nearest.planes != planes)
    with pytest.raises(ValueError, match=r"seed must be in 0.*got -1"):
        xla_ops.adapt(jnp.asarray(x, jnp.float32), formats, 2, choice, seed=-1, isa=isa)


def test_equal_values_are_drawn_apart():
    """As are neighbours and later steps: a constant is right on average in every one of many tensors."""
    x = jnp.full((50, 40, 25), 0.3, jnp.float32)
    keys = jax.vmap(lambda step: random_key(1, step))(jnp.arange(200))
    ones = jax.vmap(lambda key: round_stochastically(x, 0, key))(keys)
    deviation = (0.3 * 0.7) ** 0.5
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 2)):
        count = math.prod(ones.shape[axis] for axis in axes)
        assert jnp.max(jnp.abs(ones.mean(axes) - 0.3)) < 5 * deviation / count**0.5
    apart = jnp.mean((ones[..., 1:] - 0.3) * (ones[..., :-1] - 0.3))
    assert abs(apart) < 5 * deviation**2 / ones.size**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_drawn_per_step_and_only_they(backend):
    draw, _, _ = products(matmul, STOCHASTIC, backend)
    again, _, _ = products.__wrapped__(matmul, STOCHASTIC, backend)
    later, _, _ = products(matmul, STOCHASTIC, backend, step=1)
    nearest, _, _ = products(matmul, apt.Rule(grads=8, rounding="nearest"), backend)
    portable, _, _ = products(matmul, STOCHASTIC, "xla")
    for gemm in GEMMS:
        np.testing.assert_array_equal(draw[gemm], again[gemm])
        np.testing.assert_array_equal(draw[gemm], portable[gemm])
    np.testing.assert_array_equal(draw["fwd"], nearest["fwd"])
    for gemm in ("dx", "dw"):
        assert jnp.any(draw[gemm] != nearest[gemm])
        assert jnp.any(draw[gemm] != later[gemm])


def test_the_gradient_is_unbiased_over_the_steps():
    """Rounding to nearest has the same error at every step; at random it averages out."""
    q = apt.apt_quantize(
        matmul, [apt.Rule(acts=24, weights=24, grads=4, rounding="stochastic")], backend="xla"
    )
    rule = apt.Rule(acts=24, weights=24, grads=4, rounding="nearest")
    fixed = apt.apt_quantize(matmul, [rule], backend="xla")
    exact = float_products(matmul)["dw"]

    def gradient(q, state):
        _, pullback = jax.vjp(lambda w: q.apply(w, state, X), W)
        return pullback(DY)[0]

    many = jax.jit(jax.vmap(lambda s, step: gradient(q, replace(s, step=step)), in_axes=(None, 0)))
    mean = many(q.init(W, X), jnp.arange(2000)).mean(0)
    bias = jnp.linalg.norm(gradient(fixed, fixed.init(W, X)) - exact)
    assert jnp.linalg.norm(mean - exact) < 0.15 * bias


def test_bad_rounding():
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic; got 'up'"):
        apt.Rule(rounding="up")
