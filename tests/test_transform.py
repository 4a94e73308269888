"""The transform: what it finds, what it names, and that the replay through every JAX construct is right."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jax.experimental.sparse import BCOO
from jax.sharding import PartitionSpec

import jax_apt as apt
from jax_apt import xla_ops

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])
WIDE = apt.Rule("", acts=24, weights=24, grads=24)  # so fine that gradients approach float32's


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_and_grads(q, variables, *args):
    """One jitted training step's loss, gradients and next state."""
    state = q.init(variables, *args)

    def loss_fn(variables, state):
        return jnp.mean(q.apply(variables, state, *args) ** 2)

    return jax.jit(apt.value_and_grad(loss_fn, q))(variables, state)


def reference_grads(fn, variables, *args):
    return jax.grad(lambda v: jnp.mean(fn(v, *args) ** 2))(variables)


def assert_close_gradients(actual, expected, tolerance=1e-3):
    for path, (a, e) in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True),
        strict=True,
    ):
        error = float(jnp.linalg.norm(a - e) / (jnp.linalg.norm(e) + 1e-12))
        assert error < tolerance, f"{jax.tree_util.keystr(path[0])}: relative error {error}"


# Constructs: each function hides its products behind one of them


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


def plain(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


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


def two_layers():
    return {"a": {"kernel": normal(0, 5, 5)}, "b": {"kernel": normal(1, 5, 5)}}


@pytest.mark.parametrize("fn", CONSTRUCTS, ids=lambda fn: fn.__name__)
def test_construct_gradients_approach_float32(fn):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(fn, [WIDE], backend="xla")
    value, grads, state = loss_and_grads(q, p, x)
    np.testing.assert_allclose(value, jnp.mean(fn(p, x) ** 2), rtol=1e-4)
    assert_close_gradients(grads, reference_grads(fn, p, x))
    assert {"a", "b"} <= set(state.layout.names())
    assert not state.layout.left_in_float


@pytest.mark.parametrize("fn", CONSTRUCTS, ids=lambda fn: fn.__name__)
def test_construct_is_quantized(fn):
    """Eight bits must show: a product that slipped through would give float32's result."""
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(fn, [apt.Rule("", grads=8)], backend="xla")
    value, grads, _ = loss_and_grads(q, p, x)
    assert value != jnp.mean(fn(p, x) ** 2)
    for got, float32 in zip(jax.tree.leaves(grads), jax.tree.leaves(reference_grads(fn, p, x)), strict=True):
        if jnp.any(float32 != 0):
            assert jnp.any(got != float32)
            assert jnp.linalg.norm(got - float32) < 0.5 * jnp.linalg.norm(float32)


@pytest.mark.parametrize("fn", CONSTRUCTS, ids=lambda fn: fn.__name__)
def test_backends_agree_bit_for_bit(fn):
    p, x = two_layers(), normal(2, 4, 5)
    results = [loss_and_grads(apt.apt_quantize(fn, backend=b), p, x) for b in BACKENDS]
    for value, grads, state in results[1:]:
        assert value == results[0][0]
        assert jax.tree.all(jax.tree.map(jnp.array_equal, grads, results[0][1]))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state.precision, results[0][2].precision))
    state = results[0][2]
    used = {name for name in state.layout.names() if state[name]["x"].updates == 1}
    not_taken = {"through_cond": {"a", "b"}, "through_switch": set(state.layout.names()) - {"b"}}
    assert set(state.layout.names()) - used <= not_taken.get(fn.__name__, set())
    assert state.step == 1


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
    q = apt.apt_quantize(lambda p, x: call(x, p["a"]["kernel"]) @ p["b"]["kernel"], [WIDE], backend="xla")
    value, grads, state = loss_and_grads(q, p, x)
    assert state.layout.names() == ("a", "b")
    np.testing.assert_allclose(value, jnp.mean(plain(p, x) ** 2), rtol=1e-4)
    assert_close_gradients(grads, reference_grads(plain, p, x))


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
    q = apt.apt_quantize(fn, [] if dims == "batch" else [WIDE], backend="xla")
    state = q.init(p, x)
    if dims == "batch":  # no form of its own here: it stays as it is, and the report says so
        assert [left.primitive for left in state.layout.left_in_float] == ["ragged_dot_general"]
    else:
        assert state.layout.names() == ("w",)
    np.testing.assert_allclose(q.apply(p, state, x), fn(p, x), rtol=1e-4, atol=1e-5)


