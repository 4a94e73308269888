"""Small networks for 8 x 8 digits."""

import flax.linen as nn
from jax import Array


class ConvNet(nn.Module):
    """Three 3x3 convolutions, one of them strided, and two dense layers."""

    outputs: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(self.outputs)(x)


class Mlp(nn.Module):
    """Two hidden dense layers."""

    outputs: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(self.outputs)(x)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions around a shortcut."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(self.channels, (3, 3), use_bias=False)(x)))
        y = nn.GroupNorm(num_groups=4)(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, two residual blocks with group normalization, average pooling, a dense layer."""

    outputs: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for _ in range(2):
            x = ResidualBlock(16)(x)
        return nn.Dense(self.outputs)(x.mean(axis=(1, 2)))
