"""AlexNet with grouped convolutions and local response normalization.

Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
"""

import flax.linen as nn
from jax import Array

from jax_apt.zoo.networks.layers import Conv, Dense, local_response_normalization, max_pool


class AlexNet(nn.Module):
    """Five convolutions and three dense layers; images (batch, 227, 227, 3) at the published size."""

    outputs: int = 1000
    channels: tuple[int, ...] = (96, 256, 384, 384, 256)
    stem_kernel: int = 11
    stem_stride: int = 4
    hidden: int = 4096
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        a, b, c, d, e = self.channels
        stem = (self.stem_kernel, self.stem_kernel)
        x = nn.relu(Conv(a, stem, strides=self.stem_stride, padding="VALID", name="conv1")(x))
        x = max_pool(local_response_normalization(x), 3)
        x = nn.relu(Conv(b, (5, 5), feature_group_count=2, name="conv2")(x))
        x = max_pool(local_response_normalization(x), 3)
        x = nn.relu(Conv(c, (3, 3), name="conv3")(x))
        x = nn.relu(Conv(d, (3, 3), feature_group_count=2, name="conv4")(x))
        x = nn.relu(Conv(e, (3, 3), feature_group_count=2, name="conv5")(x))
        x = max_pool(x, 3)
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(Dense(self.hidden, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name="fc8")(x)


def small(outputs: int) -> AlexNet:
    """For 32 x 32 images."""
    return AlexNet(outputs, (32, 48, 64, 64, 48), stem_kernel=5, stem_stride=1, hidden=128, dropout=0.2)