def matrix_of_callback(kind):
    def fn(p, x):
        return kind(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x) @ p["w"]

    return fn


def test_what_stays_in_float_is_listed():
    def solver(p, x):
        w = p["w"]
        solution = lax.custom_linear_solve(lambda v: w @ v, x[0], lambda _, b: jnp.linalg.solve(w, b))
        return solution[None] @ w

    def sparse(p, x):
        return BCOO.fromdense(jnp.eye(4), nse=4) @ p["w"] @ p["w"]

    cases = {
        "custom_linear_solve": solver,
        "bcoo_dot_general": sparse,
        "pure_callback": matrix_of_callback(jax.pure_callback),
        "io_callback": matrix_of_callback(io_callback),
    }
    p, x = {"w": jnp.eye(4) * 2}, normal(0, 3, 4)
    for name, fn in cases.items():
        q = apt.apt_quantize(fn, [WIDE], backend="xla")
        state = q.init(p, x)
        assert name in [left.primitive for left in state.layout.left_in_float]
        np.testing.assert_allclose(q.apply(p, state, x), fn(p, x), rtol=1e-4, atol=1e-5)


def test_while_loop_runs_forward():
    w, x = normal(0, 3, 3), normal(1, 2, 3)

    def fn(p, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x))[1]

    q = apt.apt_quantize(fn, [WIDE], backend="xla")
    state = q.init({"w": w}, x)
    np.testing.assert_allclose(q.apply({"w": w}, state, x), fn({"w": w}, x), rtol=1e-4)
    assert state.layout.names() == ("w",)


def test_scan_over_layers_has_one_precision_per_slice():
    spread = jnp.array([1.0, 16.0, 1 / 16])[:, None, None]
    p, x = {"layers": {"kernel": normal(0, 3, 5, 5) * spread}}, normal(1, 4, 5)

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]["kernel"])[0]

    q = apt.apt_quantize(fn, backend="xla")
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

    q = apt.apt_quantize(fn, backend="xla")
    x = jnp.full((1, 3), 127 / 128)
    _, _, state = loss_and_grads(q, {"w": w}, x)
    assert state["w"]["x"].bits.shape == ()
    assert state["w"]["x"].exponent == int(apt.exponent_for(x[0, 0] * 16, 8))


# Names and rules


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="Conv_0")(x))
        x = x.mean((1, 2))
        return nn.Dense(3, name="Dense_0")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.Conv_0 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.Dense_0 = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.Dense_0(nnx.relu(self.Conv_0(x)).mean((1, 2)))


def plain_net(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["Conv_0"]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
    x = jax.nn.relu(x + p["Conv_0"]["bias"][None, None, None]).mean((1, 2))
    return x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_linen_nnx_and_plain_function_agree(backend):
    x = normal(0, 2, 5, 5, 2)
    params = Net().init(jax.random.key(1), x)["params"]
    graph, nnx_state = nnx.split(NnxNet(nnx.Rngs(0)))
    nnx_state = nnx.State(
        {n: {k: v.replace(params[n][k]) for k, v in sub.items()} for n, sub in nnx_state.items()}
    )
    cases = [
        (Net().apply, {"params": params}),
        (lambda s, x: nnx.merge(graph, s)(x), nnx_state),
        (plain_net, params),
    ]
    results = []
    for fn, variables in cases:
        q = apt.apt_quantize(fn, backend=backend)
        value, grads, state = loss_and_grads(q, variables, x)
        kernels = {
            jax.tree_util.keystr(path, simple=True, separator="/"): g
            for path, g in jax.tree_util.tree_leaves_with_path(grads)
        }
        results.append((state.layout.layers, value, list(kernels.values()), state.precision))
    for layers, value, grads, precision in results[1:]:
        assert layers == results[0][0]
        assert [x.name for x in layers] == ["Conv_0", "Dense_0"]
        assert value == results[0][1]
        assert all(map(jnp.array_equal, grads, results[0][2]))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, precision, results[0][3]))


