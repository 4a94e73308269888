"""Weight gradients of a scan over time: products over all steps, with the numbers of the sum over steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.extend import core as jex_core

import jax_apt as apt
from jax_apt import scan_over_time, xla_ops

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])
STEPS, BATCH, IN, OUT = 6, 3, 5, 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def recurrent(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["i"] + h @ params["h"])
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], OUT)), xs)[1]


def used_elsewhere(params, xs):
    """The same, with weights that the body also adds to its output, times zero."""

    def step(h, x):
        h = jnp.tanh(x @ params["i"] + h @ params["h"])
        return h, h + 0 * (jnp.sum(params["i"]) + jnp.sum(params["h"]))

    return lax.scan(step, jnp.zeros((xs.shape[1], OUT)), xs)[1]


def made_in_the_loop(params, xs):
    """The same, with both weights cut from one in the body."""
    both = jnp.concatenate([params["i"], params["h"]])

    def step(h, x):
        h = jnp.tanh(x @ both[:IN] + h @ both[IN:])
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], OUT)), xs)[1]


def weight_first(params, xs):
    def step(h, x):
        h = jnp.tanh(params["i"].T @ x + params["h"].T @ h)
        return h, h

    hs = lax.scan(step, jnp.zeros((OUT, xs.shape[1])), xs.transpose(0, 2, 1))[1]
    return hs.transpose(0, 2, 1)


def twice_a_step(params, xs):
    def step(h, x):
        h = jnp.tanh((x @ params["i"]) @ params["h"] + h @ params["h"])
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], OUT)), xs, reverse=True)[1]


PARAMS, XS = {"i": normal(0, IN, OUT), "h": normal(1, OUT, OUT)}, normal(2, STEPS, BATCH, IN)


def training(fn, backend, params, xs, rules=()):
    config = apt.Config(steps_per_epoch=100, initial_fraction=0.01)
    q = apt.apt_quantize(fn, rules, backend=backend, config=config)
    step = apt.value_and_grad(lambda params, state: jnp.sum(q.apply(params, state, xs) ** 2), q)
    return step, q.init(params, xs)


def gradients(fn, backend, params=PARAMS, xs=XS, rules=()):
    """Gradients of two training steps: the first measures, the second does not."""
    step, state = training(fn, backend, params, xs, rules)
    step = jax.jit(step)
    _, first, state = step(params, state)
    return first, step(params, state)[1]


def program(fn, rules=()):
    step, state = training(fn, "xla", PARAMS, XS, rules)
    return jax.make_jaxpr(step)(PARAMS, state)


def loops(jaxpr):
    """Every scan of a program, and those in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from loops(inner)


def adds_in_loops(jaxpr, shape):
    """Whether a loop backwards in time adds arrays of this shape at every step."""

    def adds(jaxpr):
        return any(
            (eqn.primitive.name in ("add", "add_any") and eqn.outvars[0].aval.shape == shape)
            for eqn in jaxpr.eqns
        )

    return any(adds(eqn.params["jaxpr"].jaxpr) for eqn in loops(jaxpr.jaxpr) if eqn.params["reverse"])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fn", [recurrent, weight_first, twice_a_step])
def test_all_backends_give_the_same_gradient(fn, rounding):
    rules = [apt.Rule(rounding=rounding)]
    grads = [gradients(fn, backend, rules=rules) for backend in BACKENDS]
    for other in grads[1:]:
        jax.tree.map(np.testing.assert_array_equal, grads[0], other)


def test_it_is_the_sum_over_the_steps():
    rules = [apt.Rule(rounding="nearest")]  # at random, the loop and what is after it draw apart
    expected = gradients(used_elsewhere, "xla", rules=rules)
    for fn in (recurrent, made_in_the_loop, weight_first):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
            gradients(fn, "xla", rules=rules),
            expected,
        )


def test_it_is_rounded_once():
    """A step's products are exact in float32 here, but their sum over many steps is not."""
    xs = jnp.concatenate([jnp.full((1, 1, 1), 1.0), jnp.full((4096, 1, 1), 2.0**-6)])
    weight = jnp.ones((1, 1))
    scale = jnp.concatenate([jnp.full((1, 1, 1), 2.0**20), jnp.full((4096, 1, 1), 2.0**14)])

    def fn(params, xs):  # its first gradient is 64 times the others
        return lax.scan(lambda _, x: (None, x @ params), None, xs)[1] * scale

    rules = [apt.Rule(acts=16, weights=16, grads=16)]
    config = apt.Config(steps_per_epoch=10**4, initial_fraction=1e-4)
    q = apt.apt_quantize(fn, rules, backend="xla", config=config)
    state = q.init(weight, xs)
    step = jax.jit(apt.value_and_grad(lambda params, state: jnp.sum(q.apply(params, state, xs)), q))
    for _ in range(2):
        _, grad, state = step(weight, state)
    np.testing.assert_array_equal(grad, [[np.float32(2.0**20 + 4096 * 2.0**8)]])


def test_the_loop_adds_no_weight_gradients():
    assert adds_in_loops(program(used_elsewhere), (OUT, OUT))
    for fn in (recurrent, made_in_the_loop):
        assert not adds_in_loops(program(fn), (OUT, OUT))


def scaled(params, xs):
    """Gradients of the two products differ by a factor."""

    def step(h, x):
        h = jnp.tanh(x @ params["i"] + 2 * (h @ params["h"]))
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], OUT)), xs)[1]


