"""Products as models write them: each is found, named and quantized as what it is, with right gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_networks import FASTEST, WIDE, assert_close_gradients, loss_and_grads, normal, reference

import jax_apt as apt

NHWC = ("NHWC", "HWIO", "NHWC")
ACTS = apt.Rule(acts=12, weights=24, grads=24)  # shows which operands count as activations


def layers_of(fn, p, x):
    return {layer.name: layer for layer in apt.apt_quantize(fn, [ACTS]).init(p, x).layout.layers}


def check_step(fn, p, x):
    """A training step in wide formats against float32; the state after it."""
    value, gradients, state = loss_and_grads(apt.apt_quantize(fn, [WIDE], backend=FASTEST), p, x)
    expected, float32 = reference(fn, p, x)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert_close_gradients(gradients, float32)
    assert not state.layout.left_in_float
    return state


def attention(p, x):
    """Multi-head attention; every product an einsum."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhqt,bthk->bqhk", weights, v), p["out"]["kernel"])


def test_multi_head_attention():
    shapes = {"query": (6, 2, 3), "key": (6, 2, 3), "value": (6, 2, 3), "out": (2, 3, 6)}
    p = {name: {"kernel": 0.5 * normal(i, *shape)} for i, (name, shape) in enumerate(shapes.items())}
    x = normal(9, 2, 5, 6)
    layers = layers_of(attention, p, x)
    products = {name: layer for name, layer in layers.items() if name not in shapes}
    assert set(shapes) < set(layers) and len(products) == 2
    for name, layer in layers.items():
        both = ((12,), (12,)) if name in products else ((12,), (24,))
        assert layer.widths[:2] == both, name
        assert layer.weight_shape == shapes.get(name)
    state = check_step(attention, p, x)
    for name in layers:
        assert [int(state[name][t].updates) for t in ("x", "w", "dy")] == [1, 1, 1], name


def test_an_embedding_as_a_matrix_product_gives_rows_of_the_quantized_table():
    """One-hot codes are exact at every width, so nothing but the table is rounded."""

    def embed(p, tokens):
        return jax.nn.one_hot(tokens, 7) @ p["embedding"]

    p, tokens = {"embedding": normal(0, 7, 5)}, jnp.array([[3, 0], [6, 3]])
    assert layers_of(embed, p, tokens)["embedding"].widths[:2] == ((12,), (24,))
    q = apt.apt_quantize(embed, backend=FASTEST)
    _, gradients, _ = loss_and_grads(q, p, tokens)
    rows = apt.quantize_to(p["embedding"], 8)[tokens]
    np.testing.assert_array_equal(q.apply(p, q.init(p, tokens), tokens), rows)
    assert not np.any(gradients["embedding"][jnp.array([1, 2, 4, 5])])  # tokens that are not there
    assert np.all(np.any(gradients["embedding"][jnp.array([0, 3, 6])], axis=1))


def test_tied_weights_are_one_layer():
    """The table embeds tokens and, transposed, gives their scores: one entry, statistics of both uses."""

    def tied(p, tokens):
        h = jnp.tanh(jax.nn.one_hot(tokens, 7) @ p["table"]) @ p["dense"]["kernel"]
        return h @ p["table"].T

    p, tokens = {"table": normal(0, 7, 5), "dense": {"kernel": normal(1, 5, 5)}}, jnp.array([3, 0, 6, 3])
    state = check_step(tied, p, tokens)
    assert state.layout.names() == ("table", "dense")
    h = jnp.tanh(p["table"][tokens]) @ p["dense"]["kernel"]
    widest = max(1.0, float(jnp.max(jnp.abs(h))))  # the one-hot codes, or what goes into the scores
    assert state["table"]["x"].exponent == int(apt.exponent_for(jnp.float32(widest), 24))