def test_weight_is_followed_through_rearrangement_and_standardization():
    def fn(p, x):
        w = p["layer"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32).T.reshape(3, 4)
        w = (w - w.mean()) / (w.std() + 1e-6)
        return w @ (x @ p["other"]["w"] + p["other"]["b"][None]).T

    p = {"layer": {"kernel": normal(0, 4, 3)}, "other": {"w": normal(1, 4, 4), "b": jnp.ones(4)}}
    state = apt.apt_quantize(fn).init(p, normal(2, 5, 4))
    assert [(x.name, x.weight_shape) for x in state.layout.layers] == [
        ("other", (4, 4)),
        ("layer", (4, 3)),
    ]


def test_product_of_two_activations_is_quantized_as_such():
    def attention(p, x):
        q = x @ p["query"]["kernel"]
        scores = jax.nn.softmax(q @ x.T)
        return scores @ x

    state = apt.apt_quantize(attention, [apt.Rule("", acts=12)]).init(
        {"query": {"kernel": normal(0, 4, 4)}}, normal(1, 5, 4)
    )
    layers = {x.name: x for x in state.layout.layers}
    assert list(layers) == ["query", "dot_general", "dot_general#1"]
    assert layers["dot_general"].weight_shape is None
    assert layers["dot_general"].widths[:2] == ((12,), (12,))
    assert layers["query"].widths[:2] == ((12,), (8,))


def test_shared_parameter_is_one_layer():
    def tied(p, x):
        return (x @ p["w"]) @ p["w"]

    _, _, state = loss_and_grads(apt.apt_quantize(tied), {"w": normal(0, 3, 3)}, normal(1, 2, 3))
    assert state.layout.names() == ("w",)
    assert state["w"]["dy"].updates == 1


def test_first_matching_rule_wins_and_unused_rule_warns():
    p, x = two_layers(), normal(2, 4, 5)
    rules = [
        apt.Rule("^a$", acts=4, weights=5, grads=apt.Adaptive(6, 12)),
        apt.Rule("b", quantize=False),
        apt.Rule("a", acts=3),
        apt.Rule("no_such_layer"),
    ]
    q = apt.apt_quantize(plain, rules)
    with pytest.warns(UserWarning, match="'a', 'no_such_layer'; the layers are a, b"):
        state = q.init(p, x)
    (layer,) = state.layout.layers
    assert (layer.name, layer.rule, layer.widths) == ("a", "^a$", ((4,), (5,), (6, 12)))
    (left,) = state.layout.left_in_float
    assert (left.name, left.reason) == ("b", "rule 'b'")
    text = str(q.report(state))
    assert "rule 'no_such_layer' hit no layer" in text
    assert "left in float: b (dot_general): rule 'b'" in text


# Arguments


