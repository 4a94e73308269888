"""3x3 convolutions that some units compute by Winograd's algorithm: bit for bit the direct sums."""

import itertools
from functools import partial

import numpy as np
import pytest
from helpers import planes_of
from kernel_oracles import (
    Guarded,
    check,
    convolution,
    draw_codes,
    each_isa,
    each_kind,
    operand_shapes,
    oracle,
    product_on_buffers,
)

from jax_apt import xla_ops

pytestmark = pytest.mark.skipif(not xla_ops.is_available(), reason="the kernels are not compiled here")

# Of 48 tiles and more, from where on a filter gradient is computed so, but for those whose channels count.
LAYERS = {
    "single tiles": convolution((4, 4), 16, 16, (3, 3), batch=60, pad=1),
    "odd map": convolution((13, 7), 32, 48, (3, 3), batch=7, pad=1),
    "channels that fill no vector": convolution((9, 9), 17, 19, (3, 3), batch=9, pad=1),
    "no padding": convolution((10, 6), 24, 16, (3, 3), batch=24),
    "much padding, one side": convolution(
        (6, 7), 16, 20, (3, 3), batch=12, pad=(0, 3, 2), pad_after=(0, 0, 2)
    ),
    "cropped": convolution((9, 9), 16, 16, (3, 3), batch=8, pad=(0, -1, 1), pad_after=(0, 1, -1)),
    "another dimension in front": convolution((2, 6, 6), 16, 16, (1, 3, 3), batch=12, pad=(0, 1, 1)),
    "several blocks of channels": convolution((8, 8), 300, 226, (3, 3), batch=2, pad=1),
    "many tiles": convolution((31, 18), 16, 16, (3, 3), batch=7, pad=1),  # 264: three sums of 128
    "tiles in ranges": convolution((66, 62), 16, 16, (3, 3), batch=3, pad=1),  # 799: more than 1 MB
    "images on a canvas": convolution((13, 13), 16, 20, (3, 3), batch=5, pad=1),
    "small images on a canvas": convolution((5, 5), 16, 130, (3, 3), batch=24, pad=1),
    "a canvas, another dimension in front": convolution((3, 5, 6), 18, 16, (1, 3, 3), batch=7, pad=(0, 1, 1)),
    "a canvas in several groups": convolution((21, 21), 16, 66, (3, 3), batch=2, pad=1),
}


# The largest of 8 and of 16 bits, and one whose limbs are both the largest: 128 * 256 - 128.
EDGES = {8: (127,), 16: (32767, 32640)}


def edge_codes(shape, largest, signs):
    """Large codes, with the signs that the transforms add up: alternating along rows and columns."""
    grid = np.indices(shape).sum(0) if signs == "alternating" else 0
    return np.broadcast_to(np.where(grid % 2 == 0, largest, -largest), shape)


@each_isa
@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_it_equals_int64(isa, kind, name):
    rng, geometry = np.random.default_rng(len(name)), LAYERS[name]
    lhs, rhs, _ = operand_shapes(kind, geometry)
    for x, y in ((8, 8), (5, 8), (16, 8), (8, 16), (9, 7), (6, 14)):  # one of them in two limbs at most
        check(isa, kind, geometry, draw_codes(rng, lhs, x), draw_codes(rng, rhs, y), (x, -3, y, 2))


@each_isa
@each_kind
@pytest.mark.parametrize("name", ("several blocks of channels", "many tiles", "tiles in ranges"))
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (8, 16)))
def test_the_largest_codes_overflow_nothing(isa, kind, name, bits):
    geometry = LAYERS[name]
    lhs, rhs, _ = operand_shapes(kind, geometry)
    for signs, x, y in itertools.product(("equal", "alternating"), EDGES[bits[0]], EDGES[bits[1]]):
        check(
            isa,
            kind,
            geometry,
            edge_codes(lhs, x, signs),
            edge_codes(rhs, y, signs),
            (bits[0], 0, bits[1], 0),
        )


@each_isa
@each_kind
@pytest.mark.parametrize("at_end", (True, False))
@pytest.mark.parametrize("bits", ((8, 8), (16, 8), (8, 16)))
def test_it_stays_within_its_buffers(isa, kind, at_end, bits):
    rng = np.random.default_rng(3)
    for name in (
        "odd map",
        "channels that fill no vector",
        "much padding, one side",
        "cropped",
        "images on a canvas",
        "a canvas, another dimension in front",
    ):
        geometry = LAYERS[name]
        lhs, rhs = map(partial(draw_codes, rng), operand_shapes(kind, geometry)[:2], bits)
        formats = (bits[0], 0, bits[1], 0)
        expected = oracle(kind, geometry, lhs, rhs, formats)
        x, y = (Guarded.like(planes_of(v, b), at_end) for v, b in zip((lhs, rhs), bits, strict=True))
        out = Guarded.like(np.zeros(expected.shape, np.float32), at_end)
        product_on_buffers(isa, kind, geometry, x, y, formats, out)
        np.testing.assert_array_equal(out, expected)


@each_isa
def test_results_too_large_for_the_caches(isa):
    rng, geometry = np.random.default_rng(5), convolution((112, 112), 16, 256, (3, 3), pad=1)
    lhs, rhs = (draw_codes(rng, shape, 8) for shape in operand_shapes("forward", geometry)[:2])
    expected = oracle("forward", geometry, lhs, rhs, (8, 0, 8, 0))
    out = Guarded.like(np.zeros(expected.shape, np.float32), at_end=False)  # which begins with a line
    product_on_buffers(isa, "forward", geometry, planes_of(lhs, 8), planes_of(rhs, 8), (8, 0, 8, 0), out)
    np.testing.assert_array_equal(out, expected)
