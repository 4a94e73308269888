"""The CPU custom calls: equal, bit for bit, to naive int64 products on every ISA that runs here."""

import ctypes
import importlib.metadata
import itertools
import os
import pathlib
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
from helpers import planes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import (
    CONVOLUTIONS,
    ISAS,
    KINDS,
    WIDTHS,
    Guarded,
    address,
    check,
    convolution,
    draw_operands,
    each_isa,
    each_kind,
    matrices,
    operand_shapes,
    oracle,
    product_on_buffers,
    quantize_oracle,
    sums_oracle,
)

from jax_apt import xla_ops


@pytest.fixture(autouse=True)
def library(request):
    """Skips with the reason where the library was deliberately not built."""
    if request.function is not test_a_normal_installation_has_the_library and not xla_ops.is_available():
        pytest.skip(xla_ops.unavailable_reason())


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
    order = ("amx", "avx512vnni", "avxvnni", "avx2", "scalar")
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


def test_a_library_for_another_jaxlib_is_a_reason_and_not_an_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: FFI handler's API version 0.5 is not supported")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    library, reason = xla_ops._load.__wrapped__()
    assert library is None
    assert reason.startswith("the compiled library was built for another jaxlib; install jax_apt again: ")


# Products


MATRICES = (  # M, K, N: ones, primes, blocks and their neighbours
    (1, 1, 1), (1, 7, 1), (5, 1, 3), (13, 17, 31), (6, 63, 16), (12, 64, 32), (7, 129, 33), (97, 31, 17),
    (3, 257, 5), (2, 513, 3), (5, 1025, 34), (2, 5, 515), (32, 128, 64), (48, 192, 40), (0, 3, 4), (3, 0, 4),
    (3, 4, 0), (0, 0, 0),
)  # fmt: skip


@each_isa
@each_kind
@pytest.mark.parametrize("bits", [(a, b) for a in WIDTHS for b in WIDTHS if a == 8 or b in (8, a)])
def test_matrix_products_equal_int64(isa, kind, bits):
    rng = np.random.default_rng(bits)
    for m, k, n in MATRICES:
        geometry = matrices(m, k, n)
        check(isa, kind, geometry, *draw_operands(rng, kind, geometry, *bits), (bits[0], -3, bits[1], 2))


@each_isa
@each_kind
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_int64(isa, kind, name):
    geometry = CONVOLUTIONS[name]
    for bits in ((8, 8), (16, 8), (8, 16), (24, 8), (8, 24), (16, 24)):
        rng = np.random.default_rng(bits)
        check(isa, kind, geometry, *draw_operands(rng, kind, geometry, *bits), (bits[0], 1, bits[1], -9))


def draw_geometry(draw):
    dims = draw(st.integers(0, 3))

    def three(low, high, fill):
        values = [draw(st.integers(low, high)) for _ in range(dims)]
        return (fill,) * (3 - dims) + tuple(values)

    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([0, 1, 2, 3, 4, 5, 16, 17, 33, 64, 70]))
    features = groups * draw(st.sampled_from([1, 2, 3, 8, 31, 32, 33, 65]))
    if draw(st.booleans()) and channels:  # depthwise
        groups = features = channels
    shape = {"batch": draw(st.integers(1, 3)), "matrices": draw(st.integers(1, 2)), "groups": groups}
    if dims == 0:
        return convolution(draw(st.integers(0, 90)), channels, features, 1, **shape)
    return convolution(
        three(1, 12, 1), channels, features, three(1, 4, 1), stride=three(1, 3, 1), pad=three(-1, 3, 0),
        pad_after=three(-1, 3, 0), dilation=three(1, 3, 1), **shape,
    )  # fmt: skip


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_product_equals_int64(data):
    geometry, kind = draw_geometry(data.draw), data.draw(st.sampled_from(list(KINDS)))
    formats = [data.draw(st.integers(*r)) for r in ((2, 24), (-60, 60)) * 2]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lhs, rhs = draw_operands(rng, kind, geometry, formats[0], formats[2])
    check(data.draw(st.sampled_from(ISAS)), kind, geometry, lhs, rhs, formats)


@each_isa
@pytest.mark.parametrize("lhs_bits", (8, 16, 24))
@pytest.mark.parametrize("rhs_bits", (8, 16, 24))
@pytest.mark.parametrize("signs", ((1, 1), (1, -1), (-1, -1)))
def test_extreme_codes_of_one_sign_do_not_overflow(isa, lhs_bits, rhs_bits, signs):
    lhs = np.full((1, 1, 1, 1, 13, 1100), signs[0] * (2 ** (lhs_bits - 1) - 1))
    rhs = np.full((1, 1, 1, 1, 1100, 33), signs[1] * (2 ** (rhs_bits - 1) - 1))
    check(isa, "forward", matrices(13, 1100, 33), lhs, rhs, (lhs_bits, 0, rhs_bits, 0))


