"""Gradients and the next precision state in one call."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_apt import residuals
from jax_apt.config import Recompute, check_recompute
from jax_apt.state import WATCH, AptState, Watch, check_state
from jax_apt.transform import AptFunction


def value_and_grad(
    loss_fn: Callable, q: AptFunction, *, has_aux: bool = False, recompute: Recompute = "short_products"
) -> Callable[..., tuple[Any, Any, AptState]]:
    """Like `jax.value_and_grad` with respect to the variables, and the state after the step.

    Args:
      loss_fn: `loss_fn(variables, state, *args, **kwargs)`, a scalar, or (scalar, aux) if `has_aux`. It
        calls `q.apply(variables, state, ...)`, as often as it likes.
      q: the quantized function.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      recompute: what the backward pass computes again instead of keeping it, inside `jax.jit`: "elementwise"
        functions of what is kept; "short_products" too, those forward products that take little time since
        they sum few terms (1152 with AMX or on an accelerator, 576 with AVX-512 VNNI, 72 with AVX2); all
        forward "products", so that of a layer little but integer codes is kept; or "nothing" (loops inside
        the function keep little in any case). Gradients are the same.

    Returns:
      A function of (variables, state, *args, **kwargs) that returns (value, gradients, state); value is
      (loss, aux) if `has_aux`.

    Raises:
      TypeError: `loss_fn` is no function or `q` was not made by `apt_quantize`; a leaf of the variables is
        not float32, float16 or bfloat16; or the state is no AptState.
      ValueError: `recompute` is none of the four.

    Warns:
      UserWarning: the loss calls `apply` with the state outside it and never with the one that it is given,
        so the state learns nothing.
    """
    if not callable(loss_fn) or isinstance(loss_fn, AptFunction):
        raise TypeError(
            f"value_and_grad(loss_fn, q): loss_fn must be a function, got {type(loss_fn).__name__}"
        )
    if not isinstance(q, AptFunction):
        raise TypeError(f"value_and_grad(loss_fn, q): q must be made by apt_quantize, got {type(q).__name__}")
    check_recompute(recompute)

    def with_statistics(variables, state: AptState, *args, **kwargs):
        _check(variables, state)

        def tapped(variables, taps):
            return loss_fn(variables, q.with_taps(state, taps), *args, **kwargs)

        token = WATCH.set(watch := Watch(state.step))
        try:
            value, (gradients, statistics) = residuals.value_and_grad(
                tapped, (variables, q.taps(state)), [state.layout], has_aux=has_aux, recompute=recompute
            )
        finally:
            WATCH.reset(token)
        if watch.used_outer and not watch.used_taps:
            warnings.warn(_OUTER_STATE, stacklevel=2)
        return value, gradients, q.update(state, statistics)

    return with_statistics


_OUTER_STATE = (
    "the loss calls apply with the state from outside it: the precision state learns nothing. Use the state "
    "that is the second argument of loss_fn(variables, state, ...)"
)


def _check(variables, state) -> None:
    check_state(state, "the function that value_and_grad makes takes (variables, state, ...)")
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        dtype = jnp.result_type(leaf)
        if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "variables"
            raise TypeError(
                f"{name} is {dtype}; gradients are taken with respect to float32, float16 or bfloat16 "
                "leaves: pass the others to the loss as further arguments"
            )
