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
from helpers import planes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_apt import xla_ops
from jax_apt.xla_ops import Geometry

ISAS = xla_ops.available_isas() if xla_ops.is_available() else ("none",)
KINDS = {"forward": "xwy", "input_gradient": "ywx", "filter_gradient": "xyw"}  # lhs, rhs, result
WIDTHS = (2, 8, 9, 14, 16, 24)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def library(request):
    """Skips with the reason where the library was deliberately not built."""
    if request.function is not test_a_normal_installation_has_the_library and not xla_ops.is_available():
        pytest.skip(xla_ops.unavailable_reason())


# Oracles


def quantize_oracle(x, bits, exponent):
    """Codes by float64 arithmetic, which holds every float32 quotient by a power of two exactly."""
    largest = 2 ** (bits - 1) - 1
    return np.clip(np.rint(np.ldexp(x.astype(np.float64), -exponent)), -largest, largest).astype(np.int64)


def sums_oracle(kind, geometry, lhs, rhs):
    """The product in int64: a loop over taps and groups, each a small product over what the tap meets."""
    shapes = geometry.shapes()
    t = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
    first, second, result = KINDS[kind]
    t[first], t[second] = lhs.astype(np.int64), rhs.astype(np.int64)
    inner, features = shapes["w"][4], geometry.out_channels // geometry.groups
    for tap in itertools.product(*map(range, geometry.window)):
        meets = [_meeting(geometry, d, tap[d]) for d in range(3)]
        space_x, space_y = ([m[i] for m in meets] for i in range(2))
        at_x, at_y = ((slice(None), slice(None), *np.ix_(*space)) for space in (space_x, space_y))
        for group in range(geometry.groups):
            c, f = slice(group * inner, (group + 1) * inner), slice(group * features, (group + 1) * features)
            w = t["w"][(slice(None), *tap)][..., f]
            x, y = t["x"][at_x][..., c], t["y"][at_y][..., f]
            if result == "y":
                t["y"][(*at_y, f)] += np.einsum("mnzyxc,mcf->mnzyxf", x, w)
            elif result == "x":
                t["x"][(*at_x, c)] += np.einsum("mnzyxf,mcf->mnzyxc", y, w)
            else:
                w += np.einsum("mnzyxc,mnzyxf->mcf", x, y)
    return t[result]


def _meeting(geometry, d, tap):
    """Input and output positions of one dimension that meet at a tap."""
    outputs = np.arange(geometry.outputs[d])
    inputs = outputs * geometry.stride[d] + tap * geometry.dilation[d] - geometry.pad[d]
    is_inside = (inputs >= 0) & (inputs < geometry.inputs[d])
    return inputs[is_inside], outputs[is_inside]


def oracle(kind, geometry, lhs, rhs, formats):
    """float32 of the exact sums, then the scale."""
    with np.errstate(over="ignore", under="ignore"):
        sums = sums_oracle(kind, geometry, lhs, rhs).astype(np.float32)
        return np.ldexp(sums, int(formats[1]) + int(formats[3]))


# Callers


def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def operand_shapes(kind, geometry):
    shapes = geometry.shapes()
    return [shapes[name] for name in KINDS[kind]]


def product_on_buffers(isa, kind, geometry, lhs, rhs, formats, out=None):
    """The kernels on plain memory: limb planes at any address, no XLA."""
    out = np.full(operand_shapes(kind, geometry)[2], 7, np.float32) if out is None else out
    call = xla_ops._library().jax_apt_product_on_buffers
    call.restype = ctypes.c_char_p
    numbers, formats = geometry.numbers(), np.array(formats, np.int32)
    error = call(
        isa.encode(),
        list(KINDS).index(kind),
        *map(address, (numbers, lhs, rhs, formats, out)),
    )
    assert error is None, error
    return out


def check(isa, kind, geometry, lhs, rhs, formats):
    """Compares a product of codes with the oracle."""
    planes = planes_of(lhs, formats[0]), planes_of(rhs, formats[2])
    out = product_on_buffers(isa, kind, geometry, *planes, formats)
    np.testing.assert_array_equal(out, oracle(kind, geometry, lhs, rhs, formats))


def draw_codes(rng, shape, bits):
    return helpers.codes(rng, shape, bits, rng.choice(["random", "extreme", "largest"]))


def draw_operands(rng, kind, geometry, lhs_bits, rhs_bits):
    lhs, rhs, _ = operand_shapes(kind, geometry)
    return draw_codes(rng, lhs, lhs_bits), draw_codes(rng, rhs, rhs_bits)