def gated(params, xs):
    """An LSTM: both products are split into gates, and these added; one has a bias."""

    def step(carry, x):
        h, c = carry
        ours, theirs = jnp.split(x @ params["i"], 2, 1), jnp.split(h @ params["h"] + 0.1, 2, 1)
        gate, new = (a + b for a, b in zip(ours, theirs, strict=True))
        c = jax.nn.sigmoid(gate) * c + jnp.tanh(new)
        return (jnp.tanh(c), c), c

    zeros = jnp.zeros((xs.shape[1], OUT // 2))
    return lax.scan(step, (zeros, zeros), xs)[1]


HALF = {"i": PARAMS["i"], "h": PARAMS["h"][: OUT // 2]}


@pytest.mark.parametrize(
    ("fn", "params", "shared"),
    [(recurrent, PARAMS, 1), (gated, HALF, 1), (scaled, PARAMS, 0), (twice_a_step, PARAMS, 1)],
)
def test_equal_gradients_are_stacked_once(fn, params, shared, monkeypatch):
    find, found = scan_over_time.find_equal_gradients, []

    def spy(*args):
        found.append(find(*args))
        return found[-1]

    monkeypatch.setattr(scan_over_time, "find_equal_gradients", spy)
    ours = gradients(fn, "emulate", params)
    assert sum(i != first for i, first in found[0].items()) == shared
    monkeypatch.setattr(scan_over_time, "find_equal_gradients", lambda _, __, probes: {i: i for i in probes})
    alone = gradients(fn, "emulate", params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_random_rounding_is_drawn_per_step_and_unbiased(backend):
    """At 4 bits, 500 times the same gradient: to nearest its error stays, at random it averages out."""
    exact = jax.grad(lambda params: jnp.sum(recurrent(params, XS) ** 2))(PARAMS)
    errors = {}
    for rounding in ("nearest", "stochastic"):
        rules = [apt.Rule(acts=24, weights=24, grads=4, rounding=rounding)]
        assert not adds_in_loops(program(recurrent, rules), (OUT, OUT))
        step, state = training(recurrent, backend, PARAMS, XS, rules)

        def again(state, _, step=step):
            _, gradient, state = step(PARAMS, state)
            return state, gradient

        _, each = lax.scan(again, state, None, 500)
        errors[rounding] = max(float(jnp.linalg.norm(each[k].mean(0) - exact[k])) for k in exact)
        is_varied = bool(jnp.any(each["i"][2] != each["i"][3]))
        assert is_varied == (rounding == "stochastic")
    assert errors["stochastic"] < 0.5 * errors["nearest"]


def test_values_that_are_not_finite_go_where_float32_takes_them():
    xs = XS.at[2, 1, 3].set(jnp.inf)
    for grads in gradients(recurrent, BACKENDS[-1], xs=xs):
        assert not np.isfinite(grads["i"][3]).any()


def test_examples_have_gradients_of_their_own():
    q = apt.apt_quantize(recurrent, backend=BACKENDS[-1])
    state = q.init(PARAMS, XS)

    @jax.jit
    def gradient(xs):
        return jax.grad(lambda params: jnp.sum(q.apply(params, state, xs) ** 2))(PARAMS)

    examples = jnp.moveaxis(XS, 1, 0)[:, :, None]
    together = jax.jit(jax.vmap(gradient))(examples)
    for i in range(BATCH):
        alone = jax.tree.map(lambda g, i=i: g[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, gradient(examples[i]))


class ConvolutionalLSTM(nn.Module):
    """Backwards in time, with dropout of the input."""

    @nn.compact
    def __call__(self, x):
        cell = nn.ConvLSTMCell(features=2, kernel_size=(3,))
        return nn.RNN(cell, reverse=True)(nn.Dropout(0.2, deterministic=False)(x))


def test_a_convolutional_cell():
    net, x, key = ConvolutionalLSTM(), normal(3, 2, 4, 6, 3), jax.random.key(0)
    params = net.init({"params": key, "dropout": key}, x)

    def apply(params, x):
        return net.apply(params, x, rngs={"dropout": key})

    grads, _ = gradients(apply, BACKENDS[-1], params, x)
    expected = jax.grad(lambda params: jnp.sum(apply(params, x) ** 2))(params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_the_loop_keeps_a_weight_once_and_not_once_a_step(backend):
    """Its codes are the same at every step: no array of the program has them stacked."""
    step, state = training(recurrent, backend, PARAMS, XS)
    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(v.aval.shape for v in eqn.outvars)
            for body in jex_core.jaxprs_in_params(eqn.params):
                walk(body)

    walk(jax.make_jaxpr(step)(PARAMS, state).jaxpr)
    assert {shape[0] for shape in shapes if shape} >= {STEPS}
    for weight in PARAMS.values():
        assert not [s for s in shapes if len(s) > 2 and s[0] == STEPS and s[-2:] == weight.shape]


@pytest.mark.skipif("native" not in BACKENDS, reason="the kernels are not compiled here")
def test_an_lstm_takes_less_memory_than_float32():
    """The stacks of the two loops are not in memory together, and no codes of all dY are."""
    net, xs = nn.RNN(nn.OptimizedLSTMCell(64)), normal(1, 16, 48, 64)
    params = net.init(jax.random.key(0), xs)

    def temporary(step, *args):
        return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

    def loss(params):
        return jnp.mean(net.apply(params, xs)[:, -1] ** 2)

    q = apt.apt_quantize(lambda params, xs: jnp.mean(net.apply(params, xs)[:, -1] ** 2))
    step = apt.value_and_grad(lambda params, state: q.apply(params, state, xs), q)
    memory = temporary(step, params, q.init(params, xs))
    assert memory < 0.6 * temporary(jax.value_and_grad(loss), params)
