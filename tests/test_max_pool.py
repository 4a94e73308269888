"""Max pooling's gradient: the custom call against XLA's own, and its place in the transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jax_apt as apt
from jax_apt import xla_ops

pytestmark = pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")

NO = (0, 0)
POOLS = {
    "alexnet": ((2, 9, 9, 40), (1, 3, 3, 1), (1, 2, 2, 1), (NO,) * 4),
    "padded": ((2, 9, 8, 17), (1, 3, 3, 1), (1, 2, 2, 1), (NO, (1, 1), (0, 1), NO)),
    "channels first": ((2, 3, 9, 9), (1, 1, 3, 3), (1, 1, 1, 1), (NO, NO, (1, 2), (1, 0))),
    "one dimension": ((2, 9, 33), (1, 2, 1), (1, 2, 1), (NO,) * 3),
    "three dimensions": ((2, 5, 6, 7, 3), (1, 2, 3, 2, 1), (1, 1, 2, 3, 1), (NO, (1, 1), NO, (0, 1), NO)),
    "windows of padding alone": ((2, 9, 9, 5), (1, 3, 1, 1), (1, 2, 1, 1), (NO, (3, 3), NO, NO)),
    "gaps between windows": ((2, 9, 8, 31), (1, 2, 2, 1), (1, 3, 3, 1), (NO, (0, 2), (1, 0), NO)),
    "global": ((1, 7, 7, 300), (1, 7, 7, 1), (1, 1, 1, 1), (NO,) * 4),
    "no window fits": ((2, 2, 2, 3), (1, 3, 3, 1), (1, 1, 1, 1), (NO,) * 4),
}


def pooled(window, strides, padding):
    return lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def with_ties(rng, shape, special=()):
    x = rng.integers(-2, 3, shape).astype(np.float32)
    for value in special:
        x[rng.random(shape) < 0.05] = value
    return x


def assert_same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("case", POOLS)
def test_the_gradient_is_xlas_bit_for_bit_on_every_isa(case):
    shape, *pool = POOLS[case]
    rng = np.random.default_rng(len(case))
    gradient = jax.jit(lambda x, dy: jax.vjp(pooled(*pool), x)[1](dy)[0])
    out_shape = jax.eval_shape(pooled(*pool), jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    dy = rng.standard_normal(out_shape).astype(np.float32)
    for x in (with_ties(rng, shape), with_ties(rng, shape, (-np.inf, np.nan, -0.0, np.inf))):
        expected = gradient(x, dy)
        for isa in xla_ops.available_isas():
            assert_same_bits(xla_ops.max_pool_gradient(x, dy, xla_ops.Pool(*pool), isa=isa), expected)


def test_it_maps_over_a_batch():
    shape, *pool = POOLS["padded"]
    x = jnp.asarray(with_ties(np.random.default_rng(0), (3, *shape)))
    dy = jax.vmap(pooled(*pool))(x)
    together = jax.vmap(lambda x, dy: xla_ops.max_pool_gradient(x, dy, xla_ops.Pool(*pool)))(x, dy)
    for i in range(3):
        assert_same_bits(together[i], xla_ops.max_pool_gradient(x[i], dy[i], xla_ops.Pool(*pool)))


def test_wrong_arguments_are_named():
    x, window = jnp.zeros((1, 4, 4, 1)), (1, 2, 2, 1)
    pool = xla_ops.Pool(window, window, (NO,) * 4)
    with pytest.raises(ValueError, match=r"dy must have shape \(1, 2, 2, 1\), got \(1, 4, 4, 1\)"):
        xla_ops.max_pool_gradient(x, x, pool)
    with pytest.raises(TypeError, match="x must be float32, got bfloat16"):
        xla_ops.max_pool_gradient(x.astype(jnp.bfloat16), x[:, ::2, ::2], pool)
    with pytest.raises(ValueError, match="at most 3 neighbouring dimensions and 1024 values a window, got"):
        xla_ops.max_pool_gradient(x, x, pool._replace(window=(1, 64, 64, 1)))


# The transform


class Net(nn.Module):
    pools_in_jit: bool = False

    @nn.compact
    def __call__(self, x):
        def pool(x):
            return nn.max_pool(x, (3, 3), (2, 2), "SAME")

        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = jax.jit(pool)(x) if self.pools_in_jit else pool(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def step(replace_slow=True, backend="auto", pools_in_jit=False):
    net, x = Net(pools_in_jit), jnp.asarray(with_ties(np.random.default_rng(1), (2, 8, 8, 2)))
    params = net.init(jax.random.key(0), x)
    q = apt.apt_quantize(net.apply, backend=backend, replace_slow=replace_slow)
    state = q.init(params, x)
    run = jax.jit(apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q))
    return *run(params, state)[:2], q.report(state), run.lower(params, state).as_text()


@pytest.mark.parametrize("pools_in_jit", [False, True])
def test_a_step_with_it_equals_the_step_without(pools_in_jit):
    loss, grads, report, program = step(pools_in_jit=pools_in_jit)
    plain_loss, plain_grads, plain_report, plain_program = step(False, pools_in_jit=pools_in_jit)
    assert "jax_apt_max_pool_gradient" in program and "jax_apt_max_pool_gradient" not in plain_program
    jax.tree.map(assert_same_bits, (loss, grads), (plain_loss, plain_grads))
    (replaced,) = report.to_dict()["replaced"]
    assert replaced["primitive"] == "reduce_window_max"
    assert f"by a custom call ({xla_ops.isa()})" in str(report)
    assert plain_report.to_dict()["replaced"] == []


def test_a_portable_backend_has_no_custom_call():
    *_, report, program = step(backend="xla")
    assert "custom_call" not in program and not report.layout.replaced


def test_what_has_no_native_gradient_stays_xlas():
    def fn(params, x):
        def pool(x, **dilation):
            return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", **dilation)

        y = pool(x, window_dilation=(1, 2, 2, 1)) + pool(x.astype(jnp.bfloat16))[:, :-1, :-1].astype(x.dtype)
        return y.reshape(x.shape[0], -1) @ params["w"]

    params, x = {"w": jnp.ones((2 * 2 * 3, 2))}, jnp.ones((2, 4, 4, 3))
    q = apt.apt_quantize(fn)
    state = q.init(params, x)
    assert state.layout.replaced == () and q.apply(params, state, x).shape == (2, 2)
