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
from jax.extend.core import jaxpr_as_fun

from jax_apt import _jax_versions as versions
from jax_apt.config import GEMMS, Config
from jax_apt.fixed_point import Fixed, exponent_for, random_key, round_stochastically
from jax_apt.native import can_quantize_gradient, run_weight_gradient
from jax_apt.products import Operand, Program, Programs, adapt_operand, quantize_operand, run
from jax_apt.qem import error_sums
from jax_apt.qpa import Measurement, choose
from jax_apt.state import to_tap
from jax_apt.xla_ops.partitioning import may_be_split

CODES_NAME = "jax_apt_codes"  # for jax.checkpoint_policies.save_only_these_names

X, W, DY = range(3)  # rows of formats and taps


class Site(NamedTuple):
    """What is fixed of one product when the function is traced."""

    programs: Programs
    is_weight_lhs: bool  # which operand is W
    widths: tuple[tuple[int, ...], ...]  # candidates of x, w, dy, padded to one length
    backend: str
    config: Config
    gemms: tuple[str, ...] = GEMMS  # which of the three products run in fixed point
    rounding: str = "nearest"  # of dy
    seed: int = 0  # of stochastic rounding
    mesh_axes: tuple[str, ...] = ()  # of a `shard_map` around, along which operands may differ
    copied: tuple[tuple[str, ...], ...] = ((), ())  # of these, those along which lhs and rhs are the same
    is_settled: bool = False  # formats are read as they are, none is chosen here


def quantized_product(site: Site, lhs: Array, rhs: Array, formats: Array, tap: Array) -> Array:
    """One convolution or matrix product in fixed point.

    Args:
      site: the product.
      lhs, rhs: float32 operands, shapes as the product was traced with.
      formats: int32 (3, 4): bits, exponent, whether to measure and training step, of x, w and dy.
      tap: float32 (3, S) zeros; its cotangent is the statistics of the step.

    Returns:
      float32 result.
    """

    @jax.custom_vjp
    def product(lhs, rhs, formats, tap):
        return _forward(site, lhs, rhs, formats)[0]

    def forward(lhs, rhs, formats, tap):
        out, kept, measured = _forward(site, lhs, rhs, formats)
        return out, (kept, measured, formats)

    def backward(residuals, gradient):
        (lhs, rhs), measured, formats = residuals
        dy, dy_measured = _quantized(site, DY, ("dx", "dw"), gradient, formats)
        lhs_gemm, rhs_gemm = _gradient_gemms(site)
        lhs_slot, rhs_slot = _slots(site)
        lhs, rhs = _restored(site, lhs_slot, lhs), _restored(site, rhs_slot, rhs)
        lhs_gradient = _run(site, lhs_gemm, site.programs.lhs_gradient, rhs, (dy, gradient))
        rhs_gradient = _run(site, rhs_gemm, site.programs.rhs_gradient, lhs, (dy, gradient))
        tap = _tap(measured, dy_measured)
        return lhs_gradient, rhs_gradient, np.zeros(formats.shape, jax.dtypes.float0), tap

    product.defvjp(forward, backward)
    return product(lhs, rhs, formats, tap)


def frozen_product(site: Site, x: Array, weight: Operand, formats: Array) -> Array:
    """The forward product alone, of a weight that is quantized already.

    Args:
      site: the product; of its programs only the forward one is used.
      x: float32, the other operand.
      weight: the weight, codes as the site's backend keeps them.
      formats: int32 (2, 4): bits, exponent, whether to measure and training step, of x and w.

    Returns:
      float32 result.
    """
    operand, _ = _quantized(site, X, ("fwd",), x, formats)
    if site.is_weight_lhs:
        return _run(site, "fwd", site.programs.forward, (weight, None), (operand, x))
    return _run(site, "fwd", site.programs.forward, (operand, x), (weight, None))


def forward_product(site: Site, lhs: Array, rhs: Array, formats: Array) -> Array:
    """The forward product alone; both operands are quantized here. Arguments as `frozen_product` has them."""
    return _forward(site, lhs, rhs, formats)[0]