def test_static_and_keyword_arguments_stay_as_they_are():
    class Dropout(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    x = normal(0, 8, 3)
    variables = Dropout().init(jax.random.key(0), x, train=False)
    q = apt.apt_quantize(Dropout().apply, [WIDE], backend="xla")
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    state = q.init(variables, x, **options)
    out, updated = jax.jit(lambda v, s, x: q.apply(v, s, x, **options))(variables, state, x)
    expected, expected_updated = Dropout().apply(variables, x, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(updated) == jax.tree.structure(expected_updated)
    np.testing.assert_allclose(
        q.apply(variables, state, x, train=False),
        Dropout().apply(variables, x, train=False),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    p, x = jax.tree.map(lambda w: w.astype(dtype), two_layers()), normal(2, 4, 5).astype(dtype)
    q = apt.apt_quantize(plain, [WIDE], backend="xla")
    out = q.apply(p, q.init(p, x), x)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), plain(p, x).astype(jnp.float32), rtol=0.05, atol=0.05)
    _, grads, _ = loss_and_grads(q, p, x)
    assert grads["a"]["kernel"].dtype == dtype


# Bad input


def test_errors_at_the_door():
    with pytest.raises(TypeError, match="takes a function, got int"):
        apt.apt_quantize(3)
    with pytest.raises(TypeError, match="rules must be Rule objects, got 'Dense'"):
        apt.apt_quantize(plain, ["Dense"])
    with pytest.raises(TypeError, match="config must be a Config"):
        apt.apt_quantize(plain, config={"alpha": 0.1})
    with pytest.raises(ValueError, match="one of auto, native, xla, emulate; got 'cuda'"):
        apt.apt_quantize(plain, backend="cuda")
    for rules in (apt.Rule("a"), None, {"a": 8}):
        with pytest.raises(TypeError, match=r"rules must be .*Rule.*, got .*; one rule is \[rule\]"):
            apt.apt_quantize(plain, rules)
    with pytest.raises(TypeError, match="pass the Config as config="):
        apt.apt_quantize(plain, apt.Config())


def test_state_missing_from_apply():
    p, x = two_layers(), normal(2, 4, 5)
    with pytest.raises(TypeError, match=r"apply\(variables, state, ...\): the state must be an AptState"):
        apt.apt_quantize(plain).apply(p, x)
    with pytest.raises(TypeError, match="must be an AptState"):
        apt.value_and_grad(lambda v, s: 0.0, apt.apt_quantize(plain))(p, x)


def test_arguments_in_the_wrong_place():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain)
    state = q.init(p, x)
    for call, words in (
        (lambda: q.apply(state, p, x), r"apply\(variables, state, ...\): .* got dict"),
        (lambda: q.apply(p, x, state), r"apply\(variables, state, ...\): .* got ArrayImpl"),
        (lambda: q.apply(p, state, state), "argument 1 is an AptState"),
        (lambda: q.init(p, state, x), "argument 1 is an AptState"),
        (lambda: q.init(state, x), "variables is an AptState"),
        (lambda: q.update(q.taps(state), state), r"update\(state, taps\): .* got dict"),
        (lambda: q.taps(p), r"taps\(state\): .* got dict"),
        (lambda: q.with_taps(p), r"with_taps\(state, taps\): .* got dict"),
        (lambda: q.report(p), r"report\(state\): .* got dict"),
        (lambda: apt.value_and_grad(q, plain), "loss_fn must be a function, got AptFunction"),
        (lambda: apt.value_and_grad(plain, q.apply), "q must be made by apt_quantize, got method"),
        (lambda: apt.value_and_grad(plain, q)(state, p), r"takes \(variables, state, ...\): .* got dict"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_beside_floats_count_as_their_float32_value(dtype, promotion_as_users_have_it):
    q = apt.apt_quantize(lambda p, x: x @ p["w"], backend="xla")
    p, x = {"w": normal(0, 3, 3)}, jnp.arange(6).reshape(2, 3).astype(dtype)
    _, grads, state = loss_and_grads(q, p, x)
    assert state.layout.names() == ("w",)
    expected = loss_and_grads(q, p, x.astype(jnp.float32))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (grads, state), expected[1:]))


def test_a_product_that_sums_nothing_is_left_in_float_and_reported():
    """As einsum writes a scale: there is no depth that integers could make faster."""

    def fn(p, x):
        return jnp.einsum("bi,i->bi", x @ p["w"], p["scale"])

    p, x = {"w": normal(0, 3, 3), "scale": normal(1, 3)}, normal(2, 2, 3)
    q = apt.apt_quantize(fn, [WIDE], backend="xla")
    _, grads, state = loss_and_grads(q, p, x)
    assert state.layout.names() == ("w",)
    (left,) = state.layout.left_in_float
    assert (left.name, left.reason) == ("scale", "nothing is summed: it multiplies element by element")
    assert_close_gradients(grads, reference_grads(fn, p, x))


