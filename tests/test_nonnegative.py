"""Products whose lhs has no negative code, as a ReLU's output: AVX2 has kernels of its own for them."""

import numpy as np
import pytest
from helpers import planes_of
from kernel_oracles import (
    CONVOLUTIONS,
    Guarded,
    check,
    draw_codes,
    each_isa,
    each_kind,
    matrices,
    operand_shapes,
    oracle,
    product_on_buffers,
)

from jax_apt import xla_ops

pytestmark = pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")

PRODUCTS = {**CONVOLUTIONS, "matrix": matrices(37, 67, 21), "matrices": matrices(13, 64, 32, count=3)}


def draw_nonnegative(rng, kind, geometry, bits):
    lhs, rhs, _ = operand_shapes(kind, geometry)
    return np.abs(draw_codes(rng, lhs, 8)), draw_codes(rng, rhs, bits)


@each_isa
@each_kind
@pytest.mark.parametrize("name", PRODUCTS)
def test_it_equals_int64(isa, kind, name):
    rng, geometry = np.random.default_rng(len(name)), PRODUCTS[name]
    for bits in (8, 16, 24):
        check(isa, kind, geometry, *draw_nonnegative(rng, kind, geometry, bits), (8, -3, bits, 2))


@each_isa
@each_kind
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_largest_codes_saturate_nowhere(isa, kind, name):
    geometry = PRODUCTS[name]
    lhs, rhs, _ = operand_shapes(kind, geometry)
    for sign, bits in ((1, 8), (-1, 8), (1, 16), (-1, 16)):
        codes = np.full(rhs, sign * (2 ** (bits - 1) - 1))
        check(isa, kind, geometry, np.full(lhs, 127), codes, (8, 0, bits, 0))


@each_isa
@each_kind
@pytest.mark.parametrize("negative", ("first", "last"))
def test_one_negative_code_is_seen(isa, kind, negative):
    geometry = matrices(40, 130, 18)
    lhs, rhs = draw_nonnegative(np.random.default_rng(1), kind, geometry, 8)
    lhs.reshape(-1)[0 if negative == "first" else -1] = -127
    check(isa, kind, geometry, lhs, rhs, (8, 0, 8, 0))


@each_isa
@each_kind
@pytest.mark.parametrize("at_end", (True, False))
def test_it_stays_within_its_buffers(isa, kind, at_end):
    for geometry in PRODUCTS.values():
        lhs, rhs = draw_nonnegative(np.random.default_rng(2), kind, geometry, 16)
        formats = (8, 0, 16, 0)
        expected = oracle(kind, geometry, lhs, rhs, formats)
        x, y = (Guarded.like(planes_of(v, n), at_end) for v, n in ((lhs, 8), (rhs, 16)))
        out = Guarded.like(np.zeros(expected.shape, np.float32), at_end)
        product_on_buffers(isa, kind, geometry, x, y, formats, out)
        np.testing.assert_array_equal(out, expected)
