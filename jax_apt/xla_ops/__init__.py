"""Fixed-point products on integer instructions: XLA custom calls for the CPU.

    gemm    batched matrix product of integer codes, or of float32 quantized while it is packed

The shared library is built with the package and registered when it is first needed; without it, as in a
portable installation, `is_available` is False and `unavailable_reason` says why. The environment variable
JAX_APT_ISA forces an instruction set: scalar, avx2 or avx512vnni.
"""

import ctypes
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
from jax import Array

_LIBRARY = pathlib.Path(__file__).with_name("libjax_apt_xla_ops.so")
_GEMM = "jax_apt_gemm"
_OPERAND_DTYPES = ("float32", "int8", "int16", "int32")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why not); registers the custom calls."""
    if not _LIBRARY.exists():
        return None, "the compiled library is not there: a portable installation, or a checkout not built"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        target = jax.ffi.pycapsule(library.jax_apt_gemm)
        library.jax_apt_isa.restype = ctypes.c_char_p
        library.jax_apt_available_isas.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:  # not a library, or one of another version
        return None, f"the compiled library does not load: {error}"
    if library.jax_apt_isa() is None:
        names = library.jax_apt_available_isas().decode()
        return None, f"JAX_APT_ISA={os.environ['JAX_APT_ISA']!r} cannot run here; available: {names}"
    jax.ffi.register_ffi_target(_GEMM, target, platform="cpu")
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


def gemm(
    lhs: Array,
    rhs: Array,
    formats: Array,
    *,
    lhs_transposed: bool = False,
    rhs_transposed: bool = False,
    isa: str = "auto",
) -> Array:
    """Exact fixed-point matrix product.

        out = float32(sum over k of code(lhs) * code(rhs)) * 2**(lhs_exponent + rhs_exponent)

    The sum is exact and rounded once. The least integer of a code's dtype, or a NaN or infinity in a
    float32 operand, makes its row or column of the result NaN.

    Args:
      lhs: (..., M, K), or (..., K, M) if `lhs_transposed`. int8, int16 or int32 codes, or float32, which
        is quantized on the way: clip(round_half_even(x / 2**exponent)).
      rhs: (..., K, N), or (..., N, K) if `rhs_transposed`; likewise.
      formats: int32 (..., 4): lhs bits, lhs exponent, rhs bits, rhs exponent. Run-time values; bits in
        2..24 bound the codes. Leading dimensions, if any, are the first of the operands' batch.
      isa: instruction set, "auto" or one of `available_isas()`.

    Returns:
      float32 (..., M, N).

    Raises:
      ValueError: shapes do not agree, or an ISA cannot run here.
      TypeError: a dtype is not supported.
      RuntimeError: the library is not available.
    """
    _library()
    if isa != "auto" and isa not in available_isas():
        raise ValueError(f"isa must be auto or one of {', '.join(available_isas())}; got {isa!r}")
    out_shape = _check(lhs, rhs, formats, lhs_transposed, rhs_transposed)
    call = jax.ffi.ffi_call(_GEMM, jax.ShapeDtypeStruct(out_shape, jnp.float32), vmap_method="broadcast_all")
    return call(lhs, rhs, formats, lhs_transposed=lhs_transposed, rhs_transposed=rhs_transposed, isa=isa)


def _check(lhs, rhs, formats, lhs_transposed, rhs_transposed) -> tuple[int, ...]:
    """Shape of the result; raises if the operands do not fit together."""
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if x.dtype.name not in _OPERAND_DTYPES:
            raise TypeError(f"gemm: {name} must be {', '.join(_OPERAND_DTYPES)}; got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(f"gemm: {name} needs at least 2 dimensions, got shape {x.shape}")
    if formats.dtype != jnp.int32:
        raise TypeError(f"gemm: formats must be int32, got {formats.dtype}")
    batch = lhs.shape[:-2]
    if rhs.shape[:-2] != batch:
        raise ValueError(f"gemm: batch of lhs {batch} != batch of rhs {rhs.shape[:-2]}")
    if formats.shape[-1:] != (4,) or formats.shape[:-1] != batch[: formats.ndim - 1]:
        raise ValueError(f"gemm: formats have shape {formats.shape}; with batch {batch}, (4,) is enough")
    m, k = lhs.shape[-2:][::-1] if lhs_transposed else lhs.shape[-2:]
    rhs_k, n = rhs.shape[-2:][::-1] if rhs_transposed else rhs.shape[-2:]
    if k != rhs_k:
        raise ValueError(f"gemm: depth of lhs {k} != depth of rhs {rhs_k}")
    return (*batch, m, n)