def test_state_of_another_model_is_named():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain)
    other = {"a": {"kernel": normal(0, 5, 7)}, "c": {"kernel": normal(1, 7, 5)}}
    state = apt.apt_quantize(lambda p, x: x @ p["a"]["kernel"] @ p["c"]["kernel"]).init(other, x)
    with pytest.raises(ValueError, match=r"weight_shape is \(5, 5\) in the function and \(5, 7\)") as e:
        q.apply(p, state, x)
    assert "b: not in the state" in str(e.value)


def test_unsupported_dtypes_name_the_users_line():
    with pytest.raises(TypeError, match=r"layer w: dot_general at .*test_transform.py:\d+ .*complex64"):
        apt.apt_quantize(lambda p, x: x.astype(jnp.complex64) @ p["w"]).init(
            {"w": jnp.ones((3, 3), jnp.complex64)}, jnp.ones((2, 3))
        )
    with jax.enable_x64(True), pytest.raises(TypeError, match="has float64 values"):
        apt.apt_quantize(lambda p, x: x @ p["w"]).init({"w": np.ones((3, 3))}, np.ones((2, 3)))


def test_sums_that_64_bits_may_not_hold_name_the_line_and_the_product():
    rule = apt.Rule("", acts=24, weights=24)
    q = apt.apt_quantize(lambda p, x: x @ p["w"], [rule])
    p, x = {"w": jnp.ones((2**16 + 1, 1))}, jnp.ones((2, 2**16 + 1))
    message = (
        r"layer w: dot_general at .*test_transform.py:\d+ .*forward product sums 65537 terms of 24 x 24 bits"
    )
    with pytest.raises(ValueError, match=message):
        q.apply(p, q.init(p, x), x)
    q.apply({"w": p["w"][1:]}, q.init({"w": p["w"][1:]}, x[:, 1:]), x[:, 1:])  # 2**16 terms fit


def test_integer_product_is_left_alone_and_reported():
    def fn(p, x):
        return x @ p["w"] + (jnp.ones((2, 3), jnp.int32) @ jnp.ones((3, 3), jnp.int32)).astype(jnp.float32)

    q = apt.apt_quantize(fn)
    state = q.init({"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    assert state.layout.names() == ("w",)
    assert state.layout.left_in_float[0].reason == "an integer product is exact already"


def test_integer_parameters_are_named():
    q = apt.apt_quantize(plain)
    p = two_layers() | {"steps": jnp.zeros((), jnp.int32)}
    x = normal(2, 4, 5)
    step = apt.value_and_grad(lambda v, s: jnp.sum(q.apply(v, s, x)), q)
    with pytest.raises(TypeError, match="steps is int32; gradients are taken with respect to float32"):
        step(p, q.init(p, x))


def test_forward_mode_is_refused():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain)
    state = q.init(p, x)
    for derivative in (lambda f: jax.jvp(f, (x,), (x,)), lambda f: jax.jacfwd(f)(x)):
        with pytest.raises(TypeError, match="no forward-mode derivative"):
            derivative(lambda x: q.apply(p, state, x))
        with pytest.raises(TypeError, match="forward-mode autodiff"):  # through jit, JAX's own words
            derivative(jax.jit(lambda x: q.apply(p, state, x)))


def test_second_derivatives_are_refused_rather_than_zero():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend="xla")
    state = q.init(p, x)

    def fn(x):
        return jnp.sum(q.apply(p, state, x))

    assert jax.eval_shape(jax.grad(fn), x).shape == x.shape
    for second in (jax.hessian(fn), jax.grad(lambda x: jnp.sum(jax.grad(fn)(x) ** 2))):
        for derivative in (second, jax.jit(second)):
            with pytest.raises(TypeError, match="no second derivative"):
                jax.eval_shape(derivative, x)


def test_native_that_cannot_run_is_an_error_and_auto_says_why(monkeypatch):
    monkeypatch.setattr("jax_apt.xla_ops.is_available", lambda: False)
    monkeypatch.setattr("jax_apt.xla_ops.unavailable_reason", lambda: "no library")
    p, x = two_layers(), normal(2, 4, 5)
    with pytest.raises(RuntimeError, match="backend 'native' cannot run here: no library"):
        apt.apt_quantize(plain, backend="native").init(p, x)
    layer = apt.apt_quantize(plain).init(p, x).layout.layers[0]
    assert (layer.backend, layer.reason) == ("xla", "native cannot run: no library")


