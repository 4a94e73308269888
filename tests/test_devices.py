"""Many devices in one process; a child interpreter, because it has as many CPU devices as it started with."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_apt as apt
from jax_apt import xla_ops

BACKENDS = ["xla"] + (["native"] if xla_ops.is_available() else [])


def run(*args, devices):
    """Output of a child Python with this many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WAYS = ["data", "tensor", "both", "untyped", "jit data", "jit tensor", "jit both", "explicit"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_devices_choose_the_bits_of_one(backend):
    """Data parallel, tensor parallel and both, by shard_map and by sharded arrays; see the program."""
    output = run(pathlib.Path(__file__).with_name("program_on_devices.py"), backend, devices=4)
    more = ["convolutions", "vmap"] if backend == "native" else []
    assert output.splitlines() == [*WAYS, *more, "ok"]


@jax.custom_jvp
def dense(x, w):
    return x @ w


@dense.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


def test_a_custom_rule_inside_a_shard_map_is_quantized():
    """Its gradient is planned with the axes of the shard_map: w is the same on all devices, x is not."""
    x, params = jnp.ones((4, 3)), {"w": jnp.full((3, 2), 0.5)}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda p, x: dense(x, p["w"]), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )

    def step(fn):
        q = apt.apt_quantize(fn, backend="xla")
        loss = apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x)), q)
        return jax.jit(loss)(params, q.init(params, x))

    (_, gradients, state), (_, expected, one) = step(mapped), step(lambda p, x: dense(x, p["w"]))
    np.testing.assert_array_equal(gradients["w"], expected["w"])
    assert state.layout.names() == one.layout.names() != ()
    np.testing.assert_array_equal(state.precision.exponent, one.precision.exponent)


def test_a_shard_map_over_some_explicit_axes_is_evaluated_and_its_gradient_refused():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def fn(w, x):
        specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        return jax.shard_map(jnp.matmul, mesh=mesh, axis_names={"data"}, **specs)(x, w)

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 3)), jax.sharding.NamedSharding(mesh, P("data")))
        w = jnp.full((3, 2), 0.5)
        q = apt.apt_quantize(fn, backend="xla")
        state = q.init(w, x)
        np.testing.assert_array_equal(jax.jit(q.apply)(w, state, x), jnp.full((4, 2), 1.5))
        words = "layer parameter: a shard_map over data that leaves model explicit .* not differentiated"
        with pytest.raises(NotImplementedError, match=words):
            jax.jit(apt.value_and_grad(lambda w, s: jnp.sum(q.apply(w, s, x)), q)).lower(w, state)