@pytest.mark.parametrize(("groups", "channels"), [(2, 2), (4, 1)], ids=["grouped", "depthwise"])
def test_grouped_convolutions(groups, channels):
    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["kernel"],
            (1, 2),
            "SAME",
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    p, x = {"kernel": normal(0, 3, 3, channels, 8)}, normal(1, 2, 5, 6, 4)
    assert layers_of(fn, p, x)["kernel"].primitive == "conv_general_dilated"
    check_step(fn, p, x)


def taps(x):
    """(N, H, W, C) -> (N, H - 2, W - 2, 9 C): the pixels under a 3 x 3 window."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)


def test_a_convolution_written_as_dot_general_is_one():
    """The same codes and exact sums: output and weight gradient are those of the convolution, bit for bit."""

    def convolution(p, x):
        return lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=NHWC)

    def by_taps(p, x):
        return taps(x) @ p["kernel"].reshape(-1, 4)

    def by_patches(p, x):
        kernel = jnp.moveaxis(p["kernel"], 2, 0).reshape(-1, 4)  # patches run by channel, then by tap
        return lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "VALID", dimension_numbers=NHWC) @ kernel

    p, x = {"kernel": normal(0, 3, 3, 2, 4)}, normal(1, 2, 5, 6, 2)
    expected, gradients, state = loss_and_grads(apt.apt_quantize(convolution, backend=FASTEST), p, x)
    for fn in (by_taps, by_patches):
        value, got, other = loss_and_grads(apt.apt_quantize(fn, backend=FASTEST), p, x)
        assert other["kernel"]["w"].exponent == state["kernel"]["w"].exponent
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_array_equal(got["kernel"], gradients["kernel"])


# What the product was asked for


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_preferred_element_type_is_that_of_the_result(dtype):
    """Products of half precision that ask for float32 sums get them, never rounded to half."""

    def fn(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    x = jnp.asarray([[1.0, 2.0**-9, 0.5]], dtype)
    p = {"w": jnp.ones((3, 1), dtype)}
    q = apt.apt_quantize(fn, [apt.Rule(acts=16)], backend=FASTEST)
    out = q.apply(p, q.init(p, x), x)
    assert out.dtype == jnp.float32 and out[0, 0] == 1.5 + 2.0**-9
    assert out[0, 0].astype(dtype).astype(jnp.float32) != out[0, 0] or dtype == jnp.float16
    _, gradients, _ = loss_and_grads(q, p, x)
    assert gradients["w"].dtype == dtype


def products_in(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products_in(inner)


@pytest.mark.parametrize("rule", [apt.Rule(quantize=False), apt.Rule(gemms=("dw",))], ids=["float", "switch"])
def test_products_in_float_keep_their_precision(rule):
    def fn(p, x):
        return jnp.matmul(x, p["w"], precision=lax.Precision.HIGHEST)

    p, x = {"w": normal(0, 3, 4)}, normal(1, 2, 3)
    q = apt.apt_quantize(fn, [rule], backend="xla")
    state = q.init(p, x)
    gradient = jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(q.apply(p, state, x) ** 2), argnums=(0, 1)))(p, x)
    in_float = [e for e in products_in(gradient.jaxpr) if e.outvars[0].aval.dtype == jnp.float32]
    assert len(in_float) >= 2
    for eqn in in_float:
        assert set(eqn.params["precision"]) == {lax.Precision.HIGHEST}


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_beside_floats_count_as_their_float32_value(dtype, promotion_as_users_have_it):
    q = apt.apt_quantize(lambda p, x: x @ p["w"], backend=FASTEST)
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
    q = apt.apt_quantize(fn, [WIDE], backend=FASTEST)
    _, grads, state = loss_and_grads(q, p, x)
    assert state.layout.names() == ("w",)
    (left,) = state.layout.left_in_float
    assert (left.name, left.reason) == ("scale", "nothing is summed: it multiplies element by element")
    assert_close_gradients(grads, reference(fn, p, x)[1])
