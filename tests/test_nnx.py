"""NNX modules: the wrapper is split, quantize and merge, and writes back what a call changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_apt as apt
from jax_apt import nnx as apt_nnx

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it")
OPTIONS = {"rules": [apt.Rule("head", acts=12)], "backend": "xla"}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.head(self.dropout(nnx.relu(self.norm(self.first(x))), rngs=rngs))


def loss_fn(model, x, rngs):
    return jnp.mean(model(x, rngs=rngs) ** 2)


def data():
    return jax.random.normal(jax.random.key(1), (16, 6))


def equal(a, b):
    return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def mode(request):
    with nnx.set_graph_mode(request.param):
        yield


def by_hand(x):
    """Loss, gradients, statistics of BatchNorm and precision by split and merge alone."""
    graph, params, others = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, others, x, key):
        model = nnx.merge(graph, params, others)
        out = model(x, rngs=nnx.Rngs(dropout=key))
        return out, nnx.state(model, nnx.BatchStat)

    q = apt.apt_quantize(apply, OPTIONS["rules"], backend="xla")
    key = jax.random.key(5)
    state = q.init(params, others, x, key)

    def loss(params, state):
        out, stats = q.apply(params, state, others, x, key)
        return jnp.mean(out**2), stats

    (value, stats), grads, state = jax.jit(apt.value_and_grad(loss, q, has_aux=True))(params, state)
    return value, grads, stats, state


def test_one_step_equals_split_and_merge_by_hand(mode):
    x = data()
    model = apt_nnx.Quantized(Network(nnx.Rngs(0)), x, rngs=nnx.Rngs(dropout=jax.random.key(5)), **OPTIONS)
    rngs = nnx.Rngs(dropout=jax.random.key(5))
    value, grads = nnx.jit(apt_nnx.value_and_grad(loss_fn))(model, x, rngs)
    expected_value, expected_grads, stats, state = by_hand(x)
    assert value == expected_value
    assert equal(grads["model"].to_pure_dict(), expected_grads.to_pure_dict())
    assert equal(nnx.state(model.model, nnx.BatchStat).to_pure_dict(), stats.to_pure_dict())
    assert equal(model.precision.get_value(), state)
    assert state.layout.names() == ("first", "head") and state.layout.layers[1].rule == "head"
    assert rngs.dropout.count.get_value() == 1  # what an argument counts is written back too


def test_training_compiles_once_and_moves_everything(mode):
    x = data()
    target = jnp.sin(x[:, :3] * 2)
    model = apt_nnx.Quantized(Network(nnx.Rngs(0)), x, rngs=nnx.Rngs(0), **OPTIONS)
    model.model.dropout.rate = 0.1
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, rngs):
        traces.append(1)

        def loss(model, rngs):
            out = model(x, rngs=rngs)
            return jnp.mean((out - target) ** 2), out

        (value, out), grads = apt_nnx.value_and_grad(loss, has_aux=True)(model, rngs)
        optimizer.update(model, grads)
        return value, out

    rngs = nnx.Rngs(3)
    losses = [float(step(model, optimizer, rngs)[0]) for _ in range(60)]
    assert len(traces) == 1 and losses[-1] < 0.5 * losses[0]
    assert model.report().steps == 60
    assert rngs.default.count.get_value() == 60
    model.eval()
    before = nnx.state(model)
    np.testing.assert_array_equal(model(x), model(x))
    assert equal(nnx.state(model), before)


def test_modules_within_a_module_each_have_their_precision():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            one, two = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
            self.one = apt_nnx.Quantized(one, data(), backend="xla")
            self.two = apt_nnx.Quantized(two, data(), backend="xla")
            self.float = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return self.two(self.float(self.one(x)))

    pair = Pair(nnx.Rngs(0))
    only = nnx.PathContains("kernel")
    value_and_grad = apt_nnx.value_and_grad(lambda pair, x: jnp.mean(pair(x) ** 2), wrt=only)
    _, grads = nnx.jit(value_and_grad)(pair, data())
    assert sorted(grads) == ["float", "one", "two"] and list(grads["one"]["model"]) == ["kernel"]
    assert [part.precision.get_value()["kernel"]["dy"].updates for part in (pair.one, pair.two)] == [1, 1]


def test_a_call_without_training_leaves_the_precision_alone():
    model = apt_nnx.Quantized(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), data(), backend="xla")
    before = model.precision.get_value()
    model(data())
    assert equal(model.precision.get_value(), before)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"Quantized takes an nnx.Module, got function"):
        apt_nnx.Quantized(data, data())
    with pytest.raises(TypeError, match="must be or hold a Quantized module, got Linear"):
        apt_nnx.value_and_grad(loss_fn)(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), data(), None)
    with pytest.raises(TypeError, match="loss_fn must be a function, got int"):
        apt_nnx.value_and_grad(3)
