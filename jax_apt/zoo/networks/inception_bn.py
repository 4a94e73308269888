"""Inception-BN: GoogLeNet with batch normalization and pairs of 3 x 3 for 5 x 5 convolutions.

Source: Ioffe and Szegedy, arXiv 1502.03167, figure 5, with the widths of the models that were released.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jax_apt.zoo.networks.layers import ConvBn, avg_pool, max_pool


class Widths(NamedTuple):
    """Channels of a block's branches."""

    one: int  # 1 x 1; 0 for a block that halves the map
    reduce: int  # 1 x 1 before one 3 x 3
    three: int
    double_reduce: int  # 1 x 1 before two 3 x 3
    double: int
    pool: int  # 1 x 1 after pooling; 0 passes the pooled input through


BLOCKS = {
    "3a": Widths(64, 64, 64, 64, 96, 32),
    "3b": Widths(64, 64, 96, 64, 96, 64),
    "3c": Widths(0, 128, 160, 64, 96, 0),
    "4a": Widths(224, 64, 96, 96, 128, 128),
    "4b": Widths(192, 96, 128, 96, 128, 128),
    "4c": Widths(160, 128, 160, 128, 160, 128),
    "4d": Widths(96, 128, 192, 160, 192, 128),
    "4e": Widths(0, 128, 192, 192, 256, 0),
    "5a": Widths(352, 192, 320, 160, 224, 128),
    "5b": Widths(352, 192, 320, 192, 224, 128),
}


class InceptionBlock(nn.Module):
    """Four branches over one input, concatenated along the channels."""

    widths: Widths
    pool: str  # "avg" or "max", of the last branch

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        w, stride = self.widths, 1 if self.widths.one else 2
        branches = []
        if w.one:
            branches.append(self._conv(w.one, 1, 1, "one")(x, train))
        y = self._conv(w.reduce, 1, 1, "reduce")(x, train)
        branches.append(self._conv(w.three, 3, stride, "three")(y, train))
        y = self._conv(w.double_reduce, 1, 1, "double_reduce")(x, train)
        y = self._conv(w.double, 3, 1, "double_1")(y, train)
        branches.append(self._conv(w.double, 3, stride, "double_2")(y, train))
        y = avg_pool(x) if self.pool == "avg" else max_pool(x, 3, stride, ((1, 1), (1, 1)))
        branches.append(self._conv(w.pool, 1, 1, "pool")(y, train) if w.pool else y)
        return jnp.concatenate(branches, axis=-1)

    def _conv(self, channels: int, kernel: int, stride: int, name: str) -> ConvBn:
        return ConvBn(channels, kernel, stride, use_bias=True, name=name)


class InceptionBn(nn.Module):
    """Ten Inception blocks; images (batch, 224, 224, 3) at the published size."""

    outputs: int = 1000
    divisor: int = 1  # of every width
    is_stem_strided: bool = True  # False for small images

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = self._stem(x, train)
        for name, widths in BLOCKS.items():
            narrow = Widths(*(width // self.divisor for width in widths))
            pool = "max" if not widths.pool or name == "5b" else "avg"
            x = InceptionBlock(narrow, pool, name=f"inception_{name}")(x, train)
        return nn.Dense(self.outputs, name="classifier")(x.mean(axis=(1, 2)))

    def _stem(self, x: Array, train: bool) -> Array:
        first, second = 64 // self.divisor, 192 // self.divisor
        if not self.is_stem_strided:
            return ConvBn(second, 3, use_bias=True, name="conv1")(x, train)
        x = ConvBn(first, 7, 2, use_bias=True, name="conv1")(x, train)
        x = max_pool(x, 3, 2, ((0, 1), (0, 1)))
        x = ConvBn(first, 1, use_bias=True, name="conv2_reduce")(x, train)
        x = ConvBn(second, 3, use_bias=True, name="conv2")(x, train)
        return max_pool(x, 3, 2, ((0, 1), (0, 1)))


def small(outputs: int) -> InceptionBn:
    """An eighth of the widths, for 32 x 32 images."""
    return InceptionBn(outputs, divisor=8, is_stem_strided=False)
