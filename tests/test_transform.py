"""The transform: what it finds, what it names, which rules hit, and which arguments it takes."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from small_networks import BACKENDS, FASTEST, WIDE, loss_and_grads, normal, plain, two_layers

import jax_apt as apt

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
    q = apt.apt_quantize(Dropout().apply, [WIDE], backend=FASTEST)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    state = q.init(variables, x, **options)
    out, updated = jax.jit(lambda v, s, x: q.apply(v, s, x, **options))(variables, state, x)
    expected, expected_updated = Dropout().apply(variables, x, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(updated) == jax.tree.structure(expected_updated)
    for got, moved in zip(jax.tree.leaves(updated), jax.tree.leaves(expected_updated), strict=True):
        np.testing.assert_allclose(got, moved, rtol=1e-4, atol=1e-5)
    assert jnp.any(updated["batch_stats"]["BatchNorm_0"]["mean"] != 0)  # where it started
    np.testing.assert_allclose(
        q.apply(variables, state, x, train=False),
        Dropout().apply(variables, x, train=False),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    p, x = jax.tree.map(lambda w: w.astype(dtype), two_layers()), normal(2, 4, 5).astype(dtype)
    q = apt.apt_quantize(plain, [WIDE], backend=FASTEST)
    out = q.apply(p, q.init(p, x), x)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), plain(p, x).astype(jnp.float32), rtol=0.05, atol=0.05)
    _, grads, _ = loss_and_grads(q, p, x)
    assert grads["a"]["kernel"].dtype == dtype


def test_no_unexpected_warnings():
    p, x = two_layers(), normal(2, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = apt.apt_quantize(plain)
        q.apply(p, q.init(p, x), x)
