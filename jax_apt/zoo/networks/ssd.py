"""SSD300: boxes and classes from six feature maps of VGG-16.

Source: Liu et al., arXiv 1512.02325. Default boxes and matching belong to the task.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jax_apt.zoo.networks.layers import VGG16, Conv, max_pool, norm_if, vgg_block


class Extra(NamedTuple):
    """1 x 1 and 3 x 3 convolutions that make the next, smaller map."""

    reduce: int
    channels: int
    stride: int
    padding: int


EXTRAS = (Extra(256, 512, 2, 1), Extra(128, 256, 2, 1), Extra(128, 256, 1, 0), Extra(128, 256, 1, 0))


class L2Norm(nn.Module):
    """Each pixel's channels scaled to a learnt length, 20 at first."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(20.0), (x.shape[-1],))
        return scale * x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-10)


class Ssd(nn.Module):
    """(offsets (batch, boxes, 4), scores (batch, boxes, outputs)); class 0 is the background.

    Boxes are in the order map, row, column, shape. Images are (batch, 300, 300, 3) as published.
    """

    outputs: int = 21
    blocks: tuple[tuple[int, ...], ...] = VGG16
    tapped_block: int = 3  # whose output, before pooling, is the first map
    head: int = 1024
    head_dilation: int = 6
    extras: tuple[Extra, ...] = EXTRAS
    shapes: tuple[int, ...] = (4, 6, 6, 6, 4, 4)  # default boxes at each pixel of each map
    is_normalized: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        maps, offsets, scores = self._maps(x, train), [], []
        for i, (features, shapes) in enumerate(zip(maps, self.shapes, strict=True)):
            offsets.append(self._predict(features, shapes, 4, f"offsets{i + 1}"))
            scores.append(self._predict(features, shapes, self.outputs, f"scores{i + 1}"))
        return jnp.concatenate(offsets, axis=1), jnp.concatenate(scores, axis=1)

    def _maps(self, x: Array, train: bool) -> list[Array]:
        maps, norm = [], norm_if(self.is_normalized, train)
        for i, channels in enumerate(self.blocks):
            x = vgg_block(x, channels, f"conv{i + 1}", norm=norm)
            if i == self.tapped_block:
                maps.append(L2Norm(name="l2norm")(x))
            # Pooling rounds up (75 pixels become 38) and the last block keeps its size.
            is_last = i == len(self.blocks) - 1
            odd = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
            x = max_pool(x, 3, 1, ((1, 1), (1, 1))) if is_last else max_pool(x, 2, 2, odd)
        rate = self.head_dilation
        x = nn.relu(Conv(self.head, (3, 3), padding=rate, kernel_dilation=rate, name="fc6")(x))
        x = nn.relu(Conv(self.head, (1, 1), name="fc7")(x))
        maps.append(x)
        for i, extra in enumerate(self.extras):
            x = nn.relu(Conv(extra.reduce, (1, 1), name=f"extra{i + 1}_1")(x))
            conv = Conv(extra.channels, (3, 3), extra.stride, padding=extra.padding, name=f"extra{i + 1}_2")
            x = nn.relu(conv(x))
            maps.append(x)
        return maps

    def _predict(self, features: Array, shapes: int, size: int, name: str) -> Array:
        out = nn.Conv(shapes * size, (3, 3), name=name)(features)
        return out.reshape(out.shape[0], -1, size)


def small(outputs: int) -> Ssd:
    """With batch normalization; maps of 12 x 12, 6 x 6 and 3 x 3 from scenes of 48 x 48."""
    blocks = ((16, 16), (32, 32), (48, 48), (64, 64))
    options = {"extras": (Extra(32, 64, 2, 1),), "shapes": (4, 4, 4), "is_normalized": True}
    return Ssd(outputs, blocks, 2, head=64, head_dilation=2, **options)
