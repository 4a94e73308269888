"""Products of quantized tensors: all three of a layer, every backend, bit-equal to an int64 oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import codes as draw
from helpers import container, conv_gradients_oracle, conv_oracle, dot_oracle, float32_oracle, planes_of
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jax_apt import Fixed, xla_ops
from jax_apt.gemm_form import as_gemm
from jax_apt.products import Operand, quantize_operand, run, trace_programs

BACKENDS = ["emulate", "xla"] + (["native"] if xla_ops.is_available() else [])
WIDTHS = [(8, 8), (16, 8), (8, 16), (16, 16), (24, 8), (24, 24), (2, 13)]

CONVOLUTIONS = {  # lhs shape, rhs shape, what differs from a plain NCHW convolution
    "transposed": ((2, 3, 4, 5), (4, 3, 3, 2), {"lhs_dilation": (2, 3), "padding": ((2, 1), (1, 3))}),
    "transposed_groups": (
        (2, 6, 4, 3), (4, 3, 2, 3),
        {
            "lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "feature_group_count": 2,
            "padding": ((0, 1), (3, 2)),
        },
    ),
    "1d": ((2, 3, 9), (4, 3, 3), {}),
    "3d": ((1, 2, 4, 3, 4), (3, 2, 2, 1, 3), {"padding": ((1, 0), (0, 0), (1, 1))}),
    "stride": ((2, 3, 7, 8), (5, 3, 3, 2), {"window_strides": (2, 3), "padding": ((1, 1), (0, 2))}),
    "dilation": (
        (1, 2, 9, 8), (3, 2, 3, 3),
        {"rhs_dilation": (2, 3), "lhs_dilation": (1, 2), "padding": ((2, 1), (0, 3))},
    ),
    "crop": ((2, 2, 6, 6), (3, 2, 2, 2), {"padding": ((-1, 0), (1, -2))}),
    "groups": ((2, 6, 5, 5), (4, 3, 3, 3), {"feature_group_count": 2, "padding": ((1, 1), (1, 1))}),
    "depthwise": ((2, 3, 6, 5), (6, 1, 3, 3), {"feature_group_count": 3, "window_strides": (2, 1)}),
    "batch_groups": ((4, 2, 5, 5), (6, 2, 3, 3), {"batch_group_count": 2}),
    "pointwise": ((3, 4, 2, 2), (5, 4, 1, 1), {}),
    "nhwc": ((2, 5, 6, 3), (3, 2, 3, 4), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "odd_layout": ((5, 3, 2, 6), (2, 4, 3, 3), {"dimension_numbers": ("HCNW", "WOHI", "WNCH")}),
}  # fmt: skip

DOTS = {  # lhs shape, rhs shape, (contracting), (batch)
    "matmul": ((3, 5), (5, 4), ((1,), (0,)), ((), ())),
    "vectors": ((7,), (7,), ((0,), (0,)), ((), ())),
    "outer": ((3,), (4,), ((), ()), ((), ())),
    "transposed": ((5, 3), (4, 5), ((0,), (1,)), ((), ())),
    "batched": ((2, 3, 4), (2, 4, 5), ((2,), (1,)), ((0,), (0,))),
    "everywhere": ((3, 2, 4, 2, 5), (5, 2, 3, 4), ((4, 2), (0, 3)), ((1,), (1,))),
}


def conv_params(lhs, rhs, changes):
    spatial = len(lhs) - 2
    params = {
        "window_strides": (1,) * spatial,
        "padding": ((0, 0),) * spatial,
        "lhs_dilation": (1,) * spatial,
        "rhs_dilation": (1,) * spatial,
        "feature_group_count": 1,
        "batch_group_count": 1,
        "dimension_numbers": None,
    } | changes
    return params | {"dimension_numbers": lax.conv_dimension_numbers(lhs, rhs, params["dimension_numbers"])}


def equation(function, lhs, rhs):
    """The one product of a traced function."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs)]
    return next(e for e in jax.make_jaxpr(function)(*arguments).jaxpr.eqns if len(e.invars) == 2)


def conv_case(name):
    """(equation, lhs shape, rhs shape, oracles of the three products)."""
    lhs, rhs, changes = CONVOLUTIONS[name]
    params = conv_params(lhs, rhs, changes)
    eqn = equation(lambda x, w: lax.conv_general_dilated(x, w, **params), lhs, rhs)
    return eqn, lhs, rhs, params


def operand(codes, bits, exponent, backend, widths=None):
    """Codes as a backend keeps them: integers, or limb planes."""
    widest = (widths or (bits,))[-1]
    if backend == "native":
        held = jnp.asarray(planes_of(codes, bits, xla_ops.limb_count(widest)))
    else:
        held = jnp.asarray(codes, container(widest))
    number = Fixed(held, jnp.int32(bits), jnp.int32(exponent))
    return Operand(number, widths or (bits,), jnp.float32(0))


