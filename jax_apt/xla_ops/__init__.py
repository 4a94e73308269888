"""Fixed-point products on integer instructions: XLA custom calls for the CPU.

    quantize   float32 -> limb planes: byte i of (code + 2**(8 * limbs - 1)), limbs = ceil(bits / 8)
    adapt      the same in a format that is first chosen, where an update is due
    product    one of the three products of a convolution, or of a matrix product, of such planes
    weight_gradient     of a matrix product, from planes and a float32 gradient that it quantizes itself
    max_pool_gradient   float32, as XLA computes it, in a tenth of the time
    barrier    its operand, in place; XLA does not know that, and takes it for a new value

The shared library is built with the package and registered when it is first needed; without it, as in a
portable installation, `is_available` is False and `unavailable_reason` says why. The environment variable
JAX_APT_ISA forces an instruction set: amx, avx512vnni, avxvnni, avx2, neon_i8mm, neon or scalar.
"""

import ctypes
import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_apt.config import MEASURES
from jax_apt.xla_ops.partitioning import partitioned

_LIBRARY = pathlib.Path(__file__).with_name("libjax_apt_xla_ops.so")
_TARGETS = (
    "jax_apt_product",
    "jax_apt_weight_gradient",
    "jax_apt_quantize",
    "jax_apt_adapt",
    "jax_apt_max_pool_gradient",
    "jax_apt_barrier",
)
_KINDS = ("forward", "input_gradient", "filter_gradient")

Kind = Literal["forward", "input_gradient", "filter_gradient"]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why not); registers the custom calls."""
    if not _LIBRARY.exists():
        return None, "the compiled library is not there: a portable installation, or a checkout not built"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        targets = {name: jax.ffi.pycapsule(getattr(library, name)) for name in _TARGETS}
        library.jax_apt_isa.restype = ctypes.c_char_p
        library.jax_apt_available_isas.restype = ctypes.c_char_p
        if library.jax_apt_isa() is None:
            names = library.jax_apt_available_isas().decode()
            return None, f"JAX_APT_ISA={os.environ['JAX_APT_ISA']!r} cannot run here; available: {names}"
        for name, target in targets.items():
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except (OSError, AttributeError) as error:  # not a library, or one of another version
        return None, f"the compiled library does not load: {error}"
    except jax.errors.JaxRuntimeError as error:
        return None, f"the compiled library was built for another jaxlib; install jax_apt again: {error}"
    return library, ""


def is_available() -> bool:
    """Whether the custom calls can run on this machine's CPU."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why `is_available` is False; "" if it is True."""
    return _load()[1]


