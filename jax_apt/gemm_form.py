"""Any convolution or `dot_general` as one batched matrix product (B, M, K) x (B, K, N).

Rearrangement alone: values are moved, never changed, so it serves integer codes as well as floats.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn


class GemmForm(NamedTuple):
    """Operands of a batched matrix product, and what turns its result into the original one's shape."""

    lhs: Array  # (B, M, K)
    rhs: Array  # (B, K, N)
    finish: Callable[[Array], Array]  # (B, M, N) -> shape of the original result

    @property
    def depth(self) -> int:
        return self.lhs.shape[2]


def as_gemm(eqn: JaxprEqn, lhs: Array, rhs: Array, zero: Array | int = 0) -> GemmForm:
    """The matrix product that a `dot_general` or `conv_general_dilated` equation computes.

    `zero` is what padding holds.
    """
    if eqn.primitive.name == "dot_general":
        return _dot_as_gemm(eqn.params, lhs, rhs)
    return _conv_as_gemm(eqn.params, lhs, rhs, jnp.asarray(zero, lhs.dtype))


def _dot_as_gemm(params, lhs: Array, rhs: Array) -> GemmForm:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    lhs_free = [d for d in range(lhs.ndim) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(rhs.ndim) if d not in (*rhs_contract, *rhs_batch)]

    def size(x, dims):
        return math.prod(x.shape[d] for d in dims)

    batch, depth = size(lhs, lhs_batch), size(lhs, lhs_contract)
    m, n = size(lhs, lhs_free), size(rhs, rhs_free)
    out_shape = [lhs.shape[d] for d in (*lhs_batch, *lhs_free)] + [rhs.shape[d] for d in rhs_free]
    return GemmForm(
        lhs.transpose(*lhs_batch, *lhs_free, *lhs_contract).reshape(batch, m, depth),
        rhs.transpose(*rhs_batch, *rhs_contract, *rhs_free).reshape(batch, depth, n),
        lambda out: out.reshape(out_shape),
    )


def _conv_as_gemm(params, lhs: Array, rhs: Array, zero: Array) -> GemmForm:
    """Patches (G, batch * positions, taps * channels) times the kernel (G, taps * channels, features)."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    image = lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])  # (batch, *space, channels)
    kernel = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])  # (*window, channels, features)
    window, (channels, features) = kernel.shape[:-2], kernel.shape[-2:]
    patches = _patches(params, image, window, zero)  # (batch, *positions, *window, all channels)
    batch, positions = image.shape[0], patches.shape[1 : 1 + len(window)]
    taps = math.prod(window)

    feature_groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    groups = feature_groups * batch_groups
    batch //= batch_groups
    rows = math.prod(positions)
    patches = patches.reshape(batch_groups, batch, rows, taps, feature_groups, channels)
    patches = patches.transpose(0, 4, 1, 2, 3, 5).reshape(groups, batch * rows, taps * channels)
    kernel = kernel.reshape(taps * channels, groups, features // groups).transpose(1, 0, 2)

    def finish(out: Array) -> Array:
        out = out.reshape(groups, batch, rows, features // groups).transpose(1, 2, 0, 3)
        out = out.reshape(batch, *positions, features)
        order = [0, out.ndim - 1, *range(1, out.ndim - 1)]  # (batch, features, *positions)
        inverse = [out_spec.index(d) for d in range(out.ndim)]
        return out.transpose(*order).transpose(*inverse)

    return GemmForm(patches, kernel, finish)


def _patches(params, image: Array, window: tuple[int, ...], zero: Array) -> Array:
    """(batch, *space, channels) -> (batch, *positions, *window, channels), one spatial axis at a time."""
    spatial = len(window)
    pads = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    patches = lax.pad(image, zero, [(0, 0, 0), *pads, (0, 0, 0)])
    for d in range(spatial):
        patches = _windows(
            patches, 1 + d, 1 + spatial + d, window[d],
            params["window_strides"][d], params["rhs_dilation"][d],
        )  # fmt: skip
    return patches


def _windows(x: Array, axis: int, at: int, taps: int, stride: int, dilation: int) -> Array:
    """Replaces `axis` by its positions and inserts the window's taps as a new axis `at`."""
    reach = dilation * (taps - 1) + 1
    positions = max((x.shape[axis] - reach) // stride + 1, 0)
    if taps <= positions:
        parts = [
            lax.slice_in_dim(x, t * dilation, t * dilation + stride * (positions - 1) + 1, stride, axis)
            for t in range(taps)
        ]
        return jnp.stack(parts, at)
    parts = [lax.slice_in_dim(x, p * stride, p * stride + reach, dilation, axis) for p in range(positions)]
    if not parts:
        return jnp.zeros((*x.shape[:axis], 0, *x.shape[axis + 1 : at], taps, *x.shape[at:]), x.dtype)
    stacked = jnp.stack(parts, axis)  # positions at `axis`, taps at `axis + 1`
    return jnp.moveaxis(stacked, axis + 1, at)