def product_without_weight_gradient(
    site: Site, lhs: Array, rhs: Array, formats: Array, tap: Array, probe: tuple[Array | None, Array]
) -> tuple[Array, tuple[Fixed, Array]]:
    """The same product for a loop that computes its weight gradient later: that of W is zero here.

    Args:
      site, lhs, rhs, formats, tap: as `quantized_product` has them.
      probe: zeros, float32, of the result's shape and of shape (2,); their cotangents are dY, and its bits
        and exponent. None in place of the former: dY is not asked for.

    Returns:
      (result, codes of X and how many of its values were NaN or infinite)
    """
    x_index, w_index = (1, 0) if site.is_weight_lhs else (0, 1)
    x_program = site.programs[1 + x_index]

    @jax.custom_vjp
    def product(lhs, rhs, formats, tap, probe):
        out, kept, _ = _forward(site, lhs, rhs, formats)
        return out, kept[x_index][0]

    def forward(lhs, rhs, formats, tap, probe):
        out, kept, measured = _forward(site, lhs, rhs, formats)
        return (out, kept[x_index][0]), (kept[w_index], measured, formats)

    def backward(residuals, cotangents):
        weight, measured, formats = residuals
        gradient, _ = cotangents
        dy, dy_measured = _quantized(site, DY, ("dx", "dw"), gradient, formats)
        assert dy is not None  # "dw" is among the site's products
        dx = _run(site, "dx", x_program, _restored(site, W, weight), (dy, gradient))
        nothing = jnp.zeros((lhs, rhs)[w_index].shape, jnp.float32)
        gradients = (nothing, dx) if site.is_weight_lhs else (dx, nothing)
        format = jnp.stack([dy.number.bits, dy.number.exponent]).astype(jnp.float32)
        none = np.zeros(formats.shape, jax.dtypes.float0)
        asked = None if probe[0] is None else gradient
        return *gradients, none, _tap(measured, dy_measured), (asked, format)

    product.defvjp(forward, backward)
    return product(lhs, rhs, formats, tap, probe)


def _slots(site: Site) -> tuple[int, int]:
    """Which of X and W the operands are."""
    return (W, X) if site.is_weight_lhs else (X, W)


def _gradient_gemms(site: Site) -> tuple[str, str]:
    """The products that give the gradients of lhs and rhs."""
    return ("dw", "dx") if site.is_weight_lhs else ("dx", "dw")


def _forward(site: Site, lhs: Array, rhs: Array, formats: Array):
    """(result, residuals of lhs and rhs, what was measured by slot)"""
    (lhs_slot, rhs_slot), (lhs_gemm, rhs_gemm) = _slots(site), _gradient_gemms(site)
    lhs_operand, lhs_measured = _quantized(site, lhs_slot, ("fwd", rhs_gemm), lhs, formats)
    rhs_operand, rhs_measured = _quantized(site, rhs_slot, ("fwd", lhs_gemm), rhs, formats)
    out = _run(site, "fwd", site.programs.forward, (lhs_operand, lhs), (rhs_operand, rhs))
    kept = _kept(site, rhs_gemm, lhs_operand, lhs), _kept(site, lhs_gemm, rhs_operand, rhs)
    return out, kept, {lhs_slot: lhs_measured, rhs_slot: rhs_measured}


def _tap(measured: dict[int, Measurement], dy_measured: Measurement) -> Array:
    """Cotangent of the tap: the statistics of the step."""
    measured = measured | {DY: dy_measured}
    return jnp.stack([to_tap(measured[slot]) for slot in (X, W, DY)])


# One of the three products. Its operands are pairs: quantized (None where no product needs that), and float.


def _run(site: Site, gemm: str, program: Program, a, b) -> Array:
    if gemm in site.gemms:
        return run(program, a[0], b[0], site.backend)
    return jaxpr_as_fun(program.jaxpr)(a[1], b[1])[0]


def _kept(site: Site, gemm: str, operand: Operand | None, value: Array):
    """Residuals that a later product needs: codes if it is quantized, else the tensor itself."""
    if gemm in site.gemms:
        assert operand is not None
        return (operand.number, operand.nonfinite), None
    return None, value


def _restored(site: Site, slot: int, kept) -> tuple[Operand | None, Array]:
    codes, value = kept
    return (None if codes is None else Operand(codes[0], site.widths[slot], codes[1])), value


def _quantized(
    site: Site, slot: int, gemms: tuple[str, ...], value: Array, formats: Array
) -> tuple[Operand | None, Measurement]:
    """Operand of `gemms` in the format that this very step uses, and what was measured to choose it."""
    widths = site.widths[slot]
    nothing = _nothing(widths, value)
    if not set(gemms) & set(site.gemms):
        return None, nothing
    if _chooses_natively(site, slot, value):
        seed = site.seed if _is_random(site, slot) else None
        operand, measured = adapt_operand(value, formats, slot, widths, site.config, seed)
        return _named(operand, measured)
    bits, exponent, should_measure, step = formats[slot]
    measured = nothing
    if not site.is_settled:
        bits, exponent, measured = lax.cond(
            should_measure == 1,
            lambda: _measure(value, bits, exponent, widths, site),
            lambda: (bits, exponent, nothing),
        )
    value = _drawn(site, slot, value, exponent, step)
    operand = quantize_operand(value, bits, exponent, widths, site.backend)
    operand, measured = _named(operand, measured)
    copied = () if slot == DY else site.copied[_slots(site).index(slot)]
    return operand, measured._replace(nonfinite=_counted_once(operand.nonfinite, copied))