def isa() -> str:
    """Name of the instruction set that runs: the widest, or the one that JAX_APT_ISA names."""
    return _library().jax_apt_isa().decode()


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that can run on this CPU, widest first."""
    return tuple(_library().jax_apt_available_isas().decode().split(","))


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"jax_apt.xla_ops cannot run: {reason}")
    return library


def _check_isa(isa: str) -> None:
    _library()
    if isa != "auto" and isa not in available_isas():
        raise ValueError(f"isa must be auto or one of {', '.join(available_isas())}; got {isa!r}")


# Quantization


def limb_count(bits: int) -> int:
    """Planes that hold codes of a width: one for every 8 bits."""
    return math.ceil(bits / 8)


def quantize(x: Array, bits, exponent, *, limbs: int, isa: str = "auto") -> tuple[Array, Array]:
    """Limb planes of clip(round_half_even(x / 2**exponent), +-(2**(bits-1) - 1)).

    Args:
      x: float32, any shape.
      bits: int32 scalar, 2..8 * limbs; a run-time value. Only the planes that it needs are written.
      exponent: int32 scalar, -126..126.
      limbs: planes of the result, 1..3.
      isa: instruction set, "auto" or one of `available_isas()`.

    Returns:
      (uint8 planes `(limbs, *x.shape)`, float32 scalar: how many values were NaN or infinite; their bytes
      are 0 in every plane).

    Raises:
      ValueError: `limbs` is not 1, 2 or 3, or an ISA cannot run here.
      TypeError: `x` is not float32.
      RuntimeError: the library is not available.
    """
    _check_isa(isa)
    if limbs not in (1, 2, 3):
        raise ValueError(f"quantize: limbs must be 1, 2 or 3, got {limbs!r}")
    if x.dtype != jnp.float32:
        raise TypeError(f"quantize: x must be float32, got {x.dtype}")
    dims = tuple(f"d{i}" for i in range(x.ndim))
    run = partitioned(
        partial(_quantize, limbs=limbs, isa=isa),
        (dims, (), ()),
        (("limb", *dims), ()),
        frozenset({"limb"}),
    )
    planes, nonfinite = run(x, jnp.asarray(bits, jnp.int32), jnp.asarray(exponent, jnp.int32))
    return planes, nonfinite


def _quantize(parts, x: Array, bits: Array, exponent: Array, *, limbs: int, isa: str) -> tuple[Array, Array]:
    results = (
        jax.ShapeDtypeStruct((limbs, *x.shape), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_apt_quantize", results, vmap_method="broadcast_all")
    planes, nonfinite = call(x, bits, exponent, isa=isa)
    return planes, nonfinite


class Choice(NamedTuple):
    """How `adapt` chooses a format; the method is that of `jax_apt.qem` and `jax_apt.qpa`."""

    widths: tuple[int, ...]  # candidates, ascending; the last may be repeated; at most 23
    measure: str  # one of `jax_apt.config.MEASURES`
    is_restart: bool  # the search begins at the narrowest width, not at that in use
    limit: float  # largest |error sum| / sum|x| that needs no wider format


class Adapted(NamedTuple):
    """A tensor in limb planes, its format, and what was measured: zeros where nothing was due."""

    planes: Array  # uint8 (limbs, *shape)
    bits: Array  # int32 ()
    exponent: Array  # int32 ()
    nonfinite: Array  # float32 (): NaN and infinite values
    measured: Array  # float32 (): 1 if an update was due
    abs_sum: Array  # float32 (): sum|x|; 0 for a tensor without a range: zeros alone, or with NaN
    error_sums: Array  # float32 (W,)
    exponents: Array  # int32 (W,): what the largest magnitude needs at each width


def adapt(
    x: Array, formats: Array, row: int, choice: Choice, *, seed: int | None = None, isa: str = "auto"
) -> Adapted:
    """`quantize` in the format of a row of a table; where the row asks for it, a new one is chosen first.

    Sums are kept in double, part by part in a fixed order: they do not depend on the number of threads, and
    differ from XLA's float32 sums by rounding alone. For arrays that are on one device as a whole.

    Args:
      x: float32, any shape.
      formats: int32 (rows, 4): bits, exponent, whether to measure (1), and the training step.
      row: of `formats`.
      choice: how a format is chosen.
      seed: None rounds to nearest; a number below 2**32 at random, as `fixed_point.round_stochastically` does
        with the key of this seed and the row's step.
      isa: instruction set, "auto" or one of `available_isas()`.

    Raises:
      ValueError: a row, a width, a measure or a seed is wrong, or an ISA cannot run here.
      TypeError: `x` is not float32, or `formats` not int32.
      RuntimeError: the library is not available.
    """
    _check_isa(isa)
    if x.dtype != jnp.float32 or formats.dtype != jnp.int32:
        raise TypeError(f"adapt: x and formats must be float32 and int32, got {x.dtype} and {formats.dtype}")
    if formats.ndim != 2 or formats.shape[1] != 4 or not 0 <= row < formats.shape[0]:
        raise ValueError(f"adapt: formats must be (rows, 4) and have row {row}, got shape {formats.shape}")
    if choice.measure not in MEASURES or not 1 <= len(choice.widths) <= 23:
        raise ValueError(f"adapt: measure must be one of {', '.join(MEASURES)}, widths 1 to 23; got {choice}")
    _check_seed("adapt", seed)
    widths = (len(choice.widths),)
    number, integer = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
    results = (
        jax.ShapeDtypeStruct((limb_count(choice.widths[-1]), *x.shape), jnp.uint8),
        *(integer, integer, number, number, number),
        jax.ShapeDtypeStruct(widths, jnp.float32),
        jax.ShapeDtypeStruct(widths, jnp.int32),
    )
    call = jax.ffi.ffi_call("jax_apt_adapt", results, vmap_method="broadcast_all")
    attributes = {
        "row": row,
        "widths": np.asarray(choice.widths, np.int64),
        "measure": MEASURES.index(choice.measure),
        "is_restart": int(choice.is_restart),
        "limit": np.float32(choice.limit),
        "seed": _seed_attribute(seed),
    }
    return Adapted(*call(x, formats, **attributes, isa=isa))


# Products


class Geometry(NamedTuple):
    """A convolution y = x * w of three spatial dimensions; those that a product lacks have size 1.

        y[n, o] = sum over taps t of x[n, o * stride + t * dilation - pad] . w[t]

    x: (matrices, batch, *inputs, in_channels); w: (matrices, *window, in_channels / groups, out_channels);
    y: (matrices, batch, *outputs, out_channels). A batch of matrix products (matrices, M, K) x (matrices,
    K, N) has M as its last spatial dimension, K input and N output channels.
    """

    matrices: int
    batch: int
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    pad: tuple[int, int, int]  # before the first pixel; negative crops
    dilation: tuple[int, int, int]
    groups: int
    in_channels: int
    out_channels: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of x, w and y."""
        inner = self.in_channels // self.groups
        return {
            "x": (self.matrices, self.batch, *self.inputs, self.in_channels),
            "w": (self.matrices, *self.window, inner, self.out_channels),
            "y": (self.matrices, self.batch, *self.outputs, self.out_channels),
        }

    def is_matrices(self) -> bool:
        """Whether this is a batch of matrix products, without groups."""
        is_plain = self.window == self.stride == (1, 1, 1) and self.pad == (0, 0, 0)
        return is_plain and self.inputs == self.outputs and self.groups == 1

    def numbers(self) -> np.ndarray:
        """As the custom call takes it."""
        return np.hstack([np.asarray(value, np.int64) for value in self])


