"""The backward pass makes again what it can: the same gradients, and less that is kept."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_networks import FASTEST

import jax_apt as apt
from jax_apt import residuals, xla_ops

needs_kernels = pytest.mark.skipif(not xla_ops.is_available(), reason="needs the compiled library")


class Normalized(nn.Module):
    """Convolutions, normalization, relu, a shortcut."""

    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            y = nn.Conv(16, (3, 3), use_bias=False)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=False)(y))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(4)(x.mean((1, 2)))


class Pooled(nn.Module):
    """Max pooling and local functions of several kinds."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = jnp.concatenate([nn.gelu(nn.Conv(8, (1, 1))(x)), nn.silu(nn.Conv(8, (1, 1))(x))], axis=-1)
        return nn.Dense(4)(nn.LayerNorm()(x).mean((1, 2)))


def scanned_blocks(p, x):
    """A scan over layers."""

    def block(x, weight):
        return x + nn.gelu(x @ weight), None

    return lax.scan(block, x, p["blocks"])[0]


def jitted(p, x):
    return jax.jit(lambda p, x: jax.jit(nn.gelu)(x @ p["a"]) @ p["b"])(p, x)


def cases():
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    rows = jax.random.normal(jax.random.key(1), (256, 32))
    for module in (Normalized(), Pooled()):
        variables = module.init(jax.random.key(2), images)
        others = {k: v for k, v in variables.items() if k != "params"}

        def apply(params, x, module=module, others=others):
            return module.apply({"params": params, **others}, x, mutable=list(others))[0]

        yield type(module).__name__, apply, variables["params"], images
    blocks = jax.random.normal(jax.random.key(3), (6, 32, 32)) / 6
    yield "scanned", scanned_blocks, {"blocks": blocks}, rows
    yield "jitted", jitted, {"a": blocks[0], "b": blocks[1]}, rows


CASES = {name: case for name, *case in cases()}


def step_of(apply, x, recompute):
    q = apt.apt_quantize(apply, backend=FASTEST)

    def loss_fn(params, state):
        return jnp.mean(q.apply(params, state, x) ** 2)

    return q, jax.jit(apt.value_and_grad(loss_fn, q, recompute=recompute))