def weight_product(site: Site, program: Program, x: Operand, dy: Array, dy_format: Array) -> Array:
    """X^T . dY^ alone, of a dY that is rounded as the site's rule says.

    Args:
      site: the product.
      program: (X, dY) -> dW.
      x: quantized already.
      dy: float32.
      dy_format: int32 (4,): bits, exponent, 0, and the training step.
    """
    widths, seed = site.widths[DY], site.seed if _is_random(site, DY) else None
    if _chooses_natively(site, DY, dy):
        form, target = program.form, program.target
        if form is not None and can_quantize_gradient(form, target):
            return run_weight_gradient(form, target, (x.number, x.nonfinite), dy, dy_format, seed)
        operand, _ = adapt_operand(dy, dy_format[None], 0, widths, site.config, seed)
    else:
        bits, exponent, _, step = dy_format
        operand = quantize_operand(_drawn(site, DY, dy, exponent, step), bits, exponent, widths, site.backend)
    return run(program, x, operand, site.backend)


def _chooses_natively(site: Site, slot: int, value: Array) -> bool:
    """Whether one custom call can measure and quantize: not where devices choose a format together."""
    is_apart = bool(site.mesh_axes or versions.varying_axes(value)) or may_be_split()
    return site.backend == "native" and not (site.is_settled or is_apart)


def _is_random(site: Site, slot: int) -> bool:
    return slot == DY and site.rounding == "stochastic"


def _drawn(site: Site, slot: int, value: Array, exponent: Array, step: Array) -> Array:
    """The value itself, or what it is rounded to at random."""
    if not _is_random(site, slot):
        return value
    return round_stochastically(value, exponent, random_key(site.seed, step))


def _named(operand: Operand, measured: Measurement) -> tuple[Operand, Measurement]:
    """Named where they are made: whatever a remat computes again starts from them, and quantizes nothing."""
    number, nonfinite, measured = checkpoint_name((operand.number, operand.nonfinite, measured), CODES_NAME)
    return operand._replace(number=number, nonfinite=nonfinite), measured


def _counted_once(count: Array, copied: tuple[str, ...]) -> Array:
    """A count that the devices' sum holds once: of those that have the same tensor the first gives it."""
    for axis in copied:
        count = jnp.where(lax.axis_index(axis) == 0, count, 0.0)
    return count


def _measure(value: Array, bits, exponent, widths, site: Site):
    """Chooses a format from the tensor at hand; one of zeros or with NaN keeps its format.

    Inside a `shard_map` the devices choose together, from the range and the sums of the whole tensor; each
    reports its own part.
    """
    config, axes = site.config, site.mesh_axes
    magnitude = jnp.abs(value)
    max_abs = jnp.max(magnitude, initial=0.0)
    max_abs = lax.pmax(max_abs, axes) if axes else max_abs
    table = jnp.array(widths, jnp.int32)
    exponents = exponent_for(max_abs[None], table)
    distinct = len(set(widths))  # the last width may be repeated, to fill up
    errors = error_sums(value, table[:distinct], exponents[:distinct], config.measure)
    nothing = _nothing(widths, value)
    measured = nothing._replace(
        count=nothing.count + 1,
        abs_sum=jnp.sum(magnitude),
        error_sums=jnp.append(errors, jnp.repeat(errors[-1:], len(widths) - distinct)),
        exponents=nothing.exponents + exponents,
    )
    total = measured
    if axes:
        abs_sum, errors = lax.psum((measured.abs_sum, measured.error_sums), axes)
        total = measured._replace(abs_sum=abs_sum, error_sums=errors)
    chosen, _ = choose(bits, total, table, config)
    is_range = (max_abs > 0) & jnp.isfinite(max_abs)
    kept = jax.tree.map(lambda new, old: jnp.where(is_range, new, old), measured, nothing)
    kept = kept._replace(count=measured.count)
    return (
        jnp.where(is_range, table[chosen], bits),
        jnp.where(is_range, exponents[chosen], exponent),
        kept,
    )


def _nothing(widths, value: Array) -> Measurement:
    """Zeros, varying over the same devices as `value`."""
    zero, size = jnp.float32(0.0), len(widths)
    zeros = Measurement(zero, zero, zero, jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.int32))
    axes = versions.varying_axes(value)
    return jax.tree.map(lambda x: versions.as_varying(x, axes), zeros) if axes else zeros