_OPERANDS = {"forward": "xwy", "input_gradient": "ywx", "filter_gradient": "xyw"}  # lhs, rhs, result


def product(
    kind: Kind,
    geometry: Geometry,
    lhs: Array,
    rhs: Array,
    formats: Sequence[Array] | Array,
    *,
    nonfinite: tuple[Array, Array] | None = None,
    isa: str = "auto",
) -> Array:
    """One of the three products of a convolution, exact.

        forward          (x, w) -> y
        input_gradient   (dy, w) -> dx
        filter_gradient  (x, dy) -> dw

    Every element of the result is the exact sum of products of codes, rounded once to float32, times
    2**(lhs_exponent + rhs_exponent); NaN if a value contributes to it that was NaN or infinite.

    Args:
      kind: which product.
      geometry: of the convolution whose product it is.
      lhs, rhs: uint8 limb planes `(limbs, *shape)`, shapes as `geometry.shapes()` has them.
      formats: four int32 scalars: lhs bits, lhs exponent, rhs bits, rhs exponent. Run-time values.
      nonfinite: float32 scalars, how many values of lhs and of rhs were not finite; None: none.
      isa: instruction set, "auto" or one of `available_isas()`.

    Returns:
      float32, shape as `geometry.shapes()` has it.

    Raises:
      ValueError: a shape, a kind or an ISA is wrong.
      TypeError: a dtype is wrong.
      RuntimeError: the library is not available.
    """
    _check_isa(isa)
    formats = list(formats)
    result = _check_product(kind, geometry, lhs, rhs, formats)
    lhs_bad, rhs_bad = nonfinite or (jnp.float32(0), jnp.float32(0))
    call = jax.ffi.ffi_call(
        "jax_apt_product", jax.ShapeDtypeStruct(result, jnp.float32), vmap_method="broadcast_all"
    )
    operands = lhs, *formats[:2], lhs_bad, rhs, *formats[2:], rhs_bad
    return call(*operands, kind=_KINDS.index(kind), geometry=geometry.numbers(), isa=isa)


