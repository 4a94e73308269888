"""Two layers and one training step of them, for tests of what happens around products."""

import jax
import jax.numpy as jnp

import jax_apt as apt
from jax_apt import xla_ops

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])
FASTEST = BACKENDS[-1]  # to compile: all give the same bits
WIDE = apt.Rule("", acts=24, weights=24, grads=24)  # so fine that gradients approach float32's


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_and_grads(q, variables, *args):
    """One jitted training step's loss, gradients and next state."""
    state = q.init(variables, *args)

    def loss_fn(variables, state):
        return jnp.mean(q.apply(variables, state, *args) ** 2)

    return jax.jit(apt.value_and_grad(loss_fn, q))(variables, state)


def reference(fn, variables, *args):
    """The same step's loss and gradients in float32."""
    return jax.jit(jax.value_and_grad(lambda v: jnp.mean(fn(v, *args) ** 2)))(variables)


def assert_close_gradients(actual, expected, tolerance=1e-3):
    for path, (a, e) in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True),
        strict=True,
    ):
        error = float(jnp.linalg.norm(a - e) / (jnp.linalg.norm(e) + 1e-12))
        assert error < tolerance, f"{jax.tree_util.keystr(path[0])}: relative error {error}"


def plain(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def two_layers():
    return {"a": {"kernel": normal(0, 5, 5)}, "b": {"kernel": normal(1, 5, 5)}}
