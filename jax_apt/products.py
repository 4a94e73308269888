"""The plain integer product: exact convolutions and matrix products of quantized tensors.

A `Program` is a product as JAX traced it: a convolution or a `dot_general`, with the transposes and
reversals that JAX's own transposition rule puts around it. `run` replays it on integer codes with one of
three backends. Each sums codes exactly, rounds the sum once to float32 and multiplies it by the two
resolutions, so all three give the same bits:

    emulate  float32 products of limbs so narrow that no partial sum exceeds 2**24; any device
    xla      int8 x int8 -> int32 products of limbs of 8 bits; any device
    native   the CPU custom calls of `jax_apt.xla_ops`, widths as run-time operands; codes in limb planes

NaN and infinite values are marked in the codes; every result that one of them contributes to is NaN.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jax_apt import _jax_versions as versions
from jax_apt import xla_ops
from jax_apt.config import Config
from jax_apt.fixed_point import Fixed, container, count_nonfinite, dequantize, quantize, scale
from jax_apt.gemm_form import as_gemm
from jax_apt.native import NativeForm, as_native, matrix_form, run_native, zero_planes
from jax_apt.qpa import Measurement, error_limit
from jax_apt.wide_integers import Wide, add, to_float32, widen

PRODUCTS = ("dot_general", "conv_general_dilated")

_INT32_DEPTH = (2**31 - 1) // 2**14  # products of two int8 codes that an int32 sum always holds
_INT64_BITS = 62  # magnitudes below 2**62 leave room for the partial sums of limbs
_FLOAT32_LIMIT = 2**24  # integers up to here are exact in float32


class Operand(NamedTuple):
    """A quantized tensor with what is known of its width before the program runs."""

    number: Fixed  # codes as the backend keeps them: integers, or limb planes (uint8, a leading axis)
    widths: tuple[int, ...]  # candidates of number.bits, ascending
    nonfinite: Array  # float32, shape (); NaN and infinite values in it


def quantize_operand(value: Array, bits, exponent, widths: tuple[int, ...], backend: str) -> Operand:
    """A float32 tensor as an operand of products on this backend.

    Args:
      value: float32, any shape.
      bits, exponent: int32 scalars, the format.
      widths: candidates of `bits`, ascending.
      backend: "native", "xla" or "emulate".
    """
    if backend == "native":
        limbs = xla_ops.limb_count(widths[-1])
        axes = versions.varying_axes(value)  # of which a custom call knows nothing
        codes, nonfinite = (
            versions.as_varying(x, axes) for x in xla_ops.quantize(value, bits, exponent, limbs=limbs)
        )
    else:
        codes = quantize(value, bits, exponent, container(widths[-1]))
        nonfinite = count_nonfinite(codes)
    return Operand(Fixed(codes, bits, exponent), tuple(dict.fromkeys(widths)), nonfinite)


def adapt_operand(
    value: Array, formats: Array, row: int, widths: tuple[int, ...], config: Config, seed: int | None
) -> tuple[Operand, Measurement]:
    """`quantize_operand` on the native backend, in a format that is chosen there if an update is due.

    Args:
      value: float32, any shape; not sharded.
      formats: int32 (rows, 4): bits, exponent, whether to measure and training step.
      row: of `formats`.
      widths: candidates, ascending; the last may be repeated.
      config: threshold, mode and measure.
      seed: of random rounding; None: to nearest.
    """
    limit = error_limit(config.threshold)
    choice = xla_ops.Choice(widths, config.measure, config.mode == "restart", limit)
    found = xla_ops.adapt(value, formats, row, choice, seed=seed)
    number = Fixed(found.planes, found.bits, found.exponent)
    measured = Measurement(found.measured, found.nonfinite, found.abs_sum, found.error_sums, found.exponents)
    return Operand(number, tuple(dict.fromkeys(widths)), found.nonfinite), measured


# Programs


class Program(NamedTuple):
    """A product of two operands."""

    jaxpr: ClosedJaxpr
    operands: tuple[str, str]  # of "lhs", "rhs" and "out"
    target: str  # the third: what it computes, or the gradient of
    form: NativeForm | None  # None: native multiplies patches


class Programs(NamedTuple):
    """The three products of a layer."""

    forward: Program  # (lhs, rhs) -> out
    lhs_gradient: Program  # (rhs, out gradient) -> gradient of lhs
    rhs_gradient: Program  # (lhs, out gradient) -> gradient of rhs


def trace_programs(eqn: JaxprEqn, lhs_shape, rhs_shape) -> Programs:
    """The three products of a convolution or `dot_general` equation, in float32.

    dlhs and drhs come from JAX's own transposition rule, so every dimension number, padding, dilation and
    group is covered by it.
    """
    forward = _in_float32(eqn)
    lhs = jax.ShapeDtypeStruct(lhs_shape, jnp.float32)
    rhs = jax.ShapeDtypeStruct(rhs_shape, jnp.float32)

    def lhs_gradient(rhs, out):
        return jax.linear_transpose(lambda value: forward(value, rhs), lhs)(out)[0]

    def rhs_gradient(lhs, out):
        return jax.linear_transpose(lambda value: forward(lhs, value), rhs)(out)[0]

    out = jax.eval_shape(forward, lhs, rhs)
    form = as_native(eqn, lhs_shape, rhs_shape)
    return Programs(
        Program(jax.make_jaxpr(forward)(lhs, rhs), ("lhs", "rhs"), "out", form),
        Program(jax.make_jaxpr(lhs_gradient)(rhs, out), ("rhs", "out"), "lhs", form),
        Program(jax.make_jaxpr(rhs_gradient)(lhs, out), ("lhs", "out"), "rhs", form),
    )


def trace_forward(eqn: JaxprEqn, lhs_shape, rhs_shape) -> Program:
    """The forward product alone; sizes other than its depth may be symbolic, except on the native backend."""
    lhs = jax.ShapeDtypeStruct(lhs_shape, jnp.float32)
    rhs = jax.ShapeDtypeStruct(rhs_shape, jnp.float32)
    form = as_native(eqn, lhs_shape, rhs_shape)
    return Program(jax.make_jaxpr(_in_float32(eqn))(lhs, rhs), ("lhs", "rhs"), "out", form)


def _in_float32(eqn: JaxprEqn) -> Callable[[Array, Array], Array]:
    params = versions.without_out_sharding(eqn.params) | {"preferred_element_type": jnp.dtype(jnp.float32)}
    return lambda lhs, rhs: eqn.primitive.bind(lhs, rhs, **params)


def check_sums_fit(programs: Programs, lhs_bits: int, rhs_bits: int, out_bits: int) -> None:
    """Raises ValueError if a sum of the widest codes might leave 64 bits."""
    pairs = ((lhs_bits, rhs_bits), (rhs_bits, out_bits), (lhs_bits, out_bits))
    for name, program, (a, b) in zip(Programs._fields, programs, pairs, strict=True):
        eqn = next(e for e in program.jaxpr.jaxpr.eqns if e.primitive.name in PRODUCTS)
        depth = _depth(eqn)
        if a + b - 2 + math.ceil(math.log2(max(depth, 1))) > _INT64_BITS:
            raise ValueError(
                f"its {name.replace('_', ' ')} product sums {depth} terms of {a} x {b} bits, more than a "
                "64-bit sum surely holds; lower a width with a Rule"
            )


def run(program: Program, a: Operand, b: Operand, backend: str) -> Array:
    """float32 result of a program on quantized operands, exact up to one rounding per element."""
    axes = versions.varying_axes(a.number.codes) | versions.varying_axes(b.number.codes)
    if backend == "native":
        return versions.as_varying(_exact(program, a, b, backend), axes)
    return lax.cond(
        a.nonfinite + b.nonfinite == 0,
        lambda: versions.as_varying(_exact(program, a, b, backend), axes),
        lambda: jaxpr_as_fun(program.jaxpr)(dequantize(a.number), dequantize(b.number))[0],
    )


def _exact(program: Program, a: Operand, b: Operand, backend: str) -> Array:
    if backend == "native" and program.form is not None:
        numbers = ((a.number, a.nonfinite), (b.number, b.nonfinite))
        operands = dict(zip(program.operands, numbers, strict=True))
        return run_native(program.form, program.target, operands)
    jaxpr: Jaxpr = program.jaxpr.jaxpr
    values: dict = dict(zip(jaxpr.invars, (a, b), strict=True))
    values |= dict(zip(jaxpr.constvars, program.jaxpr.consts, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        values[eqn.outvars[0]] = _step(eqn, inputs, backend)
    return values[jaxpr.outvars[0]]


def _step(eqn: JaxprEqn, inputs: list, backend: str):
    """One equation of a program: the product itself, or a rearrangement of its operands or result."""
    name = eqn.primitive.name
    if name in PRODUCTS:
        a, b = inputs
        return _EXACT[backend](eqn, a, b)
    if name in ("convert_element_type", "copy"):
        return inputs[0]
    if name not in ("transpose", "rev", "reshape", "squeeze", "broadcast_in_dim"):
        raise NotImplementedError(f"product program holds {name}, which has no integer form")
    if not isinstance(inputs[0], Operand):
        return eqn.primitive.bind(*inputs, **eqn.params)

    def rearrange(codes):
        return eqn.primitive.bind(codes, **eqn.params)

    number = inputs[0].number
    codes = (jax.vmap(rearrange) if backend == "native" else rearrange)(number.codes)
    return inputs[0]._replace(number=number._replace(codes=codes))


# Backends


def _native(eqn: JaxprEqn, a: Operand, b: Operand) -> Array:
    """A product without a native form of its own, as a matrix product of patches.

    Batch groups become one matrix with zeros between them, so a NaN goes over to the other groups too.
    """

    # The operands may differ in their number of planes: each goes through beside one plane of the other.
    x, w = a.number.codes, b.number.codes
    lhs = jax.vmap(lambda plane, zero: as_gemm(eqn, plane, w[0], zero).lhs)(x, zero_planes(a.number))
    rhs = jax.vmap(lambda plane: as_gemm(eqn, x[0], plane).rhs)(w)
    numbers = {
        "lhs": (a.number._replace(codes=lhs), a.nonfinite),
        "rhs": (b.number._replace(codes=rhs), b.nonfinite),
    }
    out = run_native(matrix_form(lhs.shape[1:], rhs.shape[1:]), "out", numbers)
    return as_gemm(eqn, x[0], w[0]).finish(out)


def _portable(exact: Callable[[JaxprEqn, Array, Array, int, int], Array]):
    """A backend from `exact(eqn, a, b, a_bits, b_bits)`, which knows the widths when it is traced."""

    def product(eqn: JaxprEqn, a: Operand, b: Operand) -> Array:
        branches = [
            lambda x, y, widths=widths: exact(eqn, x, y, *widths)
            for widths in itertools.product(a.widths, b.widths)
        ]
        index = _index(a) * len(b.widths) + _index(b)
        sums = lax.switch(index, branches, a.number.codes, b.number.codes)
        return scale(sums, a.number.exponent, b.number.exponent)

    return product


def _index(operand: Operand) -> Array:
    """Position of a run-time width among its candidates."""
    return jnp.sum(operand.number.bits > jnp.array(operand.widths, jnp.int32), dtype=jnp.int32)


def _emulate(eqn: JaxprEqn, a: Array, b: Array, a_bits: int, b_bits: int) -> Array:
    """Sums of codes by float32 products of limbs that leave every partial sum exact."""
    params = dict(eqn.params) | {"precision": lax.Precision.HIGHEST}
    a_limb, b_limb = _float_limb_bits(a_bits, b_bits, _depth(eqn))
    terms = []
    for (x, i), (y, j) in itertools.product(_limbs(a, a_bits, a_limb), _limbs(b, b_bits, b_limb)):
        partial = eqn.primitive.bind(x.astype(jnp.float32), y.astype(jnp.float32), **params)
        terms.append((partial, i + j))
    if len(terms) == 1:
        return terms[0][0]
    return _sum(widen(partial.astype(jnp.int32), shift) for partial, shift in terms)


def _float_limb_bits(a_bits: int, b_bits: int, depth: int) -> tuple[int, int]:
    """Limb widths with the fewest products whose sums over `depth` stay within 2**24."""
    choices = [
        (math.ceil(a_bits / i), math.ceil(b_bits / j), i * j)
        for i in range(1, a_bits + 1)
        for j in range(1, b_bits + 1)
        if depth * 2 ** (math.ceil(a_bits / i) + math.ceil(b_bits / j) - 2) <= _FLOAT32_LIMIT
    ]
    if not choices:
        raise ValueError(f"a product of depth {depth} is too deep for the emulate backend (2**24)")
    a_limb, b_limb, _ = min(choices, key=lambda choice: choice[2])
    return a_limb, b_limb


def _limbs(codes: Array, bits: int, limb_bits: int) -> list[tuple[Array, int]]:
    """Balanced digits: codes = sum(limb * 2**shift), each limb within +-2**(limb_bits - 1)."""
    rest, limbs = codes.astype(jnp.int32), []
    half = 1 << (limb_bits - 1)
    for shift in range(0, bits, limb_bits):
        if shift + limb_bits >= bits:
            return [*limbs, (rest, shift)]
        digit = ((rest + half) & (2 * half - 1)) - half
        limbs.append((digit, shift))
        rest = (rest - digit) >> limb_bits
    raise AssertionError("unreachable: the last limb returns")


def _xla(eqn: JaxprEqn, a: Array, b: Array, a_bits: int, b_bits: int) -> Array:
    """Sums of codes by int8 x int8 -> int32 matrix products of 8-bit limbs."""
    form = as_gemm(eqn, a, b)
    if max(a_bits, b_bits) <= 8 and form.depth <= _INT32_DEPTH:
        return form.finish(_int8_gemm(form.lhs, form.rhs).astype(jnp.float32))
    terms = []
    for start in range(0, max(form.depth, 1), _INT32_DEPTH):
        block = slice(start, start + _INT32_DEPTH)
        lhs, rhs = form.lhs[:, :, block], form.rhs[:, block, :]
        for (x, i), (y, j) in itertools.product(_int8_limbs(lhs, a_bits), _int8_limbs(rhs, b_bits)):
            terms.append(widen(_limb_product(x, y, lhs.shape[2]), i + j))
    return form.finish(jnp.broadcast_to(_sum(terms), (*form.lhs.shape[:2], form.rhs.shape[2])))


def _int8_limbs(codes: Array, bits: int) -> list[tuple[Array | None, int]]:
    """Digits in -128..127 with their shifts; None is a tensor of ones.

    The low digits of two's complement are 0..255, so 128 is taken off each and given back through a
    tensor of ones, of which a product is just a sum of the other operand.
    """
    wide, limbs, shift = codes.astype(jnp.int32), [], 0
    while bits - shift > 8:
        limbs.append((((wide >> shift & 255) - 128).astype(jnp.int8), shift))
        limbs.append((None, shift + 7))
        shift += 8
    return [*limbs, ((wide >> shift).astype(jnp.int8), shift)]


def _limb_product(x: Array | None, y: Array | None, depth: int) -> Array:
    """int32 (B, M, N), or a shape that broadcasts to it, of two limbs (B, M, K) and (B, K, N)."""
    if x is not None and y is not None:
        return _int8_gemm(x, y)
    if x is not None:
        return jnp.sum(x, 2, dtype=jnp.int32, keepdims=True)
    if y is not None:
        return jnp.sum(y, 1, dtype=jnp.int32, keepdims=True)
    return jnp.full((1, 1, 1), depth, jnp.int32)


def _int8_gemm(lhs: Array, rhs: Array) -> Array:
    """(B, M, K) x (B, K, N) -> (B, M, N), int8 to int32."""
    dims = (((2,), (1,)), ((0,), (0,)))
    lhs, rhs = lhs.astype(jnp.int8), rhs.astype(jnp.int8)
    return lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.int32)


def _sum(terms) -> Array:
    """float32 of an exact sum of `Wide` terms."""
    total: Wide | None = None
    for term in terms:
        total = term if total is None else add(total, term)
    assert total is not None
    return to_float32(total)


def _depth(eqn: JaxprEqn) -> int:
    """Upper bound on the terms of one output element."""
    shape = versions.aval(eqn.invars[1]).shape
    if eqn.primitive.name == "dot_general":
        (_, contracting), _ = eqn.params["dimension_numbers"]
        return math.prod(shape[d] for d in contracting)
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    return math.prod(shape) // max(shape[out_feature], 1)


_EXACT = {"emulate": _portable(_emulate), "xla": _portable(_xla), "native": _native}