def weight_gradient(
    geometry: Geometry,
    x: Array,
    x_format: tuple[Array, Array],
    dy: Array,
    dy_format: Array,
    *,
    nonfinite: Array | None = None,
    seed: int | None = None,
    isa: str = "auto",
) -> Array:
    """The filter gradient of a matrix product, of which dy is quantized on the way: no planes of it are kept.

    The result is that of `product` on what `adapt` makes of dy with the same seed.

    Args:
      geometry: of a product of matrices without groups.
      x: uint8 limb planes `(limbs, *shape)`, shape as `geometry.shapes()` has it.
      x_format: int32 scalars, bits and exponent of x.
      dy: float32, shape of y.
      dy_format: int32 (4,): bits, exponent, a number that is not read, and the training step.
      nonfinite: float32 scalar, how many values of x were not finite; None: none.
      seed: as in `adapt`.
      isa: instruction set, "auto" or one of `available_isas()`.

    Returns:
      float32, shape of w.

    Raises:
      ValueError: a shape, a seed or an ISA is wrong, or the geometry is not that of matrices.
      TypeError: a dtype is wrong.
      RuntimeError: the library is not available.
    """
    _check_isa(isa)
    _check_seed("weight_gradient", seed)
    shapes = geometry.shapes()
    if not geometry.is_matrices():
        raise ValueError(f"weight_gradient: only of a product of matrices, without groups; got {geometry}")
    if x.shape[1:] != shapes["x"] or dy.shape != shapes["y"] or dy_format.shape != (4,):
        raise ValueError(
            f"weight_gradient: x, dy and dy_format must have shapes (limbs, *{shapes['x']}), {shapes['y']} "
            f"and (4,), got {x.shape}, {dy.shape} and {dy_format.shape}"
        )
    if (x.dtype, dy.dtype, dy_format.dtype) != (jnp.uint8, jnp.float32, jnp.int32):
        raise TypeError(
            "weight_gradient: x, dy and dy_format must be uint8, float32 and int32, got "
            f"{x.dtype}, {dy.dtype} and {dy_format.dtype}"
        )
    bad = jnp.float32(0) if nonfinite is None else nonfinite
    result = jax.ShapeDtypeStruct(shapes["w"], jnp.float32)
    call = jax.ffi.ffi_call("jax_apt_weight_gradient", result, vmap_method="broadcast_all")
    attributes = {"geometry": geometry.numbers(), "seed": _seed_attribute(seed), "isa": isa}
    return call(x, *x_format, bad, dy, dy_format, **attributes)


def _check_seed(name: str, seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"{name}: seed must be in 0..2**32 - 1, or None; got {seed!r}")


def _seed_attribute(seed: int | None) -> int:
    return -1 if seed is None else seed


def count_terms(attributes: Mapping[str, Any], rhs_shape: tuple[int, ...]) -> int:
    """That a product in a jaxpr sums for an element of its result, at most.

    Args:
      attributes: of its `ffi_call`.
      rhs_shape: of its second operand.
    """
    *summed, last = rhs_shape[-5:]
    if _KINDS[attributes["kind"]] == "input_gradient":
        summed[-1] = last
    return math.prod(summed)