def convolution(
    inputs, channels, features, window, *, batch=1, matrices=1, groups=1, outputs=None, **changes
):
    """Geometry of a convolution; sizes of up to three dimensions, filled up in front."""

    def three(values, fill):
        values = (values,) if isinstance(values, int) else tuple(values)
        return (fill,) * (3 - len(values)) + values

    inputs, window = three(inputs, 1), three(window, 1)
    stride, dilation = three(changes.get("stride", 1), 1), three(changes.get("dilation", 1), 1)
    low, high = three(changes.get("pad", 0), 0), three(changes.get("pad_after", changes.get("pad", 0)), 0)
    dims = zip(inputs, low, high, window, dilation, stride, strict=True)
    outputs = [max(0, (n + a + b - (k - 1) * d - 1) // s + 1) for n, a, b, k, d, s in dims]
    return Geometry(
        matrices, batch, inputs, three(outputs, 1), window, stride, low, dilation, groups, channels, features
    )


def matrices(m, k, n, count=1):
    return convolution(m, k, n, 1, matrices=count)


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


# Products


MATRICES = (  # M, K, N: ones, primes, blocks and their neighbours
    (1, 1, 1), (1, 7, 1), (5, 1, 3), (13, 17, 31), (6, 63, 16), (12, 64, 32), (7, 129, 33), (97, 31, 17),
    (3, 257, 5), (2, 513, 3), (5, 1025, 34), (2, 5, 515), (32, 128, 64), (48, 192, 40), (0, 3, 4), (3, 0, 4),
    (3, 4, 0), (0, 0, 0),
)  # fmt: skip

CONVOLUTIONS = {
    "1d": convolution(9, 3, 4, 3, batch=2),
    "same": convolution((7, 6), 5, 6, (3, 3), pad=(1, 1), batch=2),
    "lines": convolution((9, 9), 64, 32, (3, 3), pad=(1, 1), batch=2),
    "stem": convolution((17, 18), 3, 8, (7, 7), pad=(3, 3), stride=(2, 2)),
    "stride": convolution((7, 8), 3, 5, (3, 2), stride=(2, 3), pad=(1, 0), pad_after=(1, 2), batch=3),
    "stride_beyond_window": convolution((9, 9), 4, 3, (1, 2), stride=(3, 3), batch=2),
    "dilation": convolution((11, 10), 2, 3, (3, 3), dilation=(2, 3), pad=(2, 3)),
    "stride_and_dilation": convolution((13, 12), 4, 6, (3, 2), stride=(2, 3), dilation=(3, 2), pad=(2, 1)),
    "crop": convolution((6, 6), 2, 3, (2, 2), pad=(-1, 0), pad_after=(1, -2), batch=2),
    "crop_and_stride": convolution((9, 8), 2, 3, (3, 2), pad=(-2, -3), stride=(2, 2)),
    "groups": convolution((5, 5), 6, 4, (3, 3), groups=2, pad=(1, 1), batch=2),
    "depthwise": convolution((6, 5), 35, 70, (3, 3), groups=35, pad=(1, 1), stride=(2, 1)),
    "depthwise_alone": convolution((6, 7), 70, 70, (3, 3), groups=70, pad=(1, 1), batch=2),
    "depthwise_stride": convolution(
        (9, 8), 64, 64, (3, 2), groups=64, pad=(2, -1), stride=(2, 3), dilation=(1, 2), batch=2
    ),
    "depthwise_3d": convolution((4, 3, 5), 3, 3, (2, 2, 3), groups=3, pad=(1, 0, 1), stride=(1, 2, 1)),
    "3d": convolution((4, 3, 5), 2, 3, (2, 1, 3), pad=(1, 0, 1), batch=2),
    "nothing_left": convolution((2, 2), 3, 4, (3, 3), batch=2),
    "unequal_padding": convolution((5, 7), 3, 2, (4, 4), pad=(0, 3), pad_after=(3, 0)),
}


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


# Under JAX


def int32(*values):
    return jnp.array(values, jnp.int32)


def jax_operands(rng, kind, geometry, bits):
    lhs, rhs = draw_operands(rng, kind, geometry, *bits)
    return (lhs, rhs), (jnp.asarray(planes_of(lhs, bits[0])), jnp.asarray(planes_of(rhs, bits[1])))


@each_isa
@each_kind
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (24, 16)))
def test_product_under_jit(isa, kind, bits):
    geometry = convolution((6, 7), 5, 9, (3, 2), stride=(2, 1), pad=(1, 1), batch=2)
    codes, planes = jax_operands(np.random.default_rng(8), kind, geometry, bits)
    formats = (bits[0], -9, bits[1], -8)
    out = jax.jit(lambda x, y, f: xla_ops.product(kind, geometry, x, y, f, isa=isa))(*planes, int32(*formats))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, oracle(kind, geometry, *codes, formats))


