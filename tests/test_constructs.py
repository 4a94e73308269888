"""The replay through every JAX construct: gradients are right, products inside are quantized, bits agree."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from small_networks import (
    BACKENDS,
    FASTEST,
    WIDE,
    assert_close_gradients,
    loss_and_grads,
    normal,
    plain,
    reference,
    two_layers,
)

import jax_apt as apt

# Each function hides its products behind one construct


@jax.custom_vjp
def own_vjp(x, w):
    return jnp.tanh(x @ w)


def _own_vjp_forward(x, w):
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def _own_vjp_backward(residuals, g):
    x, w, y = residuals
    g = g * (1 - y**2)
    return 2 * g @ w.T, x.T @ g  # twice the true gradient: proves that this rule was used


own_vjp.defvjp(_own_vjp_forward, _own_vjp_backward)


@jax.custom_jvp
def own_jvp(x, w):
    return jnp.sin(x @ w)


@own_jvp.defjvp
def _own_jvp_rule(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = x @ w
    return jnp.sin(y), 3 * jnp.cos(y) * (dx @ w + x @ dw)


def through_jit(p, x):
    return jax.jit(lambda x, w: jnp.tanh(x @ w))(x, p["a"]["kernel"]) @ p["b"]["kernel"]


def through_remat(p, x):
    return jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, p["a"]["kernel"]) @ p["b"]["kernel"]


def through_scan_over_time(p, x):
    def cell(h, _):
        return jnp.tanh(h @ p["a"]["kernel"]), h

    h, hs = lax.scan(cell, x, None, length=3)
    return (h + hs.mean(0)) @ p["b"]["kernel"]


def through_cond(p, x):
    def one(x):
        return x @ p["a"]["kernel"]

    def other(x):
        return x @ p["b"]["kernel"]

    return lax.cond(jnp.sum(x) > 0, one, other, x) @ p["b"]["kernel"]


def through_switch(p, x):
    branches = [lambda x: x @ p["a"]["kernel"], lambda x: x, lambda x: x @ p["b"]["kernel"]]
    return lax.switch(2, branches, x) @ p["a"]["kernel"]


def through_custom_vjp(p, x):
    return own_vjp(own_vjp(x, p["a"]["kernel"]), p["b"]["kernel"])


def through_custom_jvp(p, x):
    return own_jvp(own_jvp(x, p["a"]["kernel"]), p["b"]["kernel"])


def through_nesting(p, x):
    @jax.checkpoint
    def body(h, _):
        h = lax.cond(jnp.sum(h) > -1e9, lambda h: own_vjp(h, p["a"]["kernel"]), lambda h: h, h)
        return jax.jit(lambda h: jnp.tanh(h @ p["b"]["kernel"]))(h), None

    return lax.scan(body, x, None, length=2)[0]


def through_vmap(p, x):
    return jax.vmap(lambda row: jnp.tanh(row @ p["a"]["kernel"]))(x) @ p["b"]["kernel"]


def through_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("data"), PartitionSpec())
    mapped = jax.shard_map(
        lambda x, w: jnp.tanh(x @ w), mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")
    )
    return mapped(x, p["a"]["kernel"]) @ p["b"]["kernel"]


def through_ragged_dot(p, x):
    """Three rows go to one matrix, one to the other."""
    experts = jnp.stack([p["a"]["kernel"], -p["a"]["kernel"]])
    return jnp.tanh(lax.ragged_dot(x, experts, jnp.array([3, 1]))) @ p["b"]["kernel"]


CONSTRUCTS = [
    plain, through_jit, through_remat, through_scan_over_time, through_cond, through_switch,
    through_custom_vjp, through_custom_jvp, through_nesting, through_vmap,
    through_shard_map, through_ragged_dot,
]  # fmt: skip


@cache
def in_float32(fn):
    return reference(fn, two_layers(), normal(2, 4, 5))


@pytest.mark.parametrize("fn", CONSTRUCTS, ids=lambda fn: fn.__name__)
def test_construct_gradients_approach_float32(fn):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(fn, [WIDE], backend=FASTEST)
    value, grads, state = loss_and_grads(q, p, x)
    expected, float32 = in_float32(fn)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert_close_gradients(grads, float32)
    assert {"a", "b"} <= set(state.layout.names())
    assert not state.layout.left_in_float


@pytest.mark.parametrize("fn", CONSTRUCTS, ids=lambda fn: fn.__name__)
def test_construct_is_quantized_alike_on_every_backend(fn):
    """Eight bits must show: a product that slipped through would give float32's result."""
    p, x = two_layers(), normal(2, 4, 5)
    backends = BACKENDS if fn in (plain, through_nesting) else BACKENDS[1:]
    results = [loss_and_grads(apt.apt_quantize(fn, backend=b), p, x) for b in backends]
    value, gradients, state = results[0]
    for other in results[1:]:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, (value, gradients), other[:2]))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state.precision, other[2].precision))
    used = {name for name in state.layout.names() if state[name]["x"].updates == 1}
    not_taken = {"through_cond": {"a", "b"}, "through_switch": set(state.layout.names()) - {"b"}}
    assert set(state.layout.names()) - used <= not_taken.get(fn.__name__, set())
    assert state.step == 1
    for got, float32 in zip(jax.tree.leaves(gradients), jax.tree.leaves(in_float32(fn)[1]), strict=True):
        size = jnp.linalg.norm(float32)
        assert size == 0 or 1e-4 < jnp.linalg.norm(got - float32) / size < 0.5


