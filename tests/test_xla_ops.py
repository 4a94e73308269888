"""The CPU custom calls: equal, bit for bit, to naive int64 products on every ISA that runs here."""

import ctypes
import importlib.metadata
import itertools
import mmap
import os
import pathlib
import subprocess
import sys
import threading

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_apt import xla_ops

ISAS = xla_ops.available_isas() if xla_ops.is_available() else ("none",)
BITS = (2, 8, 9, 14, 16, 24)
DTYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3}  # numbers of the plain C entry point
TRANSPOSES = tuple(itertools.product((False, True), repeat=2))

each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def library(request):
    """Skips with the reason where the library was deliberately not built."""
    if request.function is not test_a_normal_installation_has_the_library and not xla_ops.is_available():
        pytest.skip(xla_ops.unavailable_reason())


# Oracles


def sums_oracle(lhs, rhs):
    """(M, K) x (K, N) in int64, one depth at a time."""
    out = np.zeros((lhs.shape[0], rhs.shape[1]), np.int64)
    for k in range(lhs.shape[1]):
        out += np.outer(lhs[:, k].astype(np.int64), rhs[k].astype(np.int64))
    return out


def gemm_oracle(lhs, rhs, formats):
    """float32 of the exact sums, then the scale; codes (M, K) and (K, N)."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(sums_oracle(lhs, rhs).astype(np.float32), int(formats[1]) + int(formats[3]))


def quantize_oracle(x, bits, exponent):
    """Codes by float64 arithmetic, which holds every float32 quotient by a power of two exactly."""
    largest = 2 ** (bits - 1) - 1
    return np.clip(np.rint(np.ldexp(x.astype(np.float64), -exponent)), -largest, largest).astype(np.int64)


def nan_oracle(out, bad_rows, bad_columns):
    out = out.copy()
    out[bad_rows, :] = np.nan
    out[:, bad_columns] = np.nan
    return out


# Callers


def stored(codes, is_transposed, dtype=None):
    return np.ascontiguousarray(codes.swapaxes(-1, -2) if is_transposed else codes, dtype)


def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def gemm_on_buffers(isa, lhs, rhs, formats, transposes=(False, False), out=None):
    """The kernels on plain memory: operands as they are stored, any address, no XLA."""
    m, k = lhs.shape[::-1] if transposes[0] else lhs.shape
    n = rhs.shape[0] if transposes[1] else rhs.shape[1]
    out = np.full((m, n), 7, np.float32) if out is None else out
    call = xla_ops._library().jax_apt_gemm_on_buffers
    call.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64(s) for s in (m, n, k)]
    formats = np.array(formats, np.int32)
    error = call(
        isa.encode(),
        *(address(lhs), DTYPES[lhs.dtype.name], int(transposes[0])),
        *(address(rhs), DTYPES[rhs.dtype.name], int(transposes[1])),
        *(address(formats), address(out), *sizes),
    )
    assert error is None, error
    return out


def check_codes(isa, lhs, rhs, formats, transposes=(False, False), dtypes=None):
    """Compares a product of codes (M, K) and (K, N) with the oracle."""
    dtypes = dtypes or [helpers.container(formats[0]), helpers.container(formats[2])]
    stored_lhs, stored_rhs = map(stored, (lhs, rhs), transposes, dtypes)
    out = gemm_on_buffers(isa, stored_lhs, stored_rhs, formats, transposes)
    np.testing.assert_array_equal(out, gemm_oracle(lhs, rhs, formats))


def random_codes(rng, shape, bits):
    return helpers.codes(rng, shape, bits, rng.choice(["random", "extreme", "largest"]))


# The library


def test_a_normal_installation_has_the_library():
    """Only a portable installation or a bare checkout may go without, and then says so."""
    try:
        wheel = importlib.metadata.distribution("jax-apt").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        wheel = "Root-Is-Purelib: true"
    path = pathlib.Path(xla_ops.__file__).with_name("libjax_apt_xla_ops.so")
    if "Root-Is-Purelib: true" in wheel and not path.exists():
        pytest.skip(xla_ops.unavailable_reason())
    assert xla_ops.is_available(), xla_ops.unavailable_reason()
    assert xla_ops.unavailable_reason() == ""


def test_the_widest_isa_comes_first_and_scalar_always_runs():
    order = ("avx512vnni", "avx2", "scalar")
    assert xla_ops.available_isas() == tuple(name for name in order if name in xla_ops.available_isas())
    assert xla_ops.available_isas()[-1] == "scalar"
    assert xla_ops.isa() == os.environ.get("JAX_APT_ISA", xla_ops.available_isas()[0])


def run_python(code, isa):
    env = {**os.environ, "JAX_APT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    return result.stdout.strip(), result.stderr


@each_isa
def test_environment_forces_the_isa(isa):
    out, error = run_python("from jax_apt import xla_ops; print(xla_ops.isa())", isa)
    assert out == isa, error


def test_unknown_isa_in_the_environment_is_an_error_but_not_of_the_import():
    out, error = run_python(
        "from jax_apt import xla_ops; print(xla_ops.unavailable_reason()); xla_ops.isa()", "sse9"
    )
    assert out.startswith("JAX_APT_ISA='sse9' cannot run here; available: ")
    assert "RuntimeError: jax_apt.xla_ops cannot run: JAX_APT_ISA='sse9'" in error


def test_a_missing_library_is_a_reason_and_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(xla_ops, "_LIBRARY", tmp_path / "missing.so")
    library, reason = xla_ops._load.__wrapped__()
    assert library is None
    assert "portable installation" in reason


def test_a_library_that_does_not_load_is_a_reason_and_not_an_error(monkeypatch, tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(xla_ops, "_LIBRARY", path)
    library, reason = xla_ops._load.__wrapped__()
    assert library is None
    assert reason.startswith("the compiled library does not load: ")


# Widths, shapes, storage


SHAPES = (  # M, K, N: ones, primes, blocks and their neighbours
    (1, 1, 1), (1, 7, 1), (5, 1, 3), (13, 17, 31), (6, 63, 16), (12, 64, 32), (7, 129, 33), (97, 31, 17),
    (3, 257, 5), (2, 513, 3), (5, 1025, 34), (2, 5, 515), (0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0),
)  # fmt: skip


@each_isa
@pytest.mark.parametrize("lhs_bits", BITS)
@pytest.mark.parametrize("rhs_bits", BITS)
def test_every_width_and_shape_equals_int64(isa, lhs_bits, rhs_bits):
    rng = np.random.default_rng([lhs_bits, rhs_bits])
    for m, k, n in SHAPES:
        lhs, rhs = random_codes(rng, (m, k), lhs_bits), random_codes(rng, (k, n), rhs_bits)
        for transposes in TRANSPOSES:
            check_codes(isa, lhs, rhs, (lhs_bits, -3, rhs_bits, 2), transposes)


@each_isa
@pytest.mark.parametrize("lhs_bits", (8, 16, 24))
@pytest.mark.parametrize("rhs_bits", (8, 16, 24))
@pytest.mark.parametrize("signs", ((1, 1), (1, -1), (-1, -1)))
def test_extreme_codes_of_one_sign_do_not_overflow(isa, lhs_bits, rhs_bits, signs):
    lhs = np.full((13, 1100), signs[0] * (2 ** (lhs_bits - 1) - 1))
    rhs = np.full((1100, 33), signs[1] * (2 ** (rhs_bits - 1) - 1))
    check_codes(isa, lhs, rhs, (lhs_bits, 0, rhs_bits, 0))


@each_isa
@pytest.mark.parametrize(
    "bits, depth",
    [
        ((8, 8), 133144),  # the deepest sum of 127 * 127 that an int32 holds
        ((8, 8), 133145),
        ((8, 8), 266311),
        ((16, 8), 133153),
        ((8, 16), 70001),
        ((16, 16), 131073),
        ((9, 9), 33000),
        ((24, 8), 66001),
        ((24, 24), 65536),  # the deepest that 62 bits hold
    ],
)
def test_deep_products_spill_before_they_overflow(isa, bits, depth):
    largest = [2 ** (b - 1) - 1 for b in bits]
    lhs, rhs = np.full((2, depth), largest[0]), np.full((depth, 3), largest[1])
    lhs[1], rhs[:, 1] = -largest[0], -largest[1]
    formats = (bits[0], 0, bits[1], 0)
    out = gemm_on_buffers(
        isa, lhs.astype(helpers.container(bits[0])), rhs.astype(helpers.container(bits[1])), formats
    )
    total = depth * largest[0] * largest[1]
    expected = np.array([[total, -total, total], [-total, total, -total]], object)
    np.testing.assert_array_equal(out, helpers.float32_oracle(expected))


@each_isa
def test_sums_round_once_half_to_even(isa):
    """2**24 + odd numbers and their neighbours: the sum of two products hits every case of rounding."""
    lows = np.arange(-9, 10)
    lhs = np.array([[2**12, 1], [2**15, 1], [-(2**15), 1], [2**20, 1]])
    rhs = np.stack([np.full(lows.shape, 2**12), lows])
    formats = (24, 0, 16, 0)
    out = gemm_on_buffers(isa, lhs.astype(np.int32), rhs.astype(np.int16), formats)
    np.testing.assert_array_equal(out, helpers.float32_oracle(sums_oracle(lhs, rhs)))


@each_isa
@pytest.mark.parametrize("bits", ((5, 5), (5, 12), (12, 5), (8, 16)))
def test_codes_may_lie_in_a_wider_container(isa, bits):
    rng = np.random.default_rng(3)
    lhs, rhs = helpers.codes(rng, (9, 41), bits[0]), helpers.codes(rng, (41, 19), bits[1])
    for dtypes in itertools.product((np.int16, np.int32), repeat=2):
        check_codes(isa, lhs, rhs, (bits[0], 1, bits[1], 1), dtypes=dtypes)


@each_isa
@pytest.mark.parametrize(
    "exponents", [(-126, 122), (122, -126), (-126, -126), (-20, -126), (100, 122), (0, 0)]
)
def test_exponents_do_not_under_or_overflow_on_the_way(isa, exponents):
    rng = np.random.default_rng(4)
    for bits in (8, 24):
        lhs, rhs = helpers.codes(rng, (4, 9), bits), helpers.codes(rng, (9, 5), bits)
        check_codes(isa, lhs, rhs, (bits, exponents[0], bits, exponents[1]))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_product_equals_int64(data):
    draw = data.draw
    isa, transposes = draw(st.sampled_from(ISAS)), draw(st.sampled_from(TRANSPOSES))
    m, k, n = (draw(st.integers(0, 70), label=name) for name in "MKN")
    formats = [draw(st.integers(*r)) for r in ((2, 24), (-60, 60)) * 2]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    operands, codes = [], []
    for shape, bits, exponent, is_transposed in zip(
        ((m, k), (k, n)), formats[::2], formats[1::2], transposes, strict=True
    ):
        containers = [d for d in (np.int8, np.int16, np.int32) if np.iinfo(d).bits >= bits]
        dtype = draw(st.sampled_from([np.float32, *containers]))
        values = random_codes(rng, shape, bits)
        if dtype is np.float32:
            x = np.ldexp((values + rng.choice([0, 0.25, 0.5], shape)).astype(np.float32), exponent)
            operands.append(stored(x, is_transposed))
            values = quantize_oracle(x, bits, exponent)
        else:
            operands.append(stored(values, is_transposed, dtype))
        codes.append(values)
    out = gemm_on_buffers(isa, *operands, formats, transposes)
    np.testing.assert_array_equal(out, gemm_oracle(*codes, formats))


# Quantization of float32 operands


@each_isa
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", (-126, -7, 0, 30, 90))
def test_float32_is_quantized_half_to_even_and_clipped(isa, bits, exponent):
    """Ties, values just inside and outside the range, and the largest finite floats, against the identity."""
    largest = 2 ** (bits - 1) - 1
    steps = np.array(
        [0, 0.5, 1, 1.5, 2.5, -0.5, -1.5, largest - 0.5, largest + 0.5, largest, 2 * largest, -largest]
    )
    with np.errstate(over="ignore"):
        x = np.ldexp(np.concatenate([steps, -largest - steps]).astype(np.float32), exponent)
    x = np.append(x, np.float32([3.4e38, -3.4e38, 1.1754944e-38]))
    x = x[np.isfinite(x)]
    expected = quantize_oracle(x, bits, exponent).astype(np.float32)
    one = np.ones((1, 1), np.int8)
    for transposes in TRANSPOSES:
        column = gemm_on_buffers(
            isa, stored(x[:, None], transposes[0]), one, (bits, exponent, 8, -exponent), transposes
        )
        np.testing.assert_array_equal(column[:, 0], expected)
        row = gemm_on_buffers(
            isa, one, stored(x[None], transposes[1]), (8, -exponent, bits, exponent), transposes
        )
        np.testing.assert_array_equal(row[0], expected)


@each_isa
@pytest.mark.parametrize("bits", ((8, 8), (8, 24), (16, 8), (16, 16), (24, 24)))
def test_float32_operands_equal_their_codes(isa, bits):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(37, 130)).astype(np.float32), rng.normal(size=(130, 70)).astype(np.float32)
    formats = (bits[0], 2 - bits[0], bits[1], 2 - bits[1])
    expected = gemm_oracle(quantize_oracle(x, *formats[:2]), quantize_oracle(y, *formats[2:]), formats)
    for transposes in TRANSPOSES:
        out = gemm_on_buffers(isa, stored(x, transposes[0]), stored(y, transposes[1]), formats, transposes)
        np.testing.assert_array_equal(out, expected)


# Non-finite values


def marked(values, dtype, where, mark):
    values = values.astype(dtype)
    for at in where:
        values[at] = mark
    return values


MARKS = [(np.int8, -128), (np.int16, -(2**15)), (np.int32, -(2**31))]
MARKS += [(np.float32, mark) for mark in (np.nan, np.inf, -np.inf)]


@each_isa
@pytest.mark.parametrize("dtype, mark", MARKS)
@pytest.mark.parametrize("transposes", TRANSPOSES)
def test_marks_make_their_rows_and_columns_nan(isa, dtype, mark, transposes):
    rng = np.random.default_rng(6)
    for m, k, n in ((5, 3, 4), (31, 600, 45)):
        lhs, rhs = helpers.codes(rng, (m, k), 8), helpers.codes(rng, (k, n), 8)
        rows, columns = [(0, 0), (m - 1, k - 1), (m // 2, k // 2)], [(0, n - 1), (k - 1, 1)]
        for lhs_marks, rhs_marks in ((rows, []), ([], columns), (rows, columns)):
            finite_lhs, finite_rhs = marked(lhs, np.int64, lhs_marks, 0), marked(rhs, np.int64, rhs_marks, 0)
            expected = nan_oracle(
                gemm_oracle(finite_lhs, finite_rhs, (8, 0, 8, 0)),
                [r for r, _ in lhs_marks],
                [c for _, c in rhs_marks],
            )
            x = stored(marked(lhs, dtype, lhs_marks, mark), transposes[0])
            y = stored(marked(rhs, dtype, rhs_marks, mark), transposes[1])
            for bits in ((8, 8), (16, 8), (24, 24)):
                formats = (bits[0], 0, bits[1], 0)
                np.testing.assert_array_equal(gemm_on_buffers(isa, x, y, formats, transposes), expected)


# Memory


class Guarded:
    """Arrays that end, or begin, where inaccessible memory does."""

    _libc = ctypes.CDLL(None, use_errno=True)
    _NO_ACCESS = 0  # PROT_NONE

    def __init__(self, size, at_end):
        page = mmap.PAGESIZE
        self.inner = -(-max(size, 1) // page) * page
        self.memory = mmap.mmap(-1, self.inner + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for guard in (base, base + page + self.inner):
            assert self._libc.mprotect(ctypes.c_void_p(guard), page, self._NO_ACCESS) == 0
        self.offset = page + (self.inner - size if at_end else 0)

    @classmethod
    def like(cls, values, at_end):
        guarded = cls(values.nbytes, at_end)
        array = np.frombuffer(guarded.memory, values.dtype, values.size, guarded.offset).reshape(values.shape)
        array[...] = values
        return array


@each_isa
@pytest.mark.parametrize("at_end", (True, False))
@pytest.mark.parametrize(
    "dtype, bits", [(np.int8, 8), (np.int16, 16), (np.int32, 24), (np.float32, 8), (np.float32, 24)]
)
def test_nothing_outside_the_buffers_is_touched(isa, at_end, dtype, bits):
    rng = np.random.default_rng(7)
    for m, k, n in ((1, 1, 1), (7, 13, 5), (12, 64, 32), (13, 67, 35), (6, 515, 17)):
        lhs, rhs = helpers.codes(rng, (m, k), bits), helpers.codes(rng, (k, n), bits)
        expected = gemm_oracle(lhs, rhs, (bits, 0, bits, 0))
        for transposes in TRANSPOSES:
            x, y = (
                Guarded.like(stored(v, t, dtype), at_end) for v, t in zip((lhs, rhs), transposes, strict=True)
            )
            out = Guarded.like(np.zeros((m, n), np.float32), at_end)
            gemm_on_buffers(isa, x, y, (bits, 0, bits, 0), transposes, out)
            np.testing.assert_array_equal(out, expected)


# Under JAX


def jax_codes(rng, shape, bits):
    codes = helpers.codes(rng, shape, bits)
    return codes, jnp.asarray(codes, helpers.container(bits))


def int32(*values):
    return jnp.array(values, jnp.int32)


def batched_oracle(lhs, rhs, formats):
    return np.stack([gemm_oracle(*p) for p in zip(lhs, rhs, formats, strict=True)])


@each_isa
@pytest.mark.parametrize("lhs_bits", (8, 16, 24))
@pytest.mark.parametrize("rhs_bits", (8, 16, 24))
@pytest.mark.parametrize("transposes", TRANSPOSES)
def test_gemm_under_jit(isa, lhs_bits, rhs_bits, transposes):
    rng = np.random.default_rng(8)
    lhs, rhs = helpers.codes(rng, (3, 19, 35), lhs_bits), helpers.codes(rng, (3, 35, 21), rhs_bits)
    out = jax.jit(
        lambda x, y, f: xla_ops.gemm(
            x, y, f, lhs_transposed=transposes[0], rhs_transposed=transposes[1], isa=isa
        )
    )(
        stored(lhs, transposes[0], helpers.container(lhs_bits)),
        stored(rhs, transposes[1], helpers.container(rhs_bits)),
        int32(lhs_bits, -9, rhs_bits, -8),
    )
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, batched_oracle(lhs, rhs, [(lhs_bits, -9, rhs_bits, -8)] * 3))


@pytest.mark.parametrize(
    "batch, m, k, n",
    [
        (1, 301, 290, 303),  # one product, split among the threads
        (3, 130, 1100, 140),  # products that are split, one after the other
        (40, 33, 65, 31),  # small products, each on one thread
        (1000, 1, 9, 1),
        (2, 1, 40000, 50),
    ],
)
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (24, 16)))
def test_large_products_and_batches_use_threads_and_agree(batch, m, k, n, bits):
    rng = np.random.default_rng(9)
    lhs, x = jax_codes(rng, (batch, m, k), bits[0])
    rhs, y = jax_codes(rng, (batch, k, n), bits[1])
    formats = (bits[0], 0, bits[1], 0)
    out = xla_ops.gemm(x, y, int32(*formats))
    np.testing.assert_array_equal(out, np.matmul(lhs, rhs).astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_empty_products(shape, batch):
    m, k, n = shape
    out = xla_ops.gemm(jnp.zeros((*batch, m, k), jnp.int8), jnp.zeros((*batch, k, n)), int32(8, 0, 8, 0))
    np.testing.assert_array_equal(out, np.zeros((*batch, m, n), np.float32))


def test_formats_may_cover_the_first_batch_dimensions():
    rng = np.random.default_rng(10)
    lhs, x = jax_codes(rng, (2, 3, 4, 5), 8)
    rhs, y = jax_codes(rng, (2, 3, 5, 6), 8)
    for dims in ((), (2,), (2, 3)):
        exponents = rng.integers(-5, 5, (*dims, 1))
        formats = np.concatenate([exponents * 0 + 8, exponents, exponents * 0 + 8, exponents - 1], -1)
        each = np.broadcast_to(formats.reshape(*dims, *[1] * (2 - len(dims)), 4), (2, 3, 4)).reshape(6, 4)
        expected = batched_oracle(lhs.reshape(6, 4, 5), rhs.reshape(6, 5, 6), each)
        out = xla_ops.gemm(x, y, jnp.array(formats, jnp.int32))
        np.testing.assert_array_equal(out.reshape(6, 4, 6), expected)


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 0)])
def test_vmap(in_axes):
    rng = np.random.default_rng(11)
    formats = np.array([(8, -3, 16, 2), (5, 0, 9, -4), (7, 1, 24, 1)])
    lhs = np.stack([helpers.codes(rng, (4, 6), f[0]) for f in formats])
    rhs = np.stack([helpers.codes(rng, (6, 5), f[2]) for f in formats])
    values, args, each = (lhs, rhs, formats), [], []
    for value, axis, dtype in zip(values, in_axes, (np.int32, np.int32, np.int32), strict=True):
        each.append(value if axis is not None else np.stack([value[0]] * 3))
        args.append(jnp.asarray(value[0] if axis is None else np.moveaxis(value, 0, axis), dtype))
    if in_axes[2] is None:  # one format for all operands: the widest
        args[2] = int32(8, 0, 24, 0)
        each[2] = [(8, 0, 24, 0)] * 3
    elif in_axes[0] is None:  # one operand for all formats: the narrowest codes
        args[0], args[1] = jnp.ones((4, 6), jnp.int32), jnp.ones((6, 5), jnp.int32)
        each[0], each[1] = np.ones((3, 4, 6), int), np.ones((3, 6, 5), int)
    out = jax.vmap(xla_ops.gemm, in_axes)(*args)
    np.testing.assert_array_equal(out, batched_oracle(*each))


def test_widths_change_without_recompilation():
    rng = np.random.default_rng(12)
    traces = []

    @jax.jit
    def product(x, y, formats):
        traces.append(1)
        return xla_ops.gemm(x, y, formats)

    x, y = rng.normal(size=(9, 40)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    for bits in itertools.product((8, 14, 16, 24), repeat=2):
        formats = (bits[0], 3 - bits[0], bits[1], 3 - bits[1])
        expected = gemm_oracle(quantize_oracle(x, *formats[:2]), quantize_oracle(y, *formats[2:]), formats)
        np.testing.assert_array_equal(product(x, y, int32(*formats)), expected)
    assert len(traces) == 1


def test_scan_and_remat():
    rng = np.random.default_rng(13)
    lhs, x = jax_codes(rng, (6, 30), 8)
    rhs, y = jax_codes(rng, (30, 7), 8)
    formats = [(8, e, 8, -e - i) for i, e in enumerate((-3, 0, 5))]

    @jax.jit
    def products(formats):
        return lax.scan(lambda c, f: (c, jax.checkpoint(xla_ops.gemm)(x, y, f)), 0, formats)[1]

    np.testing.assert_array_equal(
        products(jnp.array(formats, jnp.int32)), batched_oracle([lhs] * 3, [rhs] * 3, formats)
    )


def test_threads_may_call_at_once():
    rng = np.random.default_rng(14)
    lhs, x = jax_codes(rng, (170, 210), 8)
    rhs, y = jax_codes(rng, (210, 190), 16)
    expected = np.matmul(lhs, rhs).astype(np.float32)
    product = jax.jit(lambda x, y, f: [xla_ops.gemm(x, y, f), xla_ops.gemm(x + jnp.int8(0), y, f)])
    product(x, y, int32(8, 0, 16, 0))
    wrong = []

    def call():
        for _ in range(20):
            for out in product(x, y, int32(8, 0, 16, 0)):
                if not np.array_equal(out, expected):
                    wrong.append(out)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Errors


F = (8, 0, 8, 0)


@pytest.mark.parametrize(
    "lhs, rhs, formats, error, message",
    [
        ((2, 3), (4, 5), (4,), ValueError, "depth of lhs 3 != depth of rhs 4"),
        ((3,), (3, 5), (4,), ValueError, "lhs needs at least 2 dimensions"),
        ((2, 3), (5,), (4,), ValueError, "rhs needs at least 2 dimensions"),
        ((2, 2, 3), (3, 3, 5), (4,), ValueError, r"batch of lhs \(2,\) != batch of rhs \(3,\)"),
        ((2, 3), (3, 5), (3,), ValueError, r"formats have shape \(3,\)"),
        ((2, 2, 3), (2, 3, 5), (3, 4), ValueError, r"formats have shape \(3, 4\)"),
        ((2, 3), (3, 5), (1, 4), ValueError, r"formats have shape \(1, 4\)"),
    ],
)
def test_shapes_that_do_not_fit(lhs, rhs, formats, error, message):
    with pytest.raises(error, match=message):
        xla_ops.gemm(jnp.zeros(lhs, jnp.int8), jnp.zeros(rhs, jnp.int8), jnp.zeros(formats, jnp.int32))


def test_dtypes_that_do_not_fit():
    x, y = jnp.zeros((2, 3), jnp.int8), jnp.zeros((3, 4), jnp.float16)
    with pytest.raises(TypeError, match="rhs must be float32, int8, int16, int32; got float16"):
        xla_ops.gemm(x, y, int32(*F))
    with pytest.raises(TypeError, match="formats must be int32"):
        xla_ops.gemm(x, x.T, jnp.zeros(4))


def test_isa_that_cannot_run():
    x = jnp.zeros((2, 2), jnp.int8)
    with pytest.raises(ValueError, match=r"isa must be auto or one of .*scalar; got 'sse9'"):
        xla_ops.gemm(x, x, int32(*F), isa="sse9")


@pytest.mark.parametrize(
    "formats, depth, message",
    [
        ((1, 0, 8, 0), 3, "bits must be in 2..24, got 1"),
        ((8, 0, 25, 0), 3, "bits must be in 2..24, got 25"),
        ((8, 127, 8, 0), 3, "exponent must be in -126..126, got 127"),
        ((8, 0, 8, -127), 3, "exponent must be in -126..126, got -127"),
        ((24, 0, 24, 0), 65537, "at most 62, got 63"),
    ],
)
def test_formats_that_cannot_run(formats, depth, message):
    x = jnp.zeros((1, depth), jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(xla_ops.gemm(x, x.T, int32(*formats)))


@pytest.mark.parametrize(
    "lhs, rhs, out, message",
    [
        ((2, 3), (4, 5), (2, 5), "gemm: depth of lhs 3 != depth of rhs 4"),
        ((3,), (3, 5), (5,), "gemm: lhs needs at least 2 dimensions"),
        ((2, 3), (3, 5), (2, 6), "gemm: batch of lhs 1, of rhs 1 and the result do not agree"),
    ],
)
def test_the_custom_call_checks_what_python_would(lhs, rhs, out, message):
    call = jax.ffi.ffi_call("jax_apt_gemm", jax.ShapeDtypeStruct(out, jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            call(
                *(jnp.zeros(lhs, jnp.int8), jnp.zeros(rhs, jnp.int8), int32(*F)),
                lhs_transposed=False, rhs_transposed=False, isa="auto",
            )
        )  # fmt: skip
