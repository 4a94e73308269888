"""Products of bytes whose rhs has few large codes: AVX2 adds two of their products in 16 bits, and later what
saturated."""

import numpy as np
import pytest
from kernel_oracles import CONVOLUTIONS, check, each_isa, each_kind, matrices, operand_shapes

from jax_apt import xla_ops

pytestmark = pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")

PRODUCTS = {
    **CONVOLUTIONS,
    "matrix": matrices(37, 67, 21),
    "matrices": matrices(13, 64, 32, count=3),
    "deep": matrices(301, 309, 317),
    "blocks": matrices(4300, 20, 33),  # of depth, for the filter gradient
}
FORMATS = (8, -3, 8, 2)


def largest(shape):
    """The largest bytes of lhs, but for a negative one: where there is none other kernels do better."""
    codes = np.full(shape, 127)
    codes.reshape(-1)[-1] = -127
    return codes


def draw_small(rng, shape):
    return rng.integers(-60, 61, shape)


def with_squares(largest_code):
    """Few squares of a large code: these are neighbours whichever dimension is summed."""

    def draw(rng, shape):
        codes = draw_small(rng, shape)
        rows = codes.reshape(-1, shape[-1])
        for _ in range(max(1, rows.size // 400)):
            i, j = (rng.integers(0, max(1, n - 1)) for n in rows.shape)
            rows[i : i + 2, j : j + 2] = largest_code
        return codes

    return draw


def with_line(axis):
    """One row or column of large codes: more than a panel lists where it is summed."""

    def draw(rng, shape):
        codes = draw_small(rng, shape)
        np.moveaxis(codes, axis, 0)[:1] = 127
        return codes

    return draw


RHS = {
    "few": with_squares(127),
    "few_negative": with_squares(-127),
    "a_column": with_line(-1),
    "a_row": with_line(-2),
}


@each_isa
@each_kind
@pytest.mark.parametrize("rhs", RHS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_it_equals_int64(isa, kind, name, rhs):
    rng, geometry = np.random.default_rng(len(name)), PRODUCTS[name]
    lhs_shape, rhs_shape, _ = operand_shapes(kind, geometry)
    lhs = rng.choice([-127, 127], lhs_shape)
    check(isa, kind, geometry, lhs, RHS[rhs](rng, rhs_shape), FORMATS)


@each_isa
@pytest.mark.parametrize("depth", (64, 640, 4096))
@pytest.mark.parametrize("pairs", (1, 2, 3, 19, 20, 21, 62, 63, 64, 65))
def test_as_many_as_a_panel_lists(isa, depth, pairs):
    rng, geometry = np.random.default_rng(pairs), matrices(7, depth, 48)
    lhs, rhs, _ = operand_shapes("forward", geometry)
    codes = rng.integers(-64, 65, rhs)
    rows = codes.reshape(depth // 2, 2, 48)
    rows[rng.choice(depth // 2, min(pairs, depth // 2), replace=False), :, rng.integers(0, 16)] = 100
    check(isa, "forward", geometry, largest(lhs), codes, FORMATS)


@each_isa
@pytest.mark.parametrize("sum_of_pair", (127, 128, 129, 130))
def test_the_largest_sum_that_cannot_saturate(isa, sum_of_pair):
    geometry = matrices(6, 128, 32)
    lhs, rhs, _ = operand_shapes("forward", geometry)
    for sign in (1, -1):
        codes = np.zeros(rhs, np.int64)
        for row in (0, 126):
            codes[..., row, 5], codes[..., row + 1, 5] = sign * 64, sign * (sum_of_pair - 64)
        check(isa, "forward", geometry, largest(lhs), codes, FORMATS)