DEEP = [
    ((8, 8), 133144),  # the deepest sum of 127 * 127 that an int32 holds
    ((8, 8), 133145),
    ((8, 8), 266311),
    ((16, 8), 133153),
    ((8, 16), 70001),
    ((16, 16), 131073),
    ((9, 9), 33000),
    ((24, 8), 66001),
    ((24, 24), 65536),  # the deepest that 62 bits hold
]


@each_isa
@each_kind
@pytest.mark.parametrize("bits, depth", DEEP)
def test_deep_products_spill_before_they_overflow(isa, kind, bits, depth):
    """Sums of the largest codes, and of one sign against the other, along each product's own depth."""
    geometry = {
        "forward": matrices(2, depth, 3),
        "input_gradient": matrices(2, 3, depth),
        "filter_gradient": matrices(depth, 2, 3),
    }[kind]
    lhs_shape, rhs_shape, out_shape = operand_shapes(kind, geometry)
    a, b = (2 ** (n - 1) - 1 for n in bits)
    lhs, rhs = np.full(lhs_shape, a), np.full(rhs_shape, b)
    (lhs[..., 1] if kind == "filter_gradient" else lhs[..., 1, :])[...] = -a
    (rhs[..., 1, :] if kind == "input_gradient" else rhs[..., 1])[...] = -b
    out = product_on_buffers(
        isa, kind, geometry, planes_of(lhs, bits[0]), planes_of(rhs, bits[1]), (bits[0], 0, bits[1], 0)
    )
    total = depth * a * b
    expected = helpers.float32_oracle(np.array([[total, -total, total], [-total, total, -total]], object))
    np.testing.assert_array_equal(out.reshape(out_shape[-2:]), expected)


@each_isa
@each_kind
@pytest.mark.parametrize("bits", [(8, 8), (16, 8), (16, 16), (24, 8), (24, 24)])
def test_depthwise_sums_do_not_overflow(isa, kind, bits):
    """Rows of 600 pixels and 64 taps, all codes extreme."""
    geometry = convolution((8, 600), 2, 2, (8, 8), groups=2, pad=(4, 4))
    lhs_shape, rhs_shape, _ = operand_shapes(kind, geometry)
    lhs, rhs = np.full(lhs_shape, 2 ** (bits[0] - 1) - 1), np.full(rhs_shape, 1 - 2 ** (bits[1] - 1))
    check(isa, kind, geometry, lhs, rhs, (bits[0], 0, bits[1], 0))


@each_isa
def test_many_taps_are_one_deep_sum(isa):
    """A window of 17 x 17 over 512 channels: 147,968 terms, more than an int32 holds."""
    geometry = convolution((18, 17), 512, 2, (17, 17))
    for bits in ((8, 8), (16, 8)):
        lhs_shape, rhs_shape, out_shape = operand_shapes("forward", geometry)
        a, b = (2 ** (n - 1) - 1 for n in bits)
        planes = planes_of(np.full(lhs_shape, a), bits[0]), planes_of(np.full(rhs_shape, -b), bits[1])
        out = product_on_buffers(isa, "forward", geometry, *planes, (bits[0], 0, bits[1], 0))
        expected = helpers.float32_oracle(np.full(out_shape, -17 * 17 * 512 * a * b, object))
        np.testing.assert_array_equal(out, expected)


@each_isa
def test_sums_round_once_half_to_even(isa):
    """2**24 + odd numbers and their neighbours: the sum of two products hits every case of rounding."""
    lows = np.arange(-9, 10)
    lhs = np.array([[2**12, 1], [2**15, 1], [-(2**15), 1], [2**20, 1]])[None, None, None, None]
    rhs = np.stack([np.full(lows.shape, 2**12), lows])[None, None, None, None]
    formats, geometry = (24, 0, 16, 0), matrices(4, 2, len(lows))
    out = product_on_buffers(isa, "forward", geometry, planes_of(lhs, 24), planes_of(rhs, 16), formats)
    np.testing.assert_array_equal(out, helpers.float32_oracle(sums_oracle("forward", geometry, lhs, rhs)))


@each_isa
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("depth", (32, 33))  # sums just below 2**51 and above it
def test_long_sums_round_once(isa, depth, sign):
    rng, geometry = np.random.default_rng(depth), matrices(7, depth, 35)
    lhs, rhs, _ = operand_shapes("forward", geometry)
    lhs, rhs = (2**23 - 1 - rng.integers(0, 4, shape) for shape in (lhs, rhs))
    check(isa, "forward", geometry, sign * lhs, rhs, (24, 0, 24, 0))