@jax.custom_batching.custom_vmap
def own_vmap(x, w):
    return jnp.tanh(x @ w)


@own_vmap.def_vmap
def _own_vmap_rule(size, in_batched, x, w):
    return jnp.tanh(x @ w), True


@pytest.mark.parametrize(
    "call", [own_vmap, lax.composite(own_vmap.fun, "test.layer")], ids=["vmap", "composite"]
)
def test_calls_that_jax_cannot_differentiate_are_seen_through(call):
    """JAX has no gradient of these; the quantized function, whose calls are opened, has."""
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(lambda p, x: call(x, p["a"]["kernel"]) @ p["b"]["kernel"], [WIDE], backend=FASTEST)
    value, grads, state = loss_and_grads(q, p, x)
    assert state.layout.names() == ("a", "b")
    np.testing.assert_allclose(value, in_float32(plain)[0], rtol=1e-4)
    assert_close_gradients(grads, in_float32(plain)[1])


@pytest.mark.parametrize("dims", ["rows", "depth", "batch"])
def test_ragged_products_of_every_form(dims):
    """Rows of no group are zero; an empty group is allowed."""
    sizes = jnp.array([2, 0, 3])
    if dims == "rows":
        form, shapes = (((1,), (1,)), ((), ())), ((6, 4), (3, 4, 5))
        numbers = lax.RaggedDotDimensionNumbers(form, [0], [0])
    elif dims == "depth":
        form, shapes = (((0,), (0,)), ((), ())), ((6, 4), (6, 5))
        numbers = lax.RaggedDotDimensionNumbers(form, [0], [])
    else:
        form, shapes = (((2,), (2,)), ((0,), (0,))), ((2, 6, 4), (2, 3, 4, 5))
        sizes, numbers = jnp.stack([sizes, sizes]), lax.RaggedDotDimensionNumbers(form, [1], [1])

    def fn(p, x):
        return lax.ragged_dot_general(x, p["w"], sizes, numbers)

    x, p = normal(0, *shapes[0]), {"w": normal(1, *shapes[1])}
    q = apt.apt_quantize(fn, [] if dims == "batch" else [WIDE], backend=FASTEST)
    state = q.init(p, x)
    if dims == "batch":  # no form of its own here: it stays as it is, and the report says so
        assert [left.primitive for left in state.layout.left_in_float] == ["ragged_dot_general"]
    else:
        assert state.layout.names() == ("w",)
    np.testing.assert_allclose(q.apply(p, state, x), fn(p, x), rtol=1e-4, atol=1e-5)


def test_while_loop_runs_forward():
    w, x = normal(0, 3, 3), normal(1, 2, 3)

    def fn(p, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x))[1]

    def run(rules):
        q = apt.apt_quantize(fn, rules, backend=FASTEST)
        state = q.init({"w": w}, x)
        assert state.layout.names() == ("w",)
        return jax.jit(q.apply)({"w": w}, state, x)

    expected = fn({"w": w}, x)
    np.testing.assert_allclose(run([WIDE]), expected, rtol=1e-4)
    assert 1e-4 < jnp.linalg.norm(run([]) - expected) / jnp.linalg.norm(expected) < 0.1  # 8 bits show


def test_scan_over_layers_has_one_precision_per_slice():
    spread = jnp.array([1.0, 16.0, 1 / 16])[:, None, None]
    p, x = {"layers": {"kernel": normal(0, 3, 5, 5) * spread}}, normal(1, 4, 5)

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]["kernel"])[0]

    q = apt.apt_quantize(fn, backend=FASTEST)
    _, _, state = loss_and_grads(q, p, x)
    assert state["layers"]["w"].bits.shape == (3,)
    exponents = state["layers"]["w"].exponent
    expected = [apt.exponent_for(jnp.max(jnp.abs(w)), 8) for w in p["layers"]["kernel"]]
    assert exponents.tolist() == [int(e) for e in expected]


