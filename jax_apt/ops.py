"""The differentiable quantized product: three fixed-point products behind one `custom_vjp`.

    forward          Y  = X^ . W^
    input gradient   dX = dY^ . W^T      the same W^ as the forward pass
    weight gradient  dW = X^T . dY^      the same X^ as the forward pass

Source: Zhang et al., arXiv 1911.00361. The quantizer's own derivative is the identity (straight-through).
The residuals of the forward pass are the integer codes of X and W, named for `jax.checkpoint` policies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jax_apt.config import Config
from jax_apt.fixed_point import exponent_for
from jax_apt.products import Operand, Programs, quantize_operand, run
from jax_apt.qem import error_sums
from jax_apt.qpa import Measurement, choose
from jax_apt.state import to_tap

CODES_NAME = "jax_apt_codes"  # for jax.checkpoint_policies.save_only_these_names

_X, _W, _DY = range(3)


class Site(NamedTuple):
    """What is fixed of one product when the function is traced."""

    programs: Programs
    is_weight_lhs: bool  # which operand is W
    widths: tuple[tuple[int, ...], ...]  # candidates of x, w, dy, padded to one length
    backend: str
    config: Config


def quantized_product(site: Site, lhs: Array, rhs: Array, formats: Array, tap: Array) -> Array:
    """One convolution or matrix product in fixed point.

    Args:
      site: the product.
      lhs, rhs: float32 operands, shapes as the product was traced with.
      formats: int32 (3, 3): bits, exponent and whether to measure, of x, w and dy.
      tap: float32 (3, S) zeros; its cotangent is the statistics of the step.

    Returns:
      float32 result.
    """

    lhs_slot, rhs_slot = (_W, _X) if site.is_weight_lhs else (_X, _W)
    programs, backend = site.programs, site.backend

    @jax.custom_vjp
    def product(lhs, rhs, formats, tap):
        return forward(lhs, rhs, formats, tap)[0]

    def forward(lhs, rhs, formats, tap):
        lhs, lhs_measured = _quantized(site, lhs_slot, lhs, formats)
        rhs, rhs_measured = _quantized(site, rhs_slot, rhs, formats)
        kept = checkpoint_name([(x.number, x.nonfinite) for x in (lhs, rhs)], CODES_NAME)
        return run(programs.forward, lhs, rhs, backend), (kept, lhs_measured, rhs_measured, formats)

    def backward(residuals, gradient):
        kept, lhs_measured, rhs_measured, formats = residuals
        lhs, rhs = (
            Operand(number, site.widths[slot], nonfinite)
            for (number, nonfinite), slot in zip(kept, (lhs_slot, rhs_slot), strict=True)
        )
        dy, dy_measured = _quantized(site, _DY, gradient, formats)
        lhs_gradient = run(programs.lhs_gradient, rhs, dy, backend)
        rhs_gradient = run(programs.rhs_gradient, lhs, dy, backend)
        measured = {lhs_slot: lhs_measured, rhs_slot: rhs_measured, _DY: dy_measured}
        tap = jnp.stack([to_tap(measured[slot]) for slot in (_X, _W, _DY)])
        return lhs_gradient, rhs_gradient, np.zeros(formats.shape, jax.dtypes.float0), tap

    product.defvjp(forward, backward)
    return product(lhs, rhs, formats, tap)


def _quantized(site: Site, slot: int, value: Array, formats: Array) -> tuple[Operand, Measurement]:
    """Operand in the format that this very step uses, and what was measured to choose it."""
    widths = site.widths[slot]
    bits, exponent, should_measure = formats[slot]
    bits, exponent, measured = lax.cond(
        should_measure == 1,
        lambda: _measure(value, bits, exponent, widths, site.config),
        lambda: (bits, exponent, _nothing(widths)),
    )
    operand = quantize_operand(value, bits, exponent, widths, site.backend)
    return operand, measured._replace(nonfinite=operand.nonfinite)


def _measure(value: Array, bits, exponent, widths, config: Config):
    """Chooses a format from the tensor at hand; one of zeros or with NaN keeps its format."""
    magnitude = jnp.abs(value)
    max_abs = jnp.max(magnitude, initial=0.0)
    table = jnp.array(widths, jnp.int32)
    exponents = exponent_for(max_abs[None], table)
    distinct = len(set(widths))  # the last width may be repeated, to fill up
    errors = error_sums(value, table[:distinct], exponents[:distinct], config.measure)
    measured = Measurement(
        count=jnp.float32(1.0),
        nonfinite=jnp.float32(0.0),
        abs_sum=jnp.sum(magnitude),
        error_sums=jnp.append(errors, jnp.repeat(errors[-1:], len(widths) - distinct)),
        exponents=exponents,
    )
    chosen, _ = choose(bits, measured, table, config)
    is_range = (max_abs > 0) & jnp.isfinite(max_abs)
    kept = jax.tree.map(lambda new, old: jnp.where(is_range, new, old), measured, _nothing(widths))
    kept = kept._replace(count=jnp.float32(1.0))
    return (
        jnp.where(is_range, table[chosen], bits),
        jnp.where(is_range, measured.exponents[chosen], exponent),
        kept,
    )


def _nothing(widths) -> Measurement:
    zero = jnp.float32(0.0)
    return Measurement(
        zero, zero, zero, jnp.zeros(len(widths), jnp.float32), jnp.zeros(len(widths), jnp.int32)
    )
