"""Products of the CPU kernels on plain memory, their int64 oracle, and geometries to try them on."""

import ctypes
import itertools
import mmap

import helpers
import numpy as np
import pytest
from helpers import planes_of

from jax_apt import xla_ops
from jax_apt.xla_ops import Geometry

ISAS = xla_ops.available_isas() if xla_ops.is_available() else ("none",)
KINDS = {"forward": "xwy", "input_gradient": "ywx", "filter_gradient": "xyw"}  # lhs, rhs, result
WIDTHS = (2, 8, 9, 14, 16, 24)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", KINDS)


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


CONVOLUTIONS = {
    "1d": convolution(9, 3, 4, 3, batch=2),
    "same": convolution((7, 6), 5, 6, (3, 3), pad=(1, 1), batch=2),
    "lines": convolution((9, 9), 64, 32, (3, 3), pad=(1, 1), batch=2),
    "stem": convolution((17, 18), 3, 8, (7, 7), pad=(3, 3), stride=(2, 2)),
    "stride": convolution((7, 8), 3, 5, (3, 2), stride=(2, 3), pad=(1, 0), pad_after=(1, 2), batch=3),
    "stride_beyond_window": convolution((9, 9), 4, 3, (1, 2), stride=(3, 3), batch=2),
    "dilation": convolution((11, 10), 2, 3, (3, 3), dilation=(2, 3), pad=(2, 3)),
    "stride_and_dilation": convolution((13, 12), 4, 6, (3, 2), stride=(2, 3), dilation=(3, 2), pad=(2, 1)),
    # Each tap has an image of its own: on small maps, with windows as large as the map, and with one tap.
    "small_map": convolution((4, 4), 12, 130, (3, 3), pad=(1, 1), batch=3),
    "small_map_shifted": convolution((5, 3), 130, 12, (3, 3), pad=(2, -1), pad_after=(0, 3), batch=3),
    "small_map_dilation": convolution((4, 5), 12, 130, (3, 2), dilation=(2, 3), pad=(2, 1), batch=2),
    "small_map_stride": convolution((8, 7), 12, 130, (3, 3), stride=(2, 2), pad=(1, 1), batch=3),
    "small_map_groups": convolution((3, 3), 6, 260, (3, 3), groups=2, pad=(1, 1), batch=2),
    "whole_map": convolution((5, 4), 9, 70, (5, 4), batch=3),
    "one_tap": convolution((7, 6), 12, 20, (1, 1), stride=(2, 3), pad=(1, -1), pad_after=(2, 0), batch=2),
    "crop": convolution((6, 6), 2, 3, (2, 2), pad=(-1, 0), pad_after=(1, -2), batch=2),
    "crop_and_stride": convolution((9, 8), 2, 3, (3, 2), pad=(-2, -3), stride=(2, 2)),
    "groups": convolution((5, 5), 6, 4, (3, 3), groups=2, pad=(1, 1), batch=2),
    "depthwise": convolution((6, 5), 35, 70, (3, 3), groups=35, pad=(1, 1), stride=(2, 1)),
    "depthwise_alone": convolution((6, 7), 70, 70, (3, 3), groups=70, pad=(1, 1), batch=2),
    "depthwise_stride": convolution(
        (9, 8), 64, 64, (3, 2), groups=64, pad=(2, -1), stride=(2, 3), dilation=(1, 2), batch=2
    ),
    "depthwise_3d": convolution((4, 3, 5), 3, 3, (2, 2, 3), groups=3, pad=(1, 0, 1), stride=(1, 2, 1)),
    # Rows of more than 64 pixels are taken in stretches; more taps than fit the registers at once.
    "depthwise_long_rows": convolution((3, 150), 5, 5, (2, 11), groups=5, pad=(1, 5)),
    "depthwise_long_strided": convolution((3, 211), 17, 17, (5, 5), groups=17, pad=(2, 2), stride=(2, 3)),
    "3d": convolution((4, 3, 5), 2, 3, (2, 1, 3), pad=(1, 0, 1), batch=2),
    "nothing_left": convolution((2, 2), 3, 4, (3, 3), batch=2),
    "unequal_padding": convolution((5, 7), 3, 2, (4, 4), pad=(0, 3), pad_after=(3, 0)),
}


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