def _check_product(kind: str, geometry: Geometry, lhs: Array, rhs: Array, formats: list) -> tuple[int, ...]:
    """Shape of the result; raises as `product` says."""
    if kind not in _KINDS:
        raise ValueError(f"product: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    shapes = geometry.shapes()
    *operands, result = (shapes[role] for role in _OPERANDS[kind])
    for name, planes, shape in zip(("lhs", "rhs"), (lhs, rhs), operands, strict=True):
        if planes.dtype != jnp.uint8:
            raise TypeError(f"product: {name} must be uint8 limb planes, got {planes.dtype}")
        if planes.shape[1:] != shape:
            raise ValueError(f"product: {name} has planes of shape {planes.shape[1:]}, not {shape}")
    if len(formats) != 4 or any(f.dtype != jnp.int32 or f.shape != () for f in formats):
        raise TypeError(f"product: formats must be four int32 scalars, got {formats}")
    return result


# Max pooling

_MAX_POOL_TAPS = 1024  # of a window


class Pool(NamedTuple):
    """Max pooling of up to three neighbouring dimensions, as `lax.reduce_window` takes it."""

    window: tuple[int, ...]  # for every dimension of the operand
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def pooled(self) -> range:
        """Dimensions from the first to the last that are pooled or padded."""
        dims = [
            d
            for d, (w, s, p) in enumerate(zip(self.window, self.strides, self.padding, strict=True))
            if (w, s, *p) != (1, 1, 0, 0)
        ]
        return range(dims[0], dims[-1] + 1) if dims else range(0)

    def is_supported(self) -> bool:
        """Whether `max_pool_gradient` takes it: at most three dimensions, at most 1024 values a window."""
        return 1 <= len(self.pooled()) <= 3 and math.prod(self.window) <= _MAX_POOL_TAPS


def max_pool_gradient(x: Array, dy: Array, pool: Pool, *, isa: str = "auto") -> Array:
    """Gradient of max pooling with respect to its input; XLA's own, bit for bit.

    Of equal values the first of a window takes the gradient; windows add up in row-major order.

    Args:
      x: float32, the pooled array.
      dy: float32, the gradient with respect to the result.
      pool: windows, strides and padding, for every dimension of `x`.
      isa: instruction set, "auto" or one of `available_isas()`.

    Returns:
      float32, shape of `x`.

    Raises:
      ValueError: a pool that is not supported, shapes that do not fit, or an ISA that cannot run here.
      TypeError: an array is not float32.
      RuntimeError: the library is not available.
    """
    _check_isa(isa)
    if not pool.is_supported():
        raise ValueError(
            f"max_pool_gradient: at most 3 neighbouring dimensions and {_MAX_POOL_TAPS} values a window, got "
            f"{pool.window} with strides {pool.strides} and padding {pool.padding}"
        )
    for name, array in (("x", x), ("dy", dy)):
        if array.dtype != jnp.float32:
            raise TypeError(f"max_pool_gradient: {name} must be float32, got {array.dtype}")
    dims = zip(x.shape, pool.window, pool.strides, pool.padding, strict=True)
    outputs = tuple(max((n + low + high - w) // s + 1, 0) for n, w, s, (low, high) in dims)
    if dy.shape != outputs:
        raise ValueError(f"max_pool_gradient: dy must have shape {outputs}, got {dy.shape}")
    names = tuple(f"{'p' if d in pool.pooled() else 'd'}{d}" for d in range(x.ndim))
    run = partitioned(
        partial(_max_pool_gradient, pool=pool, isa=isa),
        (names, tuple(name.replace("p", "o") for name in names)),
        (names,),
        frozenset(f"{letter}{d}" for d in pool.pooled() for letter in "po"),
    )
    return run(x, dy)[0]


def _max_pool_gradient(parts, x: Array, dy: Array, *, pool: Pool, isa: str) -> tuple[Array]:
    pooled = pool.pooled()
    fields = [
        [values[d] for d in pooled]
        for values in (x.shape, dy.shape, pool.window, pool.strides, [low for low, _ in pool.padding])
    ]
    numbers = [
        (fill,) * (3 - len(pooled)) + tuple(f) for f, fill in zip(fields, (1, 1, 1, 1, 0), strict=True)
    ]
    geometry = np.hstack([*numbers, math.prod(x.shape[pooled.stop :])]).astype(np.int64)
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("jax_apt_max_pool_gradient", result, vmap_method="broadcast_all")
    return (call(x, dy, geometry=geometry, isa=isa),)


# Barrier


def barrier(x: Array, after: Array) -> Array:
    """`x` itself, once `after` is there.

    XLA's compiler for CPUs drops `lax.optimization_barrier`, and then merges what stands behind it with equal
    operations elsewhere. Of a custom call it knows only that it needs both operands.

    Args:
      x, after: any shape and dtype.

    Returns:
      The buffer of `x`, or a copy of it if that is still needed elsewhere.

    Raises:
      RuntimeError: the library is not available.
    """
    _library()
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        "jax_apt_barrier", result, input_output_aliases={0: 0}, vmap_method="broadcast_all"
    )
    return call(x, after)
