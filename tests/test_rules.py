"""What a rule switches: which of the three products are quantized, how gradients are rounded, whom it hits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_apt as apt
from jax_apt import fixed_point, xla_ops

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def matmul(w, x):
    return x @ w


def weight_first(w, x):
    return (w.T @ x.T).T


def products(fn, rule, w, x, dy, backend="xla"):
    """(Y, dW, dX) of one layer."""
    q = apt.apt_quantize(fn, [rule], backend=backend)
    state = q.init(w, x)

    def all_three(w, x, dy):
        y, pullback = jax.vjp(lambda w, x: q.apply(w, state, x), w, x)
        return y, *pullback(dy)

    return jax.jit(all_three)(w, x, dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fn", [matmul, weight_first], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("gemms", [("fwd",), ("dx",), ("dw",), ("fwd", "dx"), ("dx", "dw"), ("fwd", "dw")])
def test_each_product_is_switched_alone(gemms, fn, backend):
    """A product that is on equals that of the whole layer in fixed point, one that is off float32's."""
    w, x, dy = normal(0, 7, 5), normal(1, 4, 7), normal(2, 4, 5)
    on = products(fn, apt.Rule(), w, x, dy, backend)
    got = products(fn, apt.Rule(gemms=gemms), w, x, dy, backend)
    y, pullback = jax.vjp(fn, w, x)
    off = (y, *pullback(dy))
    for gemm, g, fixed, float32 in zip(("fwd", "dw", "dx"), got, on, off, strict=True):
        assert not jnp.array_equal(fixed, float32)
        if gemm in gemms:
            np.testing.assert_array_equal(g, fixed)
        else:
            np.testing.assert_allclose(g, float32, rtol=1e-6, atol=1e-6)


def test_tensors_that_no_product_quantizes_are_not_measured_and_reported_as_float():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    q = apt.apt_quantize(matmul, [apt.Rule("", gemms=("fwd",))], backend="xla")
    _, _, state = apt.value_and_grad(lambda w, s: jnp.sum(q.apply(w, s, x)), q)(w, q.init(w, x))
    updates = {tensor: int(p.updates) for tensor, p in state["parameter"].items()}
    assert updates == {"x": 1, "w": 1, "dy": 0}
    report = q.report(state)
    assert report.to_dict()["layers"][0]["gemms"] == ["fwd"]
    assert str(report).splitlines()[1].split() == [
        "parameter",
        "dot_general",
        "xla",
        "''",
        "fwd",
        "8",
        "8",
        "float",
        "-",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased_and_changes_with_the_step(backend):
    """A gradient of a third of a step: nearest loses it, stochastic rounding keeps it on average."""
    count = 3000
    w, x = jnp.eye(1), jnp.ones((count, 1))
    dy = jnp.full((count, 1), 1 / 3).at[0, 0].set(127.0)

    def gradient(rounding, step=0):
        q = apt.apt_quantize(matmul, [apt.Rule("", grads=8, rounding=rounding)], backend=backend)
        state = q.init(w, x)
        state = apt.AptState(jnp.int32(step), state.precision, None, state.layout)
        return jax.vjp(lambda x: q.apply(w, state, x), x)[1](dy)[0]

    assert float(jnp.sum(gradient("nearest")[1:])) == 0
    drawn = gradient("stochastic")[1:]
    assert set(np.unique(drawn)) == {0.0, 1.0}
    deviation = np.sqrt(2 / 9 / (count - 1))
    assert abs(float(jnp.mean(drawn)) - 1 / 3) < 4 * deviation
    np.testing.assert_array_equal(drawn, gradient("stochastic")[1:])  # the same step repeats itself
    assert not jnp.array_equal(drawn, gradient("stochastic", step=1)[1:])


def test_stochastic_rounding_leaves_what_is_on_the_grid_and_marks_nonfinite_values():
    x = jnp.array([0.5, -0.25, 200.0, -200.0, jnp.nan, jnp.inf])
    got = fixed_point.round_stochastically(x, 8, jnp.int32(-2), jax.random.key(0))
    np.testing.assert_array_equal(got, [0.5, -0.25, 31.75, -31.75, np.nan, np.inf])


def test_rules_by_primitive_and_shape():
    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=dims)
        x = lax.conv_general_dilated(x, p["pointwise"], (1, 1), "SAME", dimension_numbers=dims)
        return x.mean((1, 2)) @ p["head"]

    p = {"first": normal(0, 3, 3, 2, 4), "pointwise": normal(1, 1, 1, 4, 4), "head": normal(2, 4, 3)}
    rules = [
        apt.Rule(shape=(1, 1, None, None), weights=4),
        apt.Rule(primitive="conv_general_dilated", weights=5),
        apt.Rule("head", shape=(4, 4), weights=6),
    ]
    q = apt.apt_quantize(fn, rules)
    with pytest.warns(UserWarning, match=r"'head shape=\(4, 4\)'; the layers are"):
        layers = {x.name: x for x in q.init(p, normal(3, 1, 4, 4, 2)).layout.layers}
    assert {n: x.widths[1] for n, x in layers.items()} == {"first": (5,), "pointwise": (4,), "head": (8,)}
    assert layers["pointwise"].rule == "shape=(1, 1, None, None)"
    assert layers["first"].rule == "primitive=conv_general_dilated"


def test_wrong_switches_are_named():
    with pytest.raises(
        ValueError, match=r"gemms must be a tuple of fwd, dx, dw, at least one; got \('bwd',\)"
    ):
        apt.Rule(gemms=("bwd",))
    with pytest.raises(ValueError, match="got 'dx'"):
        apt.Rule(gemms="dx")
    with pytest.raises(ValueError, match=r"got \(\)"):
        apt.Rule(gemms=())
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic; got 'up'"):
        apt.Rule(rounding="up")


@pytest.mark.parametrize("name", sorted(apt.PRESETS))
def test_presets_do_what_their_names_say(name):
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    (layer,) = apt.apt_quantize(matmul, apt.PRESETS[name]).init(w, x).layout.layers
    expected = {
        "uniform_int8": (((8,),) * 3, ("fwd", "dx", "dw"), "nearest"),
        "uniform_int16": (((16,),) * 3, ("fwd", "dx", "dw"), "nearest"),
        "forward_only": (((8,), (8,), (8, 16, 24)), ("fwd",), "nearest"),
        "stochastic_gradients": (((8,),) * 3, ("fwd", "dx", "dw"), "stochastic"),
        "float_weight_gradient": (((8,),) * 3, ("fwd", "dx"), "nearest"),
    }[name]
    assert (layer.widths, layer.gemms, layer.rounding) == expected


def test_ends_in_float():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a.b"]) @ p["m"]) @ p["z"]

    p, x = {n: normal(i, 3, 3) for i, n in enumerate(("a.b", "m", "z"))}, normal(3, 2, 3)
    q = apt.apt_quantize(fn, apt.ends_in_float(fn, p, x))
    layout = q.init(p, x).layout
    assert layout.names() == ("m",)
    assert [left.name for left in layout.left_in_float] == ["a.b", "z"]
