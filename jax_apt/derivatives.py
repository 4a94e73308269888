"""Which derivatives a quantized product has: reverse mode, once. All others are a TypeError that says so.

Gradients are computed from integer codes in the backward pass, so a forward-mode derivative does not exist
and a second one would be zero. JAX finds out only where a tangent is used, long after `apply` is over, so
the refusal travels with the tangent: a linear primitive that reverse mode transposes away, and that forward
mode has to run, compile or batch.
"""

from functools import partial

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FORWARD_MODE = (
    "a function made by apt_quantize has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize, "
    "jax.hessian): its gradients are quantized in reverse mode alone; use jax.grad, jax.vjp or jax.jacrev, "
    "or differentiate the original function"
)
SECOND = (
    "a function made by apt_quantize has no second derivative (jax.hessian, a gradient of a gradient): its "
    "gradients are computed from integer codes; differentiate the original function, or leave layers in float"
)


def reverse_once(x: Array) -> Array:
    """`x`, of any float dtype; its tangent can be transposed, once, and nothing else be done with it."""
    return _reverse_once.bind(x)


@jax.custom_jvp
def _last_derivative(cotangent: Array) -> Array:
    return cotangent


@_last_derivative.defjvp
def _refuse_second_derivative(primals, tangents):
    raise TypeError(SECOND)


def _refuse_forward_mode(*_, **__):
    raise TypeError(FORWARD_MODE)


def _itself(x):
    return x


_tangent = Primitive("jax_apt_tangent")
_tangent.def_impl(_refuse_forward_mode)
_tangent.def_abstract_eval(_itself)
mlir.register_lowering(_tangent, _refuse_forward_mode)
batching.primitive_batchers[_tangent] = _refuse_forward_mode  # of `jax.jacfwd`: see below
ad.deflinear2(_tangent, lambda cotangent, _: [_last_derivative(cotangent)])

# A primitive of its own rather than a `custom_jvp` function: under `vmap` it stays itself, so that the
# gradient of a `vmap` finds it with the tangent of the whole batch and never batches a tangent.
_reverse_once = Primitive("jax_apt_reverse_once")
_reverse_once.def_impl(_itself)
_reverse_once.def_abstract_eval(_itself)
mlir.register_lowering(_reverse_once, lambda _, x: [x])
batching.defvectorized(_reverse_once)
ad.defjvp(_reverse_once, lambda tangent, _: _tangent.bind(tangent))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def refuse_gradient(x: Array, why: str) -> Array:
    """`x`, of which any derivative is a NotImplementedError that says why."""
    return x


def _refuse(x: Array, why: str):
    raise NotImplementedError(why)


refuse_gradient.defvjp(_refuse, lambda why, residuals, cotangent: (cotangent,))