def test_hidden_product_names_the_line():
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    def fn(p, x):
        shape = jax.ShapeDtypeStruct((4, 5), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])

    p, x = {"w": normal(0, 5, 5)}, normal(1, 4, 5)
    words = r"pallas_call at .*test_transform.py:\d+ .* leave it in float with Rule\('.*pallas_call'"
    with pytest.raises(NotImplementedError, match=words):
        apt.apt_quantize(fn).init(p, x)
    q = apt.apt_quantize(fn, [apt.Rule("pallas_call$", quantize=False)])
    state = q.init(p, x)
    assert [left.reason for left in state.layout.left_in_float] == ["rule 'pallas_call$'"]
    np.testing.assert_array_equal(q.apply(p, state, x), fn(p, x))


# Non-finite values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_values_propagate_and_leave_the_state_alone(backend, bad):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend=backend)

    def loss_fn(v, s, x):
        y = q.apply(v, s, x)
        return jnp.sum(y[1:] ** 2), y

    step = jax.jit(apt.value_and_grad(loss_fn, q, has_aux=True))
    (_, y), _, good = step(p, q.init(p, x), x)
    assert jnp.all(jnp.isfinite(y))
    (_, y), grads, after = step(p, good, x.at[0, 2].set(bad))
    float32 = plain(p, x.at[0, 2].set(bad))
    assert jnp.array_equal(jnp.isfinite(y), jnp.isfinite(float32))
    assert after["a"]["x"].nonfinite == 1
    for field in ("bits", "exponent", "range_average", "updates"):
        assert getattr(after["a"]["x"], field) == getattr(good["a"]["x"], field)
    assert after["a"]["x"].next_update <= after.step  # looked at again at once
    assert "1 NaN or infinite values in x" in str(q.report(after))
    assert not jnp.all(jnp.isfinite(grads["a"]["kernel"]))
    (_, y), _, again = step(p, after, x)
    assert jnp.all(jnp.isfinite(y)) and again["a"]["x"].updates == 2


@pytest.mark.parametrize("tensor", ["x", "w", "dy"])
def test_nonfinite_values_of_each_tensor_are_counted_and_keep_its_format(tensor):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend=BACKENDS[-1])

    def loss_fn(p, state, x, weight):
        return jnp.sum(q.apply(p, state, x) * weight)

    step = jax.jit(apt.value_and_grad(loss_fn, q))
    weight = normal(3, 4, 5)
    _, _, good = step(p, q.init(p, x), x, weight)
    values = {"x": x, "w": p["b"]["kernel"], "dy": weight}
    values[tensor] = values[tensor].at[1, 1].set(jnp.nan).at[2, 3].set(jnp.inf)
    bad = p | {"b": {"kernel": values["w"]}}
    _, _, after = step(bad, good, values["x"], values["dy"])
    layer = "a" if tensor == "x" else "b"
    assert after[layer][tensor].nonfinite == 2
    for field in ("bits", "exponent", "range_average", "updates"):
        assert getattr(after[layer][tensor], field) == getattr(good[layer][tensor], field)
    assert f"{layer}: 2 NaN or infinite values in {tensor}" in str(q.report(after))
    loss, grads, again = step(p, after, x, weight)
    assert jnp.isfinite(loss) and jax.tree.all(jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads))
    assert again[layer][tensor].updates == 2 and again[layer][tensor].nonfinite == 2


def test_no_tracer_leaks(leak_checks):
    p, x = two_layers(), normal(2, 4, 5)
    for fn in (through_nesting, through_custom_jvp):
        q = apt.apt_quantize(fn, backend="xla")
        step = apt.value_and_grad(lambda p, s, q=q: jnp.sum(q.apply(p, s, x)), q)
        assert jax.eval_shape(step, p, q.init(p, x))[0].shape == ()


def test_no_unexpected_warnings():
    p, x = two_layers(), normal(2, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = apt.apt_quantize(plain)
        q.apply(p, q.init(p, x), x)