@each_isa
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (16, 16)))
def test_results_too_large_for_the_caches(isa, bits):
    rng, geometry = np.random.default_rng(6), matrices(3100, 9, 1024)
    lhs, rhs = draw_operands(rng, "forward", geometry, *bits)
    formats = (bits[0], 0, bits[1], 0)
    expected = oracle("forward", geometry, lhs, rhs, formats)
    out = Guarded.like(np.zeros(expected.shape, np.float32), at_end=False)  # which begins with a line
    product_on_buffers(
        isa, "forward", geometry, planes_of(lhs, bits[0]), planes_of(rhs, bits[1]), formats, out
    )
    np.testing.assert_array_equal(out, expected)


@each_isa
@pytest.mark.parametrize(
    "exponents", [(-126, 122), (122, -126), (-126, -126), (-20, -126), (100, 122), (0, 0)]
)
def test_exponents_do_not_under_or_overflow_on_the_way(isa, exponents):
    rng = np.random.default_rng(4)
    for bits in (8, 24):
        lhs, rhs = draw_operands(rng, "forward", matrices(4, 9, 5), bits, bits)
        check(isa, "forward", matrices(4, 9, 5), lhs, rhs, (bits, exponents[0], bits, exponents[1]))


# Quantization


def quantize_on_buffers(isa, x, bits, exponent):
    planes = np.full((xla_ops.limb_count(bits), *x.shape), 7, np.uint8)
    call = xla_ops._library().jax_apt_quantize_on_buffers
    call.restype = ctypes.c_int64
    count = call(isa.encode(), address(x), ctypes.c_int64(x.size), bits, exponent, address(planes))
    return planes, count


@each_isa
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("exponent", (-126, -7, 0, 30, 90))
def test_float32_is_quantized_half_to_even_and_clipped(isa, bits, exponent):
    """Ties, values just inside and outside the range, and the largest finite floats."""
    largest = 2 ** (bits - 1) - 1
    steps = np.array(
        [0, 0.5, 1, 1.5, 2.5, -0.5, -1.5, largest - 0.5, largest + 0.5, largest, 2 * largest, -largest]
    )
    with np.errstate(over="ignore"):
        x = np.ldexp(np.concatenate([steps, -largest - steps]).astype(np.float32), exponent)
    x = np.append(x, np.float32([3.4028235e38, -3.4028235e38, 1.1754944e-38]))
    x = x[np.isfinite(x)]
    planes, nonfinite = quantize_on_buffers(isa, x, bits, exponent)
    np.testing.assert_array_equal(planes, planes_of(quantize_oracle(x, bits, exponent), bits))
    assert nonfinite == 0


@each_isa
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", (0, 1, 15, 16, 17, 4095, 4097))
def test_values_that_are_not_finite_are_marked_and_counted(isa, bits, size):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size).astype(np.float32)
    is_bad = rng.random(size) < 0.2
    x[is_bad] = rng.choice(np.float32([np.nan, np.inf, -np.inf]), is_bad.sum())
    planes, nonfinite = quantize_on_buffers(isa, x, bits, -3)
    expected = planes_of(quantize_oracle(np.where(is_bad, 0, x), bits, -3), bits)
    np.testing.assert_array_equal(planes, np.where(is_bad, 0, expected))
    assert nonfinite == is_bad.sum()


# Memory


@each_isa
@each_kind
@pytest.mark.parametrize("at_end", (True, False))
@pytest.mark.parametrize("bits", [(8, 8), (16, 8), (8, 24)])
def test_nothing_outside_the_buffers_is_touched(isa, kind, at_end, bits):
    rng = np.random.default_rng(7)
    sizes = ((1, 1, 1), (7, 13, 5), (12, 64, 32), (13, 67, 35), (6, 515, 17), (32, 64, 32), (33, 128, 31))
    geometries = [matrices(*size) for size in sizes]
    for geometry in [*geometries, *CONVOLUTIONS.values()]:
        lhs, rhs = draw_operands(rng, kind, geometry, *bits)
        formats = (bits[0], 0, bits[1], 0)
        expected = oracle(kind, geometry, lhs, rhs, formats)
        x, y = (Guarded.like(planes_of(v, n), at_end) for v, n in zip((lhs, rhs), bits, strict=True))
        out = Guarded.like(np.zeros(expected.shape, np.float32), at_end)
        product_on_buffers(isa, kind, geometry, x, y, formats, out)
        np.testing.assert_array_equal(out, expected)


@each_isa
@pytest.mark.parametrize("at_end", (True, False))
def test_quantization_stays_within_its_buffers(isa, at_end):
    for size, bits in itertools.product((1, 5, 16, 33, 4097), (8, 16, 24)):
        x = Guarded.like(np.linspace(-1, 1, size, dtype=np.float32), at_end)
        planes = Guarded.like(np.zeros((xla_ops.limb_count(bits), size), np.uint8), at_end)
        call = xla_ops._library().jax_apt_quantize_on_buffers
        call(isa.encode(), address(x), ctypes.c_int64(size), bits, 1 - bits, address(planes))
        np.testing.assert_array_equal(planes, planes_of(quantize_oracle(x, bits, 1 - bits), bits))
