"""Oracles: naive, exact, and by other algorithms than the code they judge."""

import itertools
import math
from fractions import Fraction

import numpy as np

# Fixed point


def exponent_oracle(max_abs, bits):
    """Least exponent at which max_abs does not clip, by search over exact fractions."""
    largest = 2 ** (bits - 1) - 1
    value = Fraction(float(max_abs))
    if value == 0:
        return -126
    exponent = math.frexp(float(max_abs))[1] - bits - 2  # surely too small
    while largest * Fraction(2) ** exponent < value:
        exponent += 1
    return max(-126, min(126, exponent))


def quantize_oracle(x, bits, exponent):
    """Codes by exact fractions: round half to even, then clip."""
    largest = 2 ** (bits - 1) - 1
    codes = [round(Fraction(float(v)) / Fraction(2) ** exponent) for v in np.ravel(x)]
    return np.array([max(-largest, min(largest, c)) for c in codes], np.int64).reshape(np.shape(x))


def diff_oracle(x, bits, measure="mean_magnitude"):
    """The error measures in float64, where codes and sums of this size are exact enough."""
    x = np.asarray(x, np.float64)
    step = 2.0 ** exponent_oracle(np.max(np.abs(x)), bits)
    value = np.round(x / step) * step
    total = np.sum(np.abs(x))
    if measure == "mean_magnitude":
        ratio = abs(total - np.sum(np.abs(value))) / total
    elif measure == "elementwise":
        ratio = np.sum(np.abs(x - value)) / total
    else:
        ratio = step / 4 / np.mean(np.abs(x))
    return np.log2(ratio + 1)


# Integers


def codes(rng, shape, bits, kind="random"):
    """Integer codes of a width: random ones or the extremes."""
    largest = 2 ** (bits - 1) - 1
    if kind == "random":
        return rng.integers(-largest, largest + 1, shape)
    if kind == "extreme":
        return largest * rng.choice([-1, 1], shape)
    if kind == "alternating":
        return largest * (1 - 2 * (np.arange(math.prod(shape)) % 2)).reshape(shape)
    return np.full(shape, -largest if kind == "smallest" else largest)


def container(bits):
    return np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32


def planes_of(codes, bits, limbs=None):
    """Limb planes by the definition: bytes of code + 2**(8 * used - 1), little end first; others unused."""
    used = math.ceil(bits / 8)
    shifted = np.asarray(codes, np.int64) + 2 ** (8 * used - 1)
    planes = [shifted >> (8 * i) & 255 for i in range(used)]
    planes += [np.full(shifted.shape, 77)] * ((limbs or used) - used)
    return np.stack(planes).astype(np.uint8)


def float32_oracle(sums):
    """Nearest float32 of Python integers, ties to even, by exact arithmetic on the 24-bit mantissa."""

    def convert(value):
        magnitude = abs(int(value))
        shift = max(magnitude.bit_length() - 24, 0)
        rounded = round(Fraction(magnitude, 1 << shift)) << shift
        return np.float32(float(rounded if value >= 0 else -rounded))  # at most 24 bits: exact

    flat = [convert(v) for v in np.ravel(np.asarray(sums, object))]
    return np.array(flat, np.float32).reshape(np.shape(sums))


# Products