@pytest.mark.parametrize("recompute", ["elementwise", "products"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_step(name, recompute):
    apply, params, x = CASES[name]
    q, step = step_of(apply, x, recompute)
    actual = step(params, q.init(params, x))
    q, step = step_of(apply, x, "nothing")
    expected = step(params, q.init(params, x))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Sums of gradients are grouped otherwise; what is made again is the same.
        np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=2e-5, atol=1e-6)


def memory(name, recompute):
    apply, params, x = CASES[name]
    x = jnp.concatenate([x] * 8)
    q, step = step_of(apply, x, recompute)
    return step.lower(params, q.init(params, x)).compile().memory_analysis().temp_size_in_bytes


@needs_kernels
@pytest.mark.parametrize("name", ["Pooled", "jitted"])
def test_less_is_kept(name):
    assert memory(name, "elementwise") < 0.8 * memory(name, "nothing")


@needs_kernels
@pytest.mark.parametrize(("recompute", "part"), [("elementwise", 0.66), ("products", 0.35)])
def test_neither_masks_nor_enlarged_vectors_keep_maps_alive(recompute, part):
    """Of a path of shortcuts XLA would keep every map, to make the masks of relu from them in the end."""
    assert memory("Normalized", recompute) < part * memory("Normalized", "nothing")


@needs_kernels
def test_short_products_are_made_again(monkeypatch):
    """How short they are is a matter of the instruction set."""
    monkeypatch.setitem(residuals._SHORT_OF_ISA, xla_ops.isa(), 144)  # as many as the longest sums here
    short = memory("Normalized", "short_products")
    assert short == memory("Normalized", "products")
    monkeypatch.setitem(residuals._SHORT_OF_ISA, xla_ops.isa(), 143)  # all but the first convolution sum 144
    assert short < 0.8 * memory("Normalized", "short_products")


def counted(closed):
    return [
        residuals._count_terms(eqn.primitive.name, [v.aval for v in eqn.invars], eqn.params)
        for eqn in closed.eqns
    ]


def dot(*shapes, contracted):
    return lambda: jax.make_jaxpr(lambda a, b: lax.dot_general(a, b, (contracted, ((), ()))))(
        *map(jnp.ones, shapes)
    )


def conv(x, w, **params):
    return lambda: jax.make_jaxpr(
        lambda a, b: lax.conv_general_dilated(
            a, b, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **params
        )
    )(jnp.ones(x), jnp.ones(w))


@pytest.mark.parametrize(
    ("terms", "trace"),
    [
        (12, dot((2, 3, 4), (3, 4, 5), contracted=((1, 2), (0, 1)))),
        (3 * 2 * 8, conv((1, 6, 6, 8), (3, 2, 8, 5))),
        (3 * 2 * 4, conv((1, 6, 6, 8), (3, 2, 4, 6), feature_group_count=2)),
        (math.inf, lambda: jax.make_jaxpr(jnp.cumsum)(jnp.ones(4))),
    ],
)
def test_terms_of_a_product(terms, trace):
    assert terms in counted(trace())


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "terms"), [("forward", 9 * 4), ("input_gradient", 9 * 6), ("filter_gradient", 2 * 5 * 5)]
)
def test_terms_of_a_custom_call(kind, terms):
    ones, window, image = (1, 1, 1), (1, 3, 3), (1, 5, 5)
    geometry = xla_ops.Geometry(1, 2, image, image, window, ones, (0, 1, 1), ones, 1, 4, 6)
    shapes = geometry.shapes()
    operands = [jnp.zeros((1, *shapes[role]), jnp.uint8) for role in xla_ops._OPERANDS[kind][:2]]
    trace = jax.make_jaxpr(lambda *codes: xla_ops.product(kind, geometry, *codes, [jnp.int32(8)] * 4))
    assert terms in counted(trace(*operands))


ACTIVATIONS = (
    nn.celu, nn.elu, nn.gelu, nn.hard_sigmoid, nn.hard_swish, nn.leaky_relu, nn.log_sigmoid, nn.relu,
    nn.relu6, nn.selu, nn.sigmoid, nn.silu, nn.soft_sign, nn.softplus, nn.tanh,
    jnp.sinc, lax.logistic, lax.rsqrt,
)  # fmt: skip


@pytest.mark.parametrize("activation", [*ACTIVATIONS, partial(nn.gelu, approximate=False)])
def test_what_activations_are_made_of_is_elementwise(activation):
    """Releases of JAX add primitives; one that is not known here would be kept."""
    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(lambda x: jax.vjp(activation, x)[1](x))(jnp.ones((4, 8)))
    steps = residuals._flatten(closed).steps
    assert steps
    assert {step.eqn.primitive.name for step in steps if not residuals._is_elementwise(step.eqn)} == set()


def test_what_to_recompute_is_checked():
    q = apt.apt_quantize(jitted)
    message = "recompute must be one of nothing, elementwise, short_products, products; got 'everything'"
    with pytest.raises(ValueError, match=message):
        apt.value_and_grad(lambda p, s: 0.0, q, recompute="everything")


@needs_kernels
def test_a_scan_over_layers_keeps_less_than_float32():
    _, params, x = CASES["scanned"]
    x = jnp.concatenate([x] * 8)
    q, step = step_of(scanned_blocks, x, "short_products")
    memory = step.lower(params, q.init(params, x)).compile().memory_analysis().temp_size_in_bytes
    float32 = jax.jit(jax.value_and_grad(lambda p: jnp.mean(scanned_blocks(p, x) ** 2))).lower(params)
    assert memory < 0.6 * float32.compile().memory_analysis().temp_size_in_bytes