def expected(sums, exponent):
    return float32_oracle(sums) * np.float32(2.0) ** exponent


def check(program, a, b, sums, backend, exponent):
    product = jax.jit(lambda x, y: run(program, a._replace(number=x), b._replace(number=y), backend))
    np.testing.assert_array_equal(product(a.number, b.number), expected(sums, exponent))


def all_products(programs, backend):
    """The three products as a layer runs them: 8-bit operands, a gradient whose width is a run-time value."""

    @jax.jit
    def products(x, w, dy):
        zero = jnp.float32(0)
        x, w, dy = Operand(x, (8,), zero), Operand(w, (8,), zero), Operand(dy, (8, 16, 24), zero)
        return (
            run(programs.forward, x, w, backend),
            run(programs.lhs_gradient, w, dy, backend),
            run(programs.rhs_gradient, x, dy, backend),
        )

    return products


def numbers(backend, lhs, rhs, dy, dy_bits, exponents):
    """Operands of `all_products`."""
    made = (
        operand(lhs, 8, exponents[0], backend),
        operand(rhs, 8, exponents[1], backend),
        operand(dy, dy_bits, exponents[2], backend, (8, 16, 24)),
    )
    return [x.number for x in made]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, backend):
    eqn, lhs_shape, rhs_shape, params = conv_case(name)
    products = all_products(trace_programs(eqn, lhs_shape, rhs_shape), backend)
    for dy_bits, kind in ((8, "extreme"), (16, "random"), (24, "extreme")):
        rng = np.random.default_rng(dy_bits)
        lhs, rhs = draw(rng, lhs_shape, 8, kind), draw(rng, rhs_shape, 8, kind)
        dy = draw(rng, eqn.outvars[0].aval.shape, dy_bits, kind)
        got = products(*numbers(backend, lhs, rhs, dy, dy_bits, (-3, 5, -9)))
        d_lhs, d_rhs = conv_gradients_oracle(lhs, rhs, dy, params)
        np.testing.assert_array_equal(got[0], expected(conv_oracle(lhs, rhs, params), 2))
        np.testing.assert_array_equal(got[1], expected(d_lhs, -4))
        np.testing.assert_array_equal(got[2], expected(d_rhs, -12))
    assert products._cache_size() == 1


