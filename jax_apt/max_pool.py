"""Max pooling whose gradient is a custom call on a CPU: XLA's values bit for bit, in a fraction of the time.

XLA's CPU backend computes the gradient of `reduce_window_max` through a scatter, on one thread. The forward
pass stays XLA's own.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jax_apt import _jax_versions as versions
from jax_apt import xla_ops
from jax_apt.derivatives import reverse_once

PRIMITIVE = "reduce_window_max"


def has_native_gradient(eqn: JaxprEqn) -> bool:
    """Whether `max_pool` takes this `reduce_window_max`: float32, no dilation, no huge window."""
    dilations = (*eqn.params["base_dilation"], *eqn.params["window_dilation"])
    is_float32 = versions.aval(eqn.invars[0]).dtype == jnp.float32
    return is_float32 and all(d == 1 for d in dilations) and _pool(eqn).is_supported()


def max_pool(eqn: JaxprEqn, x: Array) -> Array:
    """What the equation computes, with the custom call as its gradient.

    Args:
      eqn: a `reduce_window_max` that `has_native_gradient`.
      x: float32, shape as it was traced with.
    """

    @jax.custom_vjp
    def pooled(x):
        return versions.bind(eqn, [x])[0]

    def gradient(x, dy):
        axes = versions.varying_axes(x)  # of which a custom call knows nothing
        return (versions.as_varying(xla_ops.max_pool_gradient(x, dy, _pool(eqn)), axes),)

    pooled.defvjp(lambda x: (pooled(x), x), gradient)
    return pooled(*reverse_once([x]))


def _pool(eqn: JaxprEqn) -> xla_ops.Pool:
    p = eqn.params
    pads = tuple((low, high) for low, high in p["padding"])
    return xla_ops.Pool(tuple(p["window_dimensions"]), tuple(p["window_strides"]), pads)