@each_kind
@pytest.mark.parametrize(
    "geometry",
    [
        matrices(401, 390, 403),  # one product, split among the threads
        matrices(130, 2100, 180, count=3),  # products that are split, one after the other
        matrices(33, 65, 31, count=800),  # small products, each on one thread
        matrices(1, 9, 1, count=1000),
        matrices(1, 40000, 50, count=2),
        convolution((30, 31), 33, 70, (3, 3), batch=3, pad=(1, 1)),
    ],
    ids=lambda g: "x".join(map(str, (g.matrices, g.inputs[2], g.in_channels, g.out_channels))),
)
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (8, 16)))
def test_large_products_and_batches_use_threads_and_agree(kind, geometry, bits):
    codes, planes = jax_operands(np.random.default_rng(9), kind, geometry, bits)
    formats = (bits[0], 0, bits[1], 0)
    out = xla_ops.product(kind, geometry, *planes, int32(*formats))
    np.testing.assert_array_equal(out, oracle(kind, geometry, *codes, formats))


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 0)])
def test_vmap(in_axes):
    rng, geometry, count = np.random.default_rng(11), matrices(4, 6, 5), 3
    formats = np.array([(8, -3, 16, 2), (5, 0, 9, -4), (7, 1, 15, 1)])
    if in_axes[2] is None:
        formats[:] = formats[0]
    codes = [
        [draw_codes(rng, shape, 5) for _ in range(count)] for shape in operand_shapes("forward", geometry)[:2]
    ]
    codes = [c if axis is not None else [c[0]] * count for c, axis in zip(codes, in_axes, strict=False)]
    args = []
    for side, axis in enumerate(in_axes[:2]):
        each = [planes_of(c, f[2 * side], 2) for c, f in zip(codes[side], formats, strict=True)]
        if in_axes[2] == 0 and axis is None:  # one tensor for all formats: one width
            formats[:, 2 * side] = 8
            each = [planes_of(codes[side][0], 8, 2)] * count
        args.append(jnp.asarray(each[0] if axis is None else np.moveaxis(np.stack(each), 0, axis)))
    args.append(jnp.asarray(formats[0] if in_axes[2] is None else formats, jnp.int32))
    out = jax.vmap(lambda x, y, f: xla_ops.product("forward", geometry, x, y, f), in_axes)(*args)
    for i in range(count):
        expected = oracle("forward", geometry, codes[0][i], codes[1][i], formats[i])
        np.testing.assert_array_equal(out[i], expected)


def test_vmapped_quantization():
    rng = np.random.default_rng(12)
    x = rng.normal(size=(3, 40, 7)).astype(np.float32)
    x[1, 2, 3] = np.nan
    bits, exponents = int32(8, 16, 24), int32(-5, -12, -21)
    planes, nonfinite = jax.vmap(lambda *a: xla_ops.quantize(*a, limbs=3))(x, bits, exponents)
    np.testing.assert_array_equal(nonfinite, [0, 1, 0])
    for i in range(3):
        n, e = int(bits[i]), int(exponents[i])
        expected = planes_of(quantize_oracle(np.nan_to_num(x[i]), n, e), n)
        expected = np.where(np.isnan(x[i]), 0, expected)
        np.testing.assert_array_equal(planes[i, : len(expected)], expected)


def test_widths_change_without_recompilation():
    rng, geometry = np.random.default_rng(12), matrices(9, 40, 8)
    traces = []

    @jax.jit
    def product(x, y, formats):
        traces.append(1)
        (x, _), (y, _) = (
            xla_ops.quantize(v, formats[i], formats[i + 1], limbs=3) for v, i in ((x, 0), (y, 2))
        )
        return xla_ops.product("forward", geometry, x, y, formats)

    lhs, rhs, _ = operand_shapes("forward", geometry)
    x, y = rng.normal(size=lhs).astype(np.float32), rng.normal(size=rhs).astype(np.float32)
    for bits in itertools.product((8, 14, 16, 24), repeat=2):
        formats = (bits[0], 3 - bits[0], bits[1], 3 - bits[1])
        codes = quantize_oracle(x, *formats[:2]), quantize_oracle(y, *formats[2:])
        out = product(x, y, int32(*formats))
        np.testing.assert_array_equal(out, oracle("forward", geometry, *codes, formats))
    assert len(traces) == 1


def test_scan_and_remat():
    geometry = matrices(6, 30, 7)
    codes, (x, y) = jax_operands(np.random.default_rng(13), "forward", geometry, (8, 8))
    formats = [(8, e, 8, -e - i) for i, e in enumerate((-3, 0, 5))]

    @jax.jit
    def products(formats):
        def step(carry, f):
            return carry, jax.checkpoint(lambda f: xla_ops.product("forward", geometry, x, y, f))(f)

        return lax.scan(step, 0, formats)[1]

    out = products(jnp.array(formats, jnp.int32))
    for i, f in enumerate(formats):
        np.testing.assert_array_equal(out[i], oracle("forward", geometry, *codes, f))


