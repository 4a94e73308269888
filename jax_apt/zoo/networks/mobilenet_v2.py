"""MobileNet-v2: inverted residuals with depthwise convolutions.

Source: Sandler et al., arXiv 1801.04381, table 2.
"""

from typing import NamedTuple

import flax.linen as nn
from jax import Array

from jax_apt.zoo.networks.layers import ConvBn


class Stage(NamedTuple):
    """A sequence of equal blocks; the first one has the stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1 x 1 expansion, depthwise 3 x 3, linear 1 x 1 projection."""

    channels: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        wide, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = ConvBn(wide, 1, activation="relu6", name="expand")(y, train)
        y = ConvBn(wide, 3, self.stride, groups=wide, activation="relu6", name="depthwise")(y, train)
        is_residual = x.shape == (*y.shape[:-1], self.channels)
        project = ConvBn(self.channels, 1, activation="", is_zero_at_first=is_residual, name="project")
        return x + project(y, train) if is_residual else project(y, train)


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, a 1 x 1 convolution, a dense layer."""

    outputs: int = 1000
    stem: int = 32
    stem_stride: int = 2
    stages: tuple[Stage, ...] = STAGES
    last: int = 1280
    dropout: float = 0.2

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = ConvBn(self.stem, 3, self.stem_stride, activation="relu6", name="stem")(x, train)
        for s, stage in enumerate(self.stages):
            for i in range(stage.blocks):
                stride, name = stage.stride if i == 0 else 1, f"s{s + 1}b{i + 1}"
                x = InvertedResidual(stage.channels, stage.expansion, stride, name=name)(x, train)
        x = ConvBn(self.last, 1, activation="relu6", name="last")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(self.outputs, name="classifier")(x)


def small(outputs: int) -> MobileNetV2:
    """A quarter of the widths, two halvings fewer, for 32 x 32 images."""
    strides = (1, 1, 2, 2, 1, 2, 1)
    stages = tuple(
        stage._replace(channels=stage.channels // 4, blocks=min(stage.blocks, 2), stride=stride)
        for stage, stride in zip(STAGES, strides, strict=True)
    )
    return MobileNetV2(outputs, 8, 1, stages, last=160, dropout=0.1)
