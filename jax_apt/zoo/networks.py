"""Small networks in plain Flax Linen. None of them mentions quantization."""

from collections.abc import Callable

import flax.linen as nn
from jax import Array


class ConvNet(nn.Module):
    """Three 3x3 convolutions, one of them strided, and two dense layers."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(self.classes)(x)


class Mlp(nn.Module):
    """Two hidden dense layers."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(self.classes)(x)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"convnet": ConvNet, "mlp": Mlp}