def test_threads_may_call_at_once():
    geometry = convolution((17, 19), 33, 70, (3, 3), batch=5, pad=(1, 1))
    codes, (x, y) = jax_operands(np.random.default_rng(14), "forward", geometry, (8, 16))
    expected = oracle("forward", geometry, *codes, (8, 0, 16, 0))
    product = jax.jit(
        lambda x, y, f: [
            xla_ops.product("forward", geometry, a, y, f) for a in (x, lax.optimization_barrier(x))
        ]
    )
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


G = matrices(2, 3, 5)
X, W = jnp.full((1, *G.shapes()["x"]), 128, jnp.uint8), jnp.full((1, *G.shapes()["w"]), 128, jnp.uint8)


@pytest.mark.parametrize(
    "kind, lhs, rhs, formats, error, message",
    [
        ("forward", X, X, (8, 0, 8, 0), ValueError, r"rhs has planes of shape .* not \(1, 1, 1, 1, 3, 5\)"),
        ("forward", W, W, (8, 0, 8, 0), ValueError, r"lhs has planes of shape"),
        ("backward", X, W, (8, 0, 8, 0), ValueError, "kind must be one of forward, .*; got 'backward'"),
        (
            "forward",
            X.astype(jnp.int8),
            W,
            (8, 0, 8, 0),
            TypeError,
            "lhs must be uint8 .* got int8",
        ),
        ("forward", X, W, (8, 0, 8), TypeError, r"formats must be int32 \(4,\), got int32 \(3,\)"),
        ("forward", X, W, (8.0, 0, 8, 0), TypeError, r"got float32 \(4,\)"),
    ],
)
def test_operands_that_do_not_fit(kind, lhs, rhs, formats, error, message):
    with pytest.raises(error, match=message):
        xla_ops.product(kind, G, lhs, rhs, jnp.array(formats))


def test_isa_that_cannot_run():
    with pytest.raises(ValueError, match=r"isa must be auto or one of .*scalar; got 'sse9'"):
        xla_ops.product("forward", G, X, W, int32(8, 0, 8, 0), isa="sse9")


@pytest.mark.parametrize(
    "limbs, dtype, error, message",
    [
        (4, jnp.float32, ValueError, "limbs must be 1, 2 or 3, got 4"),
        (1, jnp.float16, TypeError, "x must be float32, got float16"),
    ],
)
def test_quantization_that_cannot_be(limbs, dtype, error, message):
    with pytest.raises(error, match=message):
        xla_ops.quantize(jnp.zeros(3, dtype), 8, 0, limbs=limbs)


@pytest.mark.parametrize(
    "formats, depth, message",
    [
        ((1, 0, 8, 0), 3, "bits must be in 2..24, got 1"),
        ((8, 0, 25, 0), 3, "bits must be in 2..24, got 25"),
        ((8, 127, 8, 0), 3, "exponent must be in -126..126, got 127"),
        ((8, 0, 8, -127), 3, "exponent must be in -126..126, got -127"),
        ((16, 0, 8, 0), 3, "16 x 8 bits need more planes than the operands have"),
        ((24, 0, 24, 0), 65537, "at most 62, got 63"),
    ],
)
def test_formats_that_cannot_run(formats, depth, message):
    geometry = matrices(1, depth, 1)
    limbs = 3 if depth > 3 else 1
    x = jnp.full((limbs, *geometry.shapes()["x"]), 128, jnp.uint8)
    w = jnp.full((limbs, *geometry.shapes()["w"]), 128, jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(xla_ops.product("forward", geometry, x, w, int32(*formats)))


@pytest.mark.parametrize(
    "bits, exponent, message",
    [
        (9, 0, "bits must be in 2..8, got 9"),
        (1, 0, "got 1"),
        (8, 127, "exponent must be in -126..126, got 127"),
    ],
)
def test_quantization_formats_that_cannot_run(bits, exponent, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(xla_ops.quantize(jnp.zeros(3), bits, exponent, limbs=1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": 3}, "kind must be 0, 1 or 2"),
        ({"geometry": G.numbers()[1:]}, "the geometry has the wrong length"),
        ({"geometry": G._replace(groups=2).numbers()}, "groups must divide the channels"),
        ({"geometry": G._replace(stride=(1, 1, 0)).numbers()}, "strides and dilations must be at least 1"),
        ({"geometry": G._replace(batch=-1).numbers()}, "a size is negative"),
        ({"geometry": G._replace(out_channels=6).numbers()}, "the result has 10 elements, not 12"),
    ],
)
def test_the_custom_call_checks_what_python_would(change, message):
    attributes = {"kind": 0, "geometry": G.numbers(), "isa": "auto"} | change
    call = jax.ffi.ffi_call("jax_apt_product", jax.ShapeDtypeStruct((1, 1, 1, 1, 2, 5), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(X, W, int32(8, 0, 8, 0), **attributes))