def test_scan_over_time_merges_statistics():
    """One entry for all steps; its range is the widest step's."""
    w = jnp.eye(3) * 4.0

    def fn(p, x):
        return lax.scan(lambda h, _: (h @ p["w"], None), x, None, length=3)[0]

    q = apt.apt_quantize(fn, backend=FASTEST)
    x = jnp.full((1, 3), 127 / 128)
    _, _, state = loss_and_grads(q, {"w": w}, x)
    assert state["w"]["x"].bits.shape == ()
    assert state["w"]["x"].exponent == int(apt.exponent_for(x[0, 0] * 16, 8))


# Custom rules that call their own function


@jax.custom_jvp
def own_sine(x, w):
    return jnp.sin(x @ w)


@own_sine.defjvp
def _own_sine_rule(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = own_sine(x, w)  # the usual idiom: the rule calls the function that it is the rule of
    return y, jnp.sqrt(1 - y**2) * (dx @ w + x @ dw)


def through_own_rule(p, x):
    return own_sine(0.1 * x, p["a"]["kernel"]) @ p["b"]["kernel"]


def fixed_point(p, x):
    """y = tanh(y @ a) + x: a loop that JAX cannot reverse, behind `lax.custom_root`."""
    w, start = 0.1 * p["a"]["kernel"], x[0]

    def residual(y):
        return jnp.tanh(y @ w) + start - y

    def solve(f, y):
        return lax.fori_loop(0, 20, lambda _, y: f(y) + y, y)

    def tangent_solve(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    return lax.custom_root(residual, start, solve, tangent_solve) @ p["b"]["kernel"]


@pytest.mark.parametrize(
    ("fn", "in_float"),
    [
        (through_own_rule, set()),
        (fixed_point, {"lu", "custom_linear_solve", "dot_general"}),
    ],  # an outer product
)
def test_rules_that_call_their_function_and_roots(fn, in_float):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(fn, [WIDE], backend=FASTEST)
    value, gradients, state = loss_and_grads(q, p, x)
    np.testing.assert_allclose(value, in_float32(fn)[0], rtol=1e-4)
    assert_close_gradients(gradients, in_float32(fn)[1])
    assert {"a", "b"} <= set(state.layout.names())
    is_in_rule = any(name.endswith("/gradient") for name in state.layout.names())  # the rule's own products
    assert is_in_rule == (fn is through_own_rule)
    assert {left.primitive for left in state.layout.left_in_float} == in_float


# vmap of gradients


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_per_example(backend):
    """Each example has its gradient; the statistics of all, added up, are those of the batch."""
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, [apt.Rule(acts=16, weights=16, grads=16)], backend=backend)
    state = q.init(p, x[:1])

    def loss(p, taps, row):
        return jnp.sum(q.apply(p, q.with_taps(state, taps), row[None]) ** 2)

    both = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, None, 0))
    each, statistics = jax.jit(both)(p, q.taps(state), x)
    assert each["a"]["kernel"].shape == (4, 5, 5)
    float32 = jax.vmap(jax.grad(lambda p, row: jnp.sum(plain(p, row[None]) ** 2)), in_axes=(None, 0))
    assert_close_gradients(each, jax.jit(float32)(p, x))
    after = q.update(state, jax.tree.map(lambda t: t.sum(0), statistics))
    assert after["a"]["x"].updates == 1
    assert after["a"]["x"].exponent == int(apt.exponent_for(jnp.max(jnp.abs(x)), 16))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_an_ensemble_has_a_precision_per_member(backend):
    """Rounded to nearest: values that differ in their last bit, as vmapped ones may, draw differently."""
    x, members = normal(2, 4, 5), 3
    scales = jnp.array([1.0, 16.0, 1 / 16])
    p = jax.tree.map(lambda w: w[None] * scales[:, None, None], two_layers())
    q = apt.apt_quantize(plain, apt.PRESETS["published"], backend=backend)
    state = q.init(jax.tree.map(lambda w: w[0], p), x)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * members), state)
    step = apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q)
    values, gradients, after = jax.jit(jax.vmap(step))(p, states)
    one_step = jax.jit(step)
    for i in range(members):
        value, gradient, one = one_step(jax.tree.map(lambda w, i=i: w[i], p), state)
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(after.precision.exponent[i], one.precision.exponent)
    assert len(set(np.asarray(after.precision.exponent)[:, 1].tolist())) == 3  # the weight of layer a


def test_no_tracer_leaks(leak_checks):
    p, x = two_layers(), normal(2, 4, 5)
    for fn in (through_nesting, through_custom_jvp):
        q = apt.apt_quantize(fn, backend="xla")
        step = apt.value_and_grad(lambda p, s, q=q: jnp.sum(q.apply(p, s, x)), q)
        assert jax.eval_shape(step, p, q.init(p, x))[0].shape == ()
