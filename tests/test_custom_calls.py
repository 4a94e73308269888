"""The custom calls under JAX: jit, vmap, scan, threads, and what is refused."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import planes_of
from jax import lax
from kernel_oracles import (
    convolution,
    draw_codes,
    draw_operands,
    each_isa,
    each_kind,
    matrices,
    operand_shapes,
    oracle,
    quantize_oracle,
)

from jax_apt import xla_ops

pytestmark = pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")


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


# Formats that are chosen

WIDTHS = (8, 16, 24, 24)


def adapt_oracle(x, bits, exponent, choice):
    """(bits, exponent, sum|x|, error sums, exponents) in float64."""
    x = np.float64(x)
    largest = np.abs(x).max()
    if largest == 0 or not np.isfinite(largest):
        return bits, exponent, 0.0, np.zeros(len(choice.widths)), np.zeros(len(choice.widths), int)
    limits = [2 ** (n - 1) - 1 for n in choice.widths]
    exponents = np.array([int(np.ceil(np.log2(largest / limit))) for limit in limits])
    values = [np.clip(np.rint(x / 2.0**e), -m, m) * 2.0**e for e, m in zip(exponents, limits, strict=True)]
    errors = {
        "mean_magnitude": [np.sum(np.abs(x)) - np.sum(np.abs(v)) for v in values],
        "elementwise": [np.sum(np.abs(x - v)) for v in values],
        "resolution": [x.size * 2.0**e / 4 for e in exponents],
    }[choice.measure]
    start = 0 if choice.is_restart else sum(bits > n for n in choice.widths)
    good = [abs(e) / np.sum(np.abs(x)) <= choice.limit for e in errors]
    chosen = next((i for i in range(start, len(good)) if good[i]), len(good) - 1)
    return choice.widths[chosen], exponents[chosen], np.sum(np.abs(x)), np.array(errors), exponents


@pytest.mark.parametrize("isa", xla_ops.available_isas() if xla_ops.is_available() else ())
@pytest.mark.parametrize("measure", ["mean_magnitude", "elementwise", "resolution"])
@pytest.mark.parametrize("is_restart", [False, True])
def test_formats_are_chosen_as_the_method_says(isa, measure, is_restart):
    rng = np.random.default_rng(3)
    choice = xla_ops.Choice(WIDTHS, measure, is_restart, 0.02)
    adapt = jax.jit(lambda x, formats: xla_ops.adapt(x, formats, 1, choice, isa=isa))
    chosen = set()
    for draw, bits, size in itertools.product(
        (rng.standard_normal, lambda n: rng.standard_t(1.2, n), np.zeros, lambda n: np.full(n, 1e-45)),
        (8, 16),
        (5, 70_000),
    ):
        x = np.float32(draw(size))
        found = adapt(x, int32([0, 0, 0, 7], [bits, -3, 1, 7]))
        expected = adapt_oracle(x, bits, -3, choice)
        if size > 5 and x.max() > 1e-30:  # sums of float32's smallest numbers have no oracle here
            np.testing.assert_allclose(found.abs_sum, expected[2], rtol=1e-6)
            np.testing.assert_allclose(found.error_sums, expected[3], rtol=1e-3, atol=2e-7 * expected[2])
            assert (int(found.bits), int(found.exponent)) == expected[:2]
            np.testing.assert_array_equal(found.exponents, expected[4])
            chosen.add(expected[0])
        planes, _ = xla_ops.quantize(x, found.bits, found.exponent, limbs=3)
        used = xla_ops.limb_count(int(found.bits))
        np.testing.assert_array_equal(found.planes[:used], planes[:used])
        assert found.measured == 1 and found.nonfinite == 0
    assert len(chosen) > 1


def test_a_format_is_kept_where_nothing_is_due_or_nothing_has_a_range():
    choice = xla_ops.Choice((8, 16, 24), "mean_magnitude", False, 0.02)
    x = np.float32([1.0, 2.0, -3.0])
    bad = np.float32([1.0, np.nan, -np.inf])
    for value, due, measured, nonfinite in ((x, 0, 0, 0), (0 * x, 1, 1, 0), (bad, 1, 1, 2), (x[:0], 1, 1, 0)):
        found = xla_ops.adapt(jnp.asarray(value), int32([16, -5, due, 0]), 0, choice)
        assert (found.bits, found.exponent) == (16, -5)
        assert (found.measured, found.nonfinite, found.abs_sum) == (measured, nonfinite, 0)
        assert not found.error_sums.any() and not found.exponents.any()


def test_vmapped_choices():
    choice = xla_ops.Choice((8, 16, 24), "mean_magnitude", False, 0.02)
    x = jnp.float32([[1.0, 2.0], [np.nan, 2.0], [100.0, 3.0]])
    formats = int32([[8, 0, 1, 0]], [[8, 0, 1, 0]], [[16, -2, 0, 0]])
    each = [xla_ops.adapt(v, f, 0, choice) for v, f in zip(x, formats, strict=True)]
    together = jax.vmap(lambda v, f: xla_ops.adapt(v, f, 0, choice))(x, formats)
    for i, one in enumerate(each):
        used = xla_ops.limb_count(int(one.bits))  # other planes are not written
        np.testing.assert_array_equal(together.planes[i, :used], one.planes[:used])
        for got, expected in zip(together[1:], one[1:], strict=True):
            np.testing.assert_array_equal(got[i], expected)


# Weight gradients of float32 gradients


def weight_gradient_in_two_calls(geometry, x, dy, format, seed, isa):
    """`adapt`, then `product`."""
    choice = xla_ops.Choice((8, 16, 24), "mean_magnitude", False, 0.02)
    found = xla_ops.adapt(dy, format[None], 0, choice, seed=seed, isa=isa)
    formats = (*int32(8, -3), found.bits, found.exponent)
    bad = jnp.float32(0), found.nonfinite
    return xla_ops.product("filter_gradient", geometry, x, found.planes, formats, nonfinite=bad, isa=isa)


@each_isa
@pytest.mark.parametrize("seed", [None, 2**32 - 5])
@pytest.mark.parametrize("bits", [5, 8, 16, 24])
def test_a_weight_gradient_quantizes_its_gradient(isa, bits, seed):
    rng = np.random.default_rng(bits)
    for geometry in (matrices(1, 1, 1), matrices(300, 33, 70), matrices(70, 5, 17, count=3)):
        shapes = geometry.shapes()
        x = jnp.asarray(planes_of(draw_codes(rng, shapes["x"], 8), 8))
        dy = jnp.asarray(rng.standard_normal(shapes["y"]), jnp.float32)
        format = int32(bits, 4 - bits, 0, 7)
        expected = weight_gradient_in_two_calls(geometry, x, dy, format, seed, isa)
        together = jax.jit(
            lambda x, dy, f, g=geometry: xla_ops.weight_gradient(
                g, x, tuple(int32(8, -3)), dy, f, seed=seed, isa=isa
            )
        )
        np.testing.assert_array_equal(together(x, dy, format), expected)


@pytest.mark.parametrize("seed", [None, 3])
def test_vmapped_weight_gradients(seed):
    rng, geometry = np.random.default_rng(1), matrices(40, 6, 9, count=2)
    shapes = geometry.shapes()
    x = jnp.stack([jnp.asarray(planes_of(draw_codes(rng, shapes["x"], 8), 8)) for _ in range(3)])
    dy = jnp.asarray(rng.standard_normal((3, *shapes["y"])), jnp.float32)
    formats = int32([8, -6, 0, 1], [16, -9, 0, 1], [24, -20, 0, 2])

    def gradient(x, dy, format):
        return xla_ops.weight_gradient(geometry, x, tuple(int32(8, -3)), dy, format, seed=seed)

    each = [
        weight_gradient_in_two_calls(geometry, *args, seed, "auto")
        for args in zip(x, dy, formats, strict=True)
    ]
    np.testing.assert_array_equal(jax.vmap(gradient)(x, dy, formats), jnp.stack(each))


def test_weight_gradients_of_values_that_are_not_finite():
    rng, geometry = np.random.default_rng(1), matrices(40, 6, 9, count=2)
    shapes = geometry.shapes()
    x = jnp.asarray(planes_of(draw_codes(rng, shapes["x"], 8), 8))
    dy = rng.standard_normal(shapes["y"]).astype(np.float32)
    dy[1, 0, 0, 0, 17, 4], dy[1, 0, 0, 0, 39, 8] = np.nan, -np.inf
    out = xla_ops.weight_gradient(
        geometry, x, tuple(int32(8, -3)), jnp.asarray(dy), int32(16, -9, 0, 1), seed=3
    )
    expected = np.zeros(shapes["w"], bool)
    expected[1, ..., [4, 8]] = True
    np.testing.assert_array_equal(np.isnan(out), expected)
    marked = x.at[:, 0, 0, 0, 0, 3, 2].set(0)
    out = xla_ops.weight_gradient(
        geometry,
        marked,
        tuple(int32(8, -3)),
        jnp.ones(shapes["y"]),
        int32(8, -3, 0, 1),
        nonfinite=jnp.float32(1),
    )
    expected = np.zeros(shapes["w"], bool)
    expected[0, 0, 0, 0, 2] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


def test_wrong_weight_gradients_are_refused():
    geometry = matrices(4, 6, 9)
    x, dy = jnp.zeros((1, *geometry.shapes()["x"]), jnp.uint8), jnp.zeros(geometry.shapes()["y"])
    format = int32(8, 0, 0, 0)

    def run(geometry=geometry, x=x, dy=dy, format=format, seed=None):
        return xla_ops.weight_gradient(geometry, x, tuple(int32(8, 0)), dy, format, seed=seed)

    with pytest.raises(ValueError, match="only of a product of matrices"):
        run(convolution((4, 4), 6, 9, (3, 3), pad=(1, 1)))
    with pytest.raises(ValueError, match=r"must have shapes .* got .*\(1, 1, 1, 1, 4, 8\)"):
        run(dy=dy[..., :8])
    with pytest.raises(TypeError, match="uint8, float32 and int32, got uint8, float16"):
        run(dy=dy.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"seed must be in .* got 4294967296"):
        run(seed=2**32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"bits must be in 2..24, got 25"):
        run(format=int32(25, 0, 0, 0))


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
        ("forward", X, W, (8, 0, 8), TypeError, r"formats must be four int32 scalars, got \["),
        ("forward", X, W, (8.0, 0, 8, 0), TypeError, r"formats must be four int32 scalars, got \["),
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
        number = jnp.int32(8), jnp.int32(0), jnp.float32(0)
        jax.block_until_ready(call(X, *number, W, *number, **attributes))
