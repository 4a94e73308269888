"""Which derivatives a quantized product has: reverse mode, once. All others are a TypeError that says so.

Gradients are computed from integer codes in the backward pass, so a forward-mode derivative does not exist
and a second one would be zero. JAX finds out only where a tangent is used, long after `apply` is over, so
the refusal travels with the tangent: a linear primitive that reverse mode transposes away, and that forward
mode has to run, compile or batch.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_apt import _jax_versions as versions
from jax_apt.ops import CODES_NAME

FORWARD_MODE = (
    "a function made by apt_quantize has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize, "
    "jax.hessian): its gradients are quantized in reverse mode alone; use jax.grad, jax.vjp or jax.jacrev, "
    "or differentiate the original function"
)
SECOND = (
    "a function made by apt_quantize has no second derivative (jax.hessian, a gradient of a gradient): its "
    "gradients are computed from integer codes; differentiate the original function, or leave layers in float"
)

RESULTS = (
    "what value_and_grad returns has no derivative: gradients of a quantized function are taken once; for a "
    "derivative of your own call jax.value_and_grad on the loss, or differentiate the original function"
)


def reverse_once(values: Sequence) -> list:
    """Operands, or results, of a product as they are, to be differentiated in reverse mode, once.

    JAX's derivative of what is computed from codes is zero, in silence. So a cotangent that leaves here is
    made to depend on all these values: whoever differentiates it, with respect to whatever, is refused.
    """
    links = [_link(x) for x in values if versions.is_float(x)]
    return [_once.bind(x, *links) if versions.is_float(x) else x for x in values]


def _link(x: Array) -> Array:
    """A scalar that depends on `x` as far as JAX can see, and costs nothing; a remat keeps it, not `x`."""
    return checkpoint_name(jnp.sum(x[:0]) if x.ndim else x, CODES_NAME)


@jax.custom_jvp
def _last_derivative(cotangent: Array, *links: Array) -> Array:
    return cotangent


@_last_derivative.defjvp
def _refuse_second_derivative(primals, tangents):
    raise TypeError(SECOND)


def _refuse_forward_mode(*_, **__):
    raise TypeError(FORWARD_MODE)


def _first(x, *_):
    return x


def _transposed(cotangent, _, *links):
    is_zero = type(cotangent) is ad.Zero
    return [None if is_zero else _last_derivative(cotangent, *links), *([None] * len(links))]


_tangent = Primitive("jax_apt_tangent")  # (tangent, *links) -> tangent; linear in the first
_tangent.def_impl(_refuse_forward_mode)
_tangent.def_abstract_eval(_first)
mlir.register_lowering(_tangent, _refuse_forward_mode)
batching.primitive_batchers[_tangent] = _refuse_forward_mode  # of `jax.jacfwd`
ad.primitive_transposes[_tangent] = _transposed


# A primitive of its own rather than a `custom_jvp` function: under `vmap` it stays itself, so that the
# gradient of a `vmap` finds it with the tangent of the whole batch and never batches a tangent.


def _jvp(primals, tangents):
    # The value itself does not depend on the links: codes of a weight stay the same at all steps of a loop.
    value, tangent = primals[0], tangents[0]
    return value, tangent if type(tangent) is ad.Zero else _tangent.bind(tangent, *primals[1:])


_once = Primitive("jax_apt_once")  # (x, *links) -> x
_once.def_impl(_first)
_once.def_abstract_eval(_first)
mlir.register_lowering(_once, lambda _, x, *__: [x])
batching.primitive_batchers[_once] = lambda args, dims: (_once.bind(*args), dims[0])
ad.primitive_jvps[_once] = _jvp


@jax.custom_jvp
def in_no_derivative(x: Array) -> Array:
    """`x`, as an input of a computation whose derivative has been taken: any other is a TypeError."""
    return x


@in_no_derivative.defjvp
def _refuse_any(primals, tangents):
    raise TypeError(RESULTS)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def refuse_gradient(x: Array, why: str) -> Array:
    """`x`, of which any derivative is a NotImplementedError that says why."""
    return x


def _refuse(x: Array, why: str):
    raise NotImplementedError(why)


refuse_gradient.defvjp(_refuse, lambda why, residuals, cotangent: (cotangent,))