def test_auxiliary_data_may_be_anything():
    apply, params, x = CASES["jitted"]
    q = apt.apt_quantize(apply, backend=FASTEST)
    state = q.init(params, x)
    found = []

    def loss_fn(params, state):
        y = q.apply(params, state, x)
        return jnp.mean(y**2), {"mean": y.mean(), "name": "kept", "none": None, "number": 3}

    @jax.jit
    def step(params, state):
        (loss, aux), gradients, state = apt.value_and_grad(loss_fn, q, has_aux=True)(params, state)
        found.append((aux["name"], aux["none"], aux["number"]))
        return loss, aux["mean"], gradients, state

    loss, mean, *_ = step(params, state)
    (expected, aux), *_ = apt.value_and_grad(loss_fn, q, has_aux=True)(params, state)  # without jit
    assert found == [("kept", None, 3)]
    np.testing.assert_allclose([loss, mean], [expected, aux["mean"]], rtol=1e-5)


def test_a_loss_that_is_no_scalar():
    apply, params, x = CASES["jitted"]
    q = apt.apt_quantize(apply, backend=FASTEST)
    step = jax.jit(apt.value_and_grad(lambda p, s: q.apply(p, s, x), q))
    with pytest.raises(TypeError, match=r"the loss must be a real scalar.*float32\[256,32\]"):
        step(params, q.init(params, x))


def test_a_loss_of_several_values():
    apply, params, x = CASES["jitted"]
    q = apt.apt_quantize(apply, backend=FASTEST)
    step = jax.jit(apt.value_and_grad(lambda p, s: (jnp.mean(q.apply(p, s, x)), 1), q))
    with pytest.raises(TypeError, match=r"got \(.*has_aux=True"):
        step(params, q.init(params, x))


def test_results_have_no_derivative():
    """Neither with respect to what is trained, nor to what the loss closes over; JAX would call them zero."""
    apply, params, x = CASES["jitted"]
    q = apt.apt_quantize(apply, backend="xla")
    state = q.init(params, x)

    def results(params, x):
        loss, gradients, _ = apt.value_and_grad(lambda p, s: jnp.mean(q.apply(p, s, x) ** 2), q)(
            params, state
        )
        return loss + jnp.sum(gradients["a"])

    for position in (0, 1):
        with pytest.raises(TypeError, match="what value_and_grad returns has no derivative"):
            jax.jit(jax.grad(results, position))(params, x)


def test_batched_steps():
    """An ensemble: vmap over parameters and states."""
    apply, params, x = CASES["jitted"]
    q, _ = step_of(apply, x, "short_products")
    state = q.init(params, x)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)

    def step(params, state):
        return apt.value_and_grad(lambda p, s: jnp.mean(q.apply(p, s, x) ** 2), q)(params, state)

    loss, gradients, _ = jax.jit(jax.vmap(step))(many, states)
    for i, factor in enumerate((1, 2)):
        one, each, _ = jax.jit(step)(jax.tree.map(lambda leaf, f=factor: f * leaf, params), state)
        np.testing.assert_allclose(loss[i], one, rtol=1e-5)
        np.testing.assert_allclose(gradients["a"][i], each["a"], rtol=1e-4, atol=1e-6)


@needs_kernels
def test_barrier_gives_its_operand_back():
    def function(x, y):
        return xla_ops.barrier(x + 1, y), x + 1

    x, y = jnp.arange(5.0), jnp.ones((2, 2), jnp.int32)
    again, once = jax.jit(function)(x, y)
    assert jnp.array_equal(again, once)
    both = jax.jit(jax.vmap(xla_ops.barrier, (0, None)))(jnp.stack([x, 2 * x]), y)
    assert jnp.array_equal(both, jnp.stack([x, 2 * x]))
    text = jax.jit(function).lower(x, y).compile().as_text()
    assert text.count("jax_apt_barrier") > 0 and "output_to_operand_aliasing" in text
