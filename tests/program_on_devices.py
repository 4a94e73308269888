"""Run by test_devices.py on four devices: one training step, sharded in every way, against one device."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_apt as apt

BACKEND = sys.argv[1]
RULE = apt.Rule("", grads=apt.Adaptive(8, 16))
COLUMNS, ROWS = P(None, "model"), P("model", None)
SPLIT = {"a": {"kernel": COLUMNS}, "b": {"kernel": ROWS}}


def network(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def summed(p, x):
    return lax.psum(network(p, x), "model")


def step(fn, p, x, scale):
    """(loss, gradients, precision) of one step; an outlier in `scale` widens some gradients."""
    q = apt.apt_quantize(fn, [RULE], backend=BACKEND)
    loss = apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) * scale), q)
    value, gradients, state = jax.jit(loss)(p, q.init(p, x))
    return value, gradients, state.precision


def check(name, got, expected):
    (value, gradients, precision), (value_1, gradients_1, precision_1) = got, expected
    np.testing.assert_allclose(value, value_1, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for field in ("bits", "exponent", "next_update", "updates", "range_average"):
        np.testing.assert_array_equal(getattr(precision, field), getattr(precision_1, field), field)
    print(name)


def mesh(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((6, 8), (8, 4), (16, 6))
    a, b, x = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    p = {"a": {"kernel": a}, "b": {"kernel": b}}
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.001, 0.003, (16, 4)), jnp.float32).at[0, 0].set(1)
    one = step(network, p, x, scale)
    assert one[2].bits.tolist() != [8] * 6  # something was widened

    data = P("data")
    ways = {
        "data": (network, mesh(4, 1), (P(), data), data, True),
        "tensor": (summed, mesh(1, 4), (SPLIT, P()), P(), True),
        "both": (summed, mesh(2, 2), (SPLIT, data), data, True),
        "untyped": (summed, mesh(2, 2), (SPLIT, data), data, False),
    }
    for name, (fn, devices, inputs, outputs, is_typed) in ways.items():
        mapped = jax.shard_map(fn, mesh=devices, in_specs=inputs, out_specs=outputs, check_vma=is_typed)
        check(name, step(mapped, p, x, scale), one)

    devices = mesh(2, 2)

    def place(value, spec):
        return jax.device_put(value, NamedSharding(devices, spec))

    sharded = jax.tree.map(place, p, SPLIT)
    check("jit", step(network, sharded, place(x, data), place(scale, data)), one)
    print("ok")


main()
