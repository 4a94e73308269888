"""Residual networks of 18, 50 and 152 layers.

Source: He et al., arXiv 1512.03385, table 1; the stride of a bottleneck is in its 3 x 3 convolution.
"""

from functools import partial

import flax.linen as nn
from jax import Array

from jax_apt.zoo.networks.layers import ConvBn, max_pool

EXPANSION = 4  # of a bottleneck


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a bottleneck, around a shortcut."""

    channels: int
    stride: int
    is_bottleneck: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        n, last = self.channels, partial(ConvBn, activation="", is_zero_at_first=True)
        if self.is_bottleneck:
            y = ConvBn(n, 1, name="conv1")(x, train)
            y = ConvBn(n, 3, self.stride, name="conv2")(y, train)
            y = last(EXPANSION * n, 1, name="conv3")(y, train)
        else:
            y = ConvBn(n, 3, self.stride, name="conv1")(x, train)
            y = last(n, 3, name="conv2")(y, train)
        if x.shape != y.shape:
            x = ConvBn(y.shape[-1], 1, self.stride, activation="", name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, average pooling, a dense layer."""

    stages: tuple[int, ...]  # blocks in each
    is_bottleneck: bool
    outputs: int = 1000
    channels: int = 64  # of the first stage
    is_stem_strided: bool = True  # False for small images: 3 x 3 without pooling

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.is_stem_strided:
            x = ConvBn(self.channels, 7, 2, name="stem")(x, train)
            x = max_pool(x, 3, 2, ((1, 1), (1, 1)))
        else:
            x = ConvBn(self.channels, 3, name="stem")(x, train)
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                block = Block(
                    2**stage * self.channels, stride, self.is_bottleneck, name=f"s{stage + 1}b{i + 1}"
                )
                x = block(x, train)
        return nn.Dense(self.outputs, name="classifier")(x.mean(axis=(1, 2)))


ResNet18 = partial(ResNet, (2, 2, 2, 2), False)
ResNet50 = partial(ResNet, (3, 4, 6, 3), True)
ResNet152 = partial(ResNet, (3, 8, 36, 3), True)


def small18(outputs: int) -> ResNet:
    """All eighteen layers, an eighth as wide, for 32 x 32 images."""
    return ResNet18(outputs, channels=8, is_stem_strided=False)


def small50(outputs: int) -> ResNet:
    """All fifty layers, an eighth as wide, for 32 x 32 images."""
    return ResNet50(outputs, channels=8, is_stem_strided=False)


def small152(outputs: int) -> ResNet:
    """Bottlenecks in the proportions of 152 layers, a third as deep, an eighth as wide."""
    return ResNet((1, 3, 12, 1), True, outputs, channels=8, is_stem_strided=False)
