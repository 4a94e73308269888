"""Run by test_devices.py on four devices: training steps, sharded in every way, against one device."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_apt as apt
from jax_apt import xla_ops

BACKEND = sys.argv[1]
WIDTHS = apt.Adaptive(8, 16)
COLUMNS, ROWS = P(None, "model"), P("model", None)
SPLIT = {"a": {"kernel": COLUMNS}, "b": {"kernel": ROWS}}
FIELDS = ("bits", "exponent", "next_update", "updates", "range_average", "nonfinite")


def network(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def summed(p, x):
    return lax.psum(network(p, x), "model")


def convolutions(p, x):
    """Batch on "data"; channels between the convolutions on "model"."""

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    y = convolve(x, p["a"]["kernel"])
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return convolve(y, p["b"]["kernel"])


def explicit(p, x):
    """On a mesh of explicit axes a product that sums over a sharded dimension says how its result lies."""
    y = jnp.tanh(x @ p["a"]["kernel"])
    return jnp.einsum("bk,kn->bn", y, p["b"]["kernel"], out_sharding=P("data", None))


class Steps:
    """A compiled training step; an outlier in `scale` widens some gradients.

    Under `jit` any number of devices draws the same random roundings; in a `shard_map` each draws its own.
    """

    def __init__(self, fn, p, x, scale, rounding="stochastic"):
        q = apt.apt_quantize(fn, [apt.Rule(grads=WIDTHS, rounding=rounding)], backend=BACKEND)
        loss = apt.value_and_grad(lambda p, s, x: jnp.sum(q.apply(p, s, x) * scale), q)
        self.state = q.init(p, x)
        self.compiled = jax.jit(loss).lower(p, self.state, x).compile()

    def __call__(self, p, x):
        """(loss, gradients, precision) of one step."""
        value, gradients, state = self.compiled(p, self.state, x)
        return value, gradients, state.precision

    def collectives(self) -> dict[str, set[int]]:
        """Sizes of the arrays that go over the wire, by operation, without a layer's few statistics."""
        found: dict[str, set[int]] = {}
        line = r"= \(?(\w+\[[^=]*?)\)? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        for shapes, operation in re.findall(line, self.compiled.as_text()):
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
                size = math.prod(int(d) for d in dims.split(",") if d)
                if size > 2:
                    found.setdefault(operation, set()).add(size)
        return found


def check(name, got, expected):
    (value, gradients, precision), (value_1, gradients_1, precision_1) = got, expected
    np.testing.assert_allclose(value, value_1, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(precision, field), getattr(precision_1, field), field)
    for array in jax.tree.leaves(precision):
        assert array.is_fully_replicated
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, array)
    print(name)


def mesh(data, model, kind=AxisType.Auto):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2)


def normal(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def in_shard_map(p, x, scale):
    with_nan = p | {"b": {"kernel": p["b"]["kernel"].at[1, 1].set(jnp.nan)}}
    steps = Steps(network, p, x, scale, "nearest")
    one, one_nan = steps(p, x), steps(with_nan, x)
    assert one[2].bits.tolist() != [8] * 6  # something was widened
    assert one_nan[2].nonfinite.tolist()[3:] == [0, 1, 0]  # x, w and dy of the second layer
    data = P("data")
    ways = {
        "data": (network, mesh(4, 1), (P(), data), data, True),
        "tensor": (summed, mesh(1, 4), (SPLIT, data), data, True),
        "both": (summed, mesh(2, 2), (SPLIT, data), data, True),
        "untyped": (summed, mesh(2, 2), (SPLIT, data), data, False),
    }
    for name, (fn, devices, inputs, outputs, is_typed) in ways.items():
        mapped = jax.shard_map(fn, mesh=devices, in_specs=inputs, out_specs=outputs, check_vma=is_typed)
        steps = Steps(mapped, p, x, scale, "nearest")
        check(name, steps(p, x), one)
        if is_typed:
            np.testing.assert_array_equal(steps(with_nan, x)[2].nonfinite, one_nan[2].nonfinite)


def place(p, x, devices, split):
    placed = jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(devices, s)), p, split)
    return placed, jax.device_put(x, NamedSharding(devices, P("data")))


def in_jit(p, x, scale):
    """No operand is gathered: weight gradients are summed over "data", results of rows over "model"."""
    one = Steps(network, p, x, scale)(p, x)
    ways = {
        "jit data": (network, mesh(4, 1), {6 * 8, 8 * 4}),
        "jit tensor": (network, mesh(1, 4), {16 * 4}),
        "jit both": (network, mesh(2, 2), {6 * 4, 4 * 4, 8 * 4}),
        "explicit": (explicit, mesh(2, 2, AxisType.Explicit), {6 * 4, 4 * 4, 8 * 4}),
    }
    for name, (fn, devices, sizes) in ways.items():
        arguments = place(p, x, devices, SPLIT)
        with jax.set_mesh(devices):
            steps = Steps(fn, *arguments, jax.device_put(scale, NamedSharding(devices, P("data"))))
            check(name, steps(*arguments), one)
        if BACKEND == "native":
            assert steps.collectives() == {"all-reduce": sizes}, (name, steps.collectives())


def in_convolutions():
    a, b, x = normal((3, 3, 4, 8), (3, 3, 8, 6), (4, 8, 8, 4))
    p, scale = {"a": {"kernel": a}, "b": {"kernel": b}}, jnp.full((4, 4, 4, 6), 0.01)
    one = Steps(convolutions, p, x, scale)(p, x)
    split = {"a": {"kernel": P(None, None, None, "model")}, "b": {"kernel": P(None, None, "model", None)}}
    arguments = place(p, x, mesh(2, 2), split)
    steps = Steps(convolutions, *arguments, scale)
    check("convolutions", steps(*arguments), one)
    sizes = {3 * 3 * 4 * 4, 3 * 3 * 4 * 6, 2 * 4 * 4 * 6}
    assert steps.collectives() == {"all-reduce": sizes}, steps.collectives()


def in_vmap():
    """Under `vmap` the new dimension may be split, as well as the old ones."""
    (x,) = normal((4, 8, 6))
    exponents = jnp.arange(-6, -2)

    def codes(x, exponent):
        return xla_ops.quantize(x, 8, exponent, limbs=1)

    expected = jax.vmap(codes)(x, exponents)
    x = jax.device_put(x, NamedSharding(mesh(2, 2), P("data", "model")))
    compiled = jax.jit(jax.vmap(codes)).lower(x, exponents).compile()
    for a, b in zip(compiled(x, exponents), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "all-gather" not in compiled.as_text()
    print("vmap")


def main():
    a, b, x = normal((6, 8), (8, 4), (16, 6))
    p = {"a": {"kernel": a}, "b": {"kernel": b}}
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.001, 0.003, (16, 4)), jnp.float32).at[0, 0].set(1)
    assert jax.config.jax_use_shardy_partitioner
    in_shard_map(p, x, scale)
    in_jit(p, x, scale)
    if BACKEND == "native":
        in_convolutions()
        in_vmap()
    print("ok")


if __name__ == "__main__":
    main()
