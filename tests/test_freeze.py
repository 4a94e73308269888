"""Frozen weights: codes where only products use a parameter, and the forward pass of training bit for bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_apt as apt
from jax_apt import _jax_versions as versions
from jax_apt import xla_ops

BACKENDS = ["xla"] + (["native"] if xla_ops.is_available() else [])
RULES = [
    apt.Rule("float", quantize=False),
    apt.Rule("dw_only", gemms=("dw",)),
    apt.Rule("deep", acts=apt.Adaptive(8, 16), weights=apt.Adaptive(8, 16, 24)),
    apt.Rule("tied#1", weights=6),
    apt.Rule("wide", weights=16),
]


@jax.custom_vjp
def own_rule(x, w):
    return jnp.tanh(x @ w)


own_rule.defvjp(lambda x, w: (jnp.tanh(x @ w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def network(p, ids, image):
    """Weights moved, cast, sliced, shared, stacked, computed, in and out of every kind of body."""
    h = p["embed"]["embedding"][ids]  # a lookup: float; used again as a weight at the end
    h = jax.jit(lambda h, w: h @ jnp.swapaxes(w, 0, 1))(h, p["turned"]["w"])
    q, k = (h @ p["fused"]["w"][i] for i in range(2))
    h = jax.checkpoint(lambda q, k, w: (q + k) @ w)(q, k, p["wide"]["w"])
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["deep"]["w"])[0]
    h = lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["loop"]["w"]), h)
    h = lax.cond(jnp.sum(h) > -1e9, lambda h, w: h @ w, lambda h, w: h @ w.T, h, p["branch"]["w"])
    h = own_rule(h, p["own"]["w"])
    h = (h.astype(jnp.bfloat16) @ p["cast"]["w"].astype(jnp.bfloat16)).astype(jnp.float32)
    h = h @ (p["computed"]["w"] - jnp.mean(p["computed"]["w"])) + h @ p["float"]["w"] + h @ p["dw_only"]["w"]
    h = h + lax.conv(image, p["conv"]["w"], (1, 1), "VALID").sum((2, 3)) + p["bias"][None]
    return h @ p["embed"]["embedding"].T, p["unused"]


def example():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    squares = ("turned", "wide", "loop", "branch", "own", "cast", "computed", "float", "dw_only")
    p = {name: {"w": normal(4, 4)} for name in squares}
    p |= {
        "embed": {"embedding": normal(5, 4)},
        "fused": {"w": normal(2, 4, 4)},
        "deep": {"w": normal(2, 4, 4)},
    }
    p |= {"conv": {"w": normal(4, 3, 2, 2)}, "bias": normal(4), "unused": normal(1)}
    return p, (jnp.array([0, 2, 4]), normal(3, 3, 3, 3))


def measured(state, **bits):
    """As after training: every tensor with a format of its own that clips some values."""
    precision = state.precision
    count = len(precision.bits)
    exponent = jnp.asarray(np.random.default_rng(1).integers(-7, -4, count), jnp.int32)
    new = np.array(precision.bits)
    for layer, rows in state.layout.rows():
        if layer.name in bits:
            new[rows] = bits[layer.name]
    exponent = exponent - (jnp.asarray(new) - 8)
    return replace(
        state,
        step=jnp.int32(7),
        precision=precision._replace(
            bits=jnp.asarray(new), exponent=exponent, updates=jnp.ones(count, jnp.int32)
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_equals_training_bit_for_bit(backend):
    p, inputs = example()
    q = apt.apt_quantize(network, RULES[:3] + RULES[4:], backend=backend)
    state = measured(q.init(p, *inputs), deep=[16, 8, 8, 8, 24, 24])
    frozen = apt.freeze(q, p, state, *inputs)
    got = assert_same_result(q, frozen, p, state, *inputs)
    assert jnp.any(got[0] != network(p, *inputs)[0])

    assert weights_quantized(lambda f: apt.apply_frozen(q, f, *inputs), frozen) == 1  # the computed one
    leaves = {
        name: leaf["w"] if isinstance(leaf, dict) else leaf
        for name, leaf in frozen.variables.items()
        if name != "embed"
    }
    kinds = {name: type(leaf) for name, leaf in leaves.items()}
    floats = {"computed", "float", "dw_only", "bias", "unused"}
    assert {name for name, kind in kinds.items() if issubclass(kind, jax.Array)} == floats
    assert {name for name, kind in kinds.items() if kind is apt.Fixed} == set(kinds) - floats
    assert isinstance(frozen.variables["embed"]["embedding"], apt.SharedWeight)
    dtypes = {name: frozen.variables[name]["w"].codes.dtype for name in ("turned", "wide", "deep")}
    assert dtypes == {"turned": jnp.int8, "wide": jnp.int16, "deep": jnp.int32}
    assert frozen.variables["deep"]["w"].exponent.shape == (2,)


def assert_same_result(q, frozen, p, state, *inputs):
    """The result on frozen weights, after a comparison with that on the weights themselves."""

    @jax.jit
    def both(frozen, p, state, inputs):
        return apt.apply_frozen(q, frozen, *inputs), q.apply(p, state, *inputs)

    got, expected = both(frozen, p, state, inputs)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), got, expected))
    return got


def weights_quantized(fn, *args):
    """How many tensors are quantized in the program that are no activation, as their shapes tell."""
    shapes = []

    def walk(program):
        for eqn in program.jaxpr.eqns:
            name = eqn.params.get("target_name", eqn.primitive.name)
            if name in ("round", "jax_apt_quantize", "jax_apt_adapt"):
                shapes.append(versions.aval(eqn.invars[0]).shape)
            for body in versions.sub_jaxprs(eqn):
                walk(body)

    walk(jax.make_jaxpr(fn)(*args))
    assert (3, 4) in shapes and (3, 3, 3, 3) in shapes  # activations
    return sum(shape not in ((3, 4), (3, 3, 3, 3)) for shape in shapes)


def two_layers():
    rng = np.random.default_rng(0)
    p = {
        "a": {"kernel": rng.normal(size=(3, 4)), "bias": np.zeros(4)},
        "b": {"kernel": rng.normal(size=(4, 2))},
    }
    return jax.tree.map(jnp.float32, p), jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def dense(p, x, scale=None):
    h = x @ p["a"]["kernel"] + p["a"]["bias"][None]
    h = h @ p["b"]["kernel"]
    return h if scale is None else h * jnp.sum(p["b"]["kernel"])


def test_a_quarter_of_the_bytes_in_the_structure_of_the_parameters():
    p, x = two_layers()
    q = apt.apt_quantize(dense, backend="xla")
    frozen = apt.freeze(q, p, measured(q.init(p, x)), x)
    kernel = frozen.variables["a"]["kernel"]
    assert isinstance(kernel, apt.Fixed) and kernel.codes.dtype == jnp.int8 and kernel.codes.shape == (3, 4)
    np.testing.assert_allclose(apt.dequantize(kernel), p["a"]["kernel"], atol=2.0)
    assert frozen.variables["a"]["bias"] is p["a"]["bias"]
    report = frozen.report()
    assert report.bytes == (12 + 8) + 8 + 8 + 16 and report.bytes_before == 48 + 16 + 32
    assert "a/kernel: integer, 20 bytes for 48: a" in str(report)
    assert "a/bias: stays float: broadcast_in_dim" not in str(report)
    assert report.to_dict()["weights"][1]["layers"] == (("a", 0),)


def test_tied_weights_keep_a_code_for_each_format():
    def tied(p, x):
        return x @ p["tied"]["w"] @ p["tied"]["w"].T

    p, x = {"tied": {"w": two_layers()[0]["a"]["kernel"]}}, jnp.ones((2, 3))
    q = apt.apt_quantize(tied, backend="xla")
    assert isinstance(apt.freeze(q, p, measured(q.init(p, x)), x).variables["tied"]["w"], apt.Fixed)

    def in_two_forms(p, x):
        out = lax.conv(x[:, :, None], p["tied"]["w"].T[:, :, None], (1,), "VALID")[:, :, 0]
        return x @ p["tied"]["w"] + out

    q = apt.apt_quantize(in_two_forms, [apt.Rule(primitive="conv_general_dilated", weights=6)], backend="xla")
    state = measured(q.init(p, x))
    assert state.layout.names() == ("tied", "tied#1") and {int(b) for b in state.precision.bits} == {6, 8}
    frozen = apt.freeze(q, p, state, x)
    shared = frozen.variables["tied"]["w"]
    assert [int(number.bits) for number in shared.numbers] in ([8, 6], [6, 8]) and shared.value is None
    assert_same_result(q, frozen, p, state, x)


def test_what_was_never_measured_is_quantized_at_each_call():
    p, x = two_layers()
    q = apt.apt_quantize(dense, backend="xla")
    state = q.init(p, x)
    frozen = apt.freeze(q, p, state, x)
    assert jax.tree.structure(frozen.variables) == jax.tree.structure(p)
    assert "a: its weight is quantized at each call: never measured" in str(frozen.report())
    assert_same_result(q, frozen, p, state, x)


def test_errors_name_the_cause():
    p, x = two_layers()
    q = apt.apt_quantize(dense, backend="xla")
    state = measured(q.init(p, x))
    frozen = apt.freeze(q, p, state, x)
    with pytest.raises(ValueError, match="b/kernel was frozen without its float value"):
        apt.apply_frozen(q, frozen, x, scale=2.0)
    other = apt.apt_quantize(lambda p, x: (x @ p["a"]["kernel"]).T @ x @ x.T, backend="xla")
    with pytest.raises(ValueError, match=r"another function: it has not the layer\(s\) dot_general"):
        apt.apply_frozen(other, frozen, x)
    bad = p | {"b": {"kernel": p["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="b/kernel has 1 NaN or infinite values"):
        apt.freeze(q, bad, state, x)
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda p: apt.freeze(q, p, state, x).variables)(p)
    with pytest.raises(TypeError, match="q must be made by apt_quantize, got function"):
        apt.freeze(dense, p, state, x)
    with pytest.raises(TypeError, match="frozen must be a Frozen, got dict"):
        apt.apply_frozen(q, p, x)


def test_a_derivative_is_refused():
    """It would be zero: codes are rounded."""
    p, x = two_layers()
    q = apt.apt_quantize(dense, backend="xla")
    frozen = apt.freeze(q, p, measured(q.init(p, x)), x)
    with pytest.raises(TypeError, match=r"the forward pass alone; differentiate q.apply"):
        jax.make_jaxpr(jax.grad(lambda x: jnp.sum(apt.apply_frozen(q, frozen, x))))(x)


def test_nan_activations_go_where_float32_takes_them():
    p, x = two_layers()
    q = apt.apt_quantize(dense, backend="xla")
    state = measured(q.init(p, x))
    x = x.at[0, 0].set(jnp.nan)
    got = assert_same_result(q, apt.freeze(q, p, state, x), p, state, x)
    assert jnp.all(jnp.isnan(got[0])) and not jnp.any(jnp.isnan(got[1:]))


def test_a_dictionary_and_back():
    p, inputs = example()
    q = apt.apt_quantize(network, RULES[:3], backend="xla")
    frozen = apt.freeze(q, p, measured(q.init(p, *inputs)), *inputs)
    saved = jax.tree.map(np.asarray, apt.frozen_to_state_dict(frozen))
    assert saved["weights"]["turned"]["w"]["codes"].dtype == np.int8
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
    again = apt.frozen_from_state_dict(shapes, saved)
    assert again.layout == frozen.layout
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, frozen))
    with pytest.raises(ValueError, match="other parameters than `variables`: own/w"):
        apt.frozen_from_state_dict({k: v for k, v in shapes.items() if k != "own"}, saved)
    with pytest.raises(ValueError, match="the saved frozen model has format 99"):
        apt.frozen_from_state_dict(shapes, saved | {"format_version": 99})
