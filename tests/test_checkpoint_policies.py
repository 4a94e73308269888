"""A remat that keeps the codes: floats are computed again from them, and nothing is quantized twice."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_apt as apt
from jax_apt import _jax_versions as versions
from jax_apt import xla_ops

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not xla_ops.is_available(), reason="not built"))
QUANTIZE = {"xla": "round", "native": "jax_apt_adapt"}
PRODUCT = {"xla": "dot_general", "native": "jax_apt_product"}


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])


def example():
    rng = np.random.default_rng(0)
    p = {name: {"kernel": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)} for name in "ab"}
    return p, jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)


def gradients(fn, backend):
    """(function of the parameters and the state, these)"""
    p, x = example()
    q = apt.apt_quantize(fn, [apt.Rule("", grads=8)], backend=backend)
    return apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q), (p, q.init(p, x))


def count(fn, *args):
    """Equations by primitive, custom calls by target, in the traced program and all its bodies."""
    found = Counter()

    def walk(program):
        for eqn in program.jaxpr.eqns:
            found[eqn.params.get("target_name", eqn.primitive.name)] += 1
            for body in versions.sub_jaxprs(eqn):
                walk(body)

    walk(jax.make_jaxpr(fn)(*args))
    return found


def kept(fn):
    """Dtypes and shapes of what the backward pass is given beside the parameters."""
    p, x = example()
    q = apt.apt_quantize(fn, backend="xla")
    state = q.init(p, x)
    _, pullback = jax.vjp(lambda h: q.apply(p, state, h), x)
    return Counter((str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(pullback) if leaf.ndim == 2)


@pytest.mark.parametrize("backend", ["xla", NATIVE])
def test_nothing_is_quantized_again(backend):
    policies = {
        "none": network,
        "codes": jax.checkpoint(network, policy=apt.checkpoint_policies.save_codes),
        "nothing": jax.checkpoint(network, policy=jax.checkpoint_policies.nothing_saveable),
    }
    programs = {name: gradients(fn, backend) for name, fn in policies.items()}
    found = {name: count(fn, *args) for name, (fn, args) in programs.items()}
    quantize, product = QUANTIZE[backend], PRODUCT[backend]
    assert found["codes"][quantize] == found["none"][quantize] < found["nothing"][quantize]
    assert found["codes"]["tanh"] == found["nothing"]["tanh"] > found["none"]["tanh"]  # floats: once more
    assert found["codes"][product] > found["none"][product]  # their input: the product of the kept codes
    if backend == "xla":  # natively the same call measures
        assert found["codes"]["cond"] < found["nothing"]["cond"]  # measurements: not once more


def test_codes_are_kept_and_floats_are_not():
    assert kept(network)["float32", (5, 6)] > 1  # of each tanh what its gradient needs
    held = kept(jax.checkpoint(network, policy=apt.checkpoint_policies.save_codes))
    assert held["int8", (5, 6)] == 2 and held["int8", (6, 6)] == 2
    assert held["float32", (5, 6)] == 0  # not even the argument


def test_gradients_and_state_are_the_same():
    plain, args = gradients(network, "xla")
    remat, _ = gradients(jax.checkpoint(network, policy=apt.checkpoint_policies.save_codes), "xla")
    same = jax.tree.map(jnp.array_equal, jax.jit(plain)(*args), jax.jit(remat)(*args))
    assert jax.tree.all(same)