def dot_gradients_oracle(lhs, rhs, dy, dims):
    """By probing: the sums are linear, so each derivative is a product with a unit tensor."""

    def gradient(shape, product):
        units = np.eye(int(np.prod(shape)), dtype=np.int64).reshape(-1, *shape)
        return np.array([np.sum(product(unit) * dy) for unit in units]).reshape(shape)

    return (
        gradient(lhs.shape, lambda unit: dot_oracle(unit, rhs, dims)),
        gradient(rhs.shape, lambda unit: dot_oracle(lhs, unit, dims)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DOTS)
def test_dots(name, backend):
    lhs_shape, rhs_shape, contract, batch = DOTS[name]
    dims = (contract, batch)
    eqn = equation(lambda x, w: lax.dot_general(x, w, dims), lhs_shape, rhs_shape)
    products = all_products(trace_programs(eqn, lhs_shape, rhs_shape), backend)
    rng = np.random.default_rng(0)
    lhs, rhs = draw(rng, lhs_shape, 8), draw(rng, rhs_shape, 8)
    dy = draw(rng, eqn.outvars[0].aval.shape, 16)
    got = products(*numbers(backend, lhs, rhs, dy, 16, (1, 2, 3)))
    d_lhs, d_rhs = dot_gradients_oracle(lhs, rhs, dy, dims)
    np.testing.assert_array_equal(got[0], expected(dot_oracle(lhs, rhs, dims), 3))
    np.testing.assert_array_equal(got[1], expected(d_lhs, 5))
    np.testing.assert_array_equal(got[2], expected(d_rhs, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("a_bits", "b_bits"), WIDTHS)
def test_widths_and_depths(a_bits, b_bits, backend):
    for depth, kind in ((0, "random"), (1, "extreme"), (515, "largest"), (2000, "alternating")):
        program, a, b, sums = matmul_case(backend, depth, a_bits, b_bits, kind)
        check(program, a, b, sums, backend, 0)


def matmul_case(backend, depth, a_bits, b_bits, kind):
    """(program, both operands, exact sums) of a (3, depth) x (depth, 2) product."""
    shapes = (3, depth), (depth, 2)
    program = trace_programs(equation(jnp.matmul, *shapes), *shapes).forward
    rng = np.random.default_rng(depth)
    a, b = (draw(rng, shape, n, kind) for shape, n in zip(shapes, (a_bits, b_bits), strict=True))
    operands = operand(a, a_bits, 0, backend), operand(b, b_bits, 0, backend)
    return program, *operands, a.astype(object) @ b.astype(object)


@pytest.mark.parametrize("backend", ["xla", *BACKENDS[2:]])
@pytest.mark.parametrize("bits", [(8, 8), (24, 8), (24, 22)])
def test_sums_deeper_than_int32(bits, backend):
    program, a, b, sums = matmul_case(backend, 140_000, *bits, "largest")
    check(program, a, b, sums, backend, 0)


def test_emulate_refuses_a_depth_that_float32_cannot_sum():
    shapes = (1, 2**24 + 1), (2**24 + 1, 1)
    program = trace_programs(equation(jnp.matmul, *shapes), *shapes).forward
    with pytest.raises(ValueError, match=r"depth 16777217 is too deep for the emulate backend"):
        jax.eval_shape(
            lambda x, y: run(program, operand_of(x), operand_of(y), "emulate"),
            *(jax.ShapeDtypeStruct(s, jnp.int8) for s in shapes),
        )


def operand_of(codes):
    return Operand(Fixed(codes, jnp.int32(8), jnp.int32(0)), (8,), jnp.float32(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_are_run_time_values(backend):
    """One compilation serves every pair of widths."""
    shapes = (3, 40), (40, 2)
    program = trace_programs(equation(jnp.matmul, *shapes), *shapes).forward
    candidates = (8, 16, 24)

    @jax.jit
    def product(a, b):
        zero = jnp.float32(0)
        return run(program, Operand(a, candidates, zero), Operand(b, candidates, zero), backend)

    rng = np.random.default_rng(0)
    for a_bits, b_bits in itertools.product(candidates, candidates):
        lhs, rhs = draw(rng, shapes[0], a_bits, "extreme"), draw(rng, shapes[1], b_bits, "extreme")
        a, b = operand(lhs, a_bits, -4, backend, candidates), operand(rhs, b_bits, -4, backend, candidates)
        np.testing.assert_array_equal(
            product(a.number, b.number), expected(lhs.astype(object) @ rhs.astype(object), -8)
        )
    assert product._cache_size() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_exponents_lose_nothing(backend):
    """2**-126 * 2**126 is 1, though each power alone nearly leaves float32's range."""
    program, a, b, sums = matmul_case(backend, 515, 24, 8, "random")
    a = a._replace(number=a.number._replace(exponent=jnp.int32(-126)))
    b = b._replace(number=b.number._replace(exponent=jnp.int32(126)))
    check(program, a, b, sums, backend, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_results_are_nan_where_a_value_was_not_finite(bits, backend):
    shapes = (3, 5), (5, 2)
    program = trace_programs(equation(jnp.matmul, *shapes), *shapes).forward
    rng = np.random.default_rng(bits)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    exponent = jnp.int32(3 - bits)

    def product(x):
        a, b = (quantize_operand(jnp.asarray(v), jnp.int32(bits), exponent, (bits,), backend) for v in (x, y))
        return run(program, a, b, backend), a.nonfinite

    finite, _ = product(x)
    x[1, 2], x[1, 3] = np.inf, np.nan
    got, count = product(x)
    assert count == 2 and np.isnan(got[1]).all()
    kept = np.array([0, 2])
    np.testing.assert_allclose(got[kept], finite[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not xla_ops.is_available(), reason="the custom calls are not built")
@pytest.mark.parametrize("bits", [8, 24])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_marks_spread_as_values_do(name, bits):
    """Of each operand of each product one value is marked: exactly what it contributes to is NaN."""
    eqn, lhs_shape, rhs_shape, _ = conv_case(name)
    rng = np.random.default_rng(bits)
    for program in trace_programs(eqn, lhs_shape, rhs_shape):
        values = [rng.normal(size=v.aval.shape).astype(np.float32) for v in program.jaxpr.jaxpr.invars]
        for side in (0, 1):
            marked = [value.copy() for value in values]
            place = tuple(rng.integers(0, n) for n in marked[side].shape)
            marked[side][place] = np.nan
            ones = [np.ones_like(value) for value in values]
            ones[side][:] = 0
            ones[side][place] = 1
            reached = jaxpr_as_fun(program.jaxpr)(*ones)[0] > 0
            a, b = (
                quantize_operand(jnp.asarray(v), jnp.int32(bits), jnp.int32(0), (bits,), "native")
                for v in marked
            )
            is_nan = np.isnan(run(program, a, b, "native"))
            if name == "batch_groups":  # run as one matrix with zeros between the groups
                is_nan = is_nan & reached
            np.testing.assert_array_equal(is_nan, reached)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gemm_form_moves_values_and_changes_none(name):
    eqn, lhs_shape, rhs_shape, params = conv_case(name)
    rng = np.random.default_rng(1)
    lhs, rhs = draw(rng, lhs_shape, 8), draw(rng, rhs_shape, 8)
    form = as_gemm(eqn, jnp.asarray(lhs, jnp.int32), jnp.asarray(rhs, jnp.int32))
    assert form.lhs.ndim == form.rhs.ndim == 3 and form.depth == form.rhs.shape[1]
    np.testing.assert_array_equal(form.finish(form.lhs @ form.rhs), conv_oracle(lhs, rhs, params))