def dot_oracle(lhs, rhs, dimension_numbers):
    """dot_general of integers by einsum, in int64."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    lhs_names, rhs_names = [""] * lhs.ndim, [""] * rhs.ndim
    pairs = (*zip(lhs_batch, rhs_batch, strict=True), *zip(lhs_contract, rhs_contract, strict=True))
    for i, j in pairs:
        lhs_names[i] = rhs_names[j] = next(letters)
    lhs_names = [n or next(letters) for n in lhs_names]
    rhs_names = [n or next(letters) for n in rhs_names]
    batch = [lhs_names[i] for i in lhs_batch]
    lhs_free = [n for i, n in enumerate(lhs_names) if i not in (*lhs_contract, *lhs_batch)]
    rhs_free = [n for i, n in enumerate(rhs_names) if i not in (*rhs_contract, *rhs_batch)]
    out = "".join(batch + lhs_free + rhs_free)
    spec = f"{''.join(lhs_names)},{''.join(rhs_names)}->{out}"
    return np.einsum(spec, lhs.astype(np.int64), rhs.astype(np.int64))


def _conv_terms(lhs_shape, rhs_shape, params):
    """Every (batch, position, tap, pixel, feature, first channel) that meets, by explicit loops.

    Shapes are (batch, channels, *space) and (features, channels / groups, *window).
    """
    padding, strides = params["padding"], params["window_strides"]
    lhs_dilation, rhs_dilation = params["lhs_dilation"], params["rhs_dilation"]
    features, window = rhs_shape[0], rhs_shape[2:]
    batch = lhs_shape[0] // params["batch_group_count"]
    per_feature_group = features // params["feature_group_count"]
    per_batch_group = features // params["batch_group_count"]
    for at in itertools.product(*map(range, conv_positions(lhs_shape, rhs_shape, params))):
        for tap in itertools.product(*map(range, window)):
            pixel = []
            for d, size in enumerate(lhs_shape[2:]):
                place = at[d] * strides[d] + tap[d] * rhs_dilation[d] - padding[d][0]
                if place % lhs_dilation[d] == 0 and 0 <= place // lhs_dilation[d] < size:
                    pixel.append(place // lhs_dilation[d])
            if len(pixel) < len(window):
                continue  # the tap meets padding or a hole
            for f in range(features):
                first = f // per_feature_group * rhs_shape[1]
                start = f // per_batch_group * batch
                yield slice(start, start + batch), at, tap, tuple(pixel), f, first


def conv_positions(lhs_shape, rhs_shape, params):
    """Output positions: the places of the window, counted one by one."""
    counts = []
    for d, (size, taps) in enumerate(zip(lhs_shape[2:], rhs_shape[2:], strict=True)):
        low, high = params["padding"][d]
        length = low + high + max((size - 1) * params["lhs_dilation"][d] + 1, 0)
        reach = (taps - 1) * params["rhs_dilation"][d] + 1
        counts.append(len(range(0, length - reach + 1, params["window_strides"][d])))
    return counts


def conv_oracle(lhs, rhs, params):
    """conv_general_dilated of integers by loops over positions and taps, in int64."""
    spec = params["dimension_numbers"]
    image = np.transpose(lhs, spec.lhs_spec).astype(np.int64)
    kernel = np.transpose(rhs, spec.rhs_spec).astype(np.int64)
    batch = image.shape[0] // params["batch_group_count"]
    positions = conv_positions(image.shape, kernel.shape, params)
    out = np.zeros((batch, kernel.shape[0], *positions), np.int64)
    channels = kernel.shape[1]
    for rows, at, tap, pixel, f, first in _conv_terms(image.shape, kernel.shape, params):
        values = image[(rows, slice(first, first + channels), *pixel)]
        out[(slice(None), f, *at)] += values @ kernel[(f, slice(None), *tap)]
    return np.transpose(out, np.argsort(spec.out_spec))


def conv_gradients_oracle(lhs, rhs, out, params):
    """Gradients of sum(conv(lhs, rhs) * out) by lhs and rhs: the same loops, scattered, in int64."""
    spec = params["dimension_numbers"]
    image = np.transpose(lhs, spec.lhs_spec).astype(np.int64)
    kernel = np.transpose(rhs, spec.rhs_spec).astype(np.int64)
    cotangent = np.transpose(out, spec.out_spec).astype(np.int64)
    d_image, d_kernel, channels = np.zeros_like(image), np.zeros_like(kernel), kernel.shape[1]
    for rows, at, tap, pixel, f, first in _conv_terms(image.shape, kernel.shape, params):
        arriving = cotangent[(slice(None), f, *at)]
        place = (rows, slice(first, first + channels), *pixel)
        d_image[place] += np.outer(arriving, kernel[(f, slice(None), *tap)])
        d_kernel[(f, slice(None), *tap)] += arriving @ image[place]
    return (
        np.transpose(d_image, np.argsort(spec.lhs_spec)),
        np.transpose(d_kernel, np.argsort(spec.rhs_spec)),
    )
