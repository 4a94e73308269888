"""DeepLab with a large field of view (LargeFOV): VGG-16 with dilated convolutions.

Source: Chen et al., arXiv 1412.7062 and 1606.00915 (20.5 M parameters).
"""

import flax.linen as nn
from jax import Array

from jax_apt.zoo.networks.layers import VGG16, Conv, max_pool, norm_if, vgg_block
from jax_apt.zoo.networks.vgg import SMALL_BLOCKS


class DeepLab(nn.Module):
    """Class scores of every eighth pixel at the published size: (batch, height / 8, width / 8, outputs).

    A pooling layer whose stride is 1 leaves the map as it is; what follows is dilated by 2 instead.
    """

    outputs: int = 21
    blocks: tuple[tuple[int, ...], ...] = VGG16
    pool_strides: tuple[int, ...] = (2, 2, 2, 1, 1)
    head: int = 1024
    head_dilation: int = 12
    dropout: float = 0.5
    is_normalized: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dilation, norm = 1, norm_if(self.is_normalized, train)
        for i, (channels, stride) in enumerate(zip(self.blocks, self.pool_strides, strict=True)):
            x = vgg_block(x, channels, f"conv{i + 1}", dilation, norm)
            x = max_pool(x, 3, stride, ((1, 1), (1, 1)))
            dilation *= 2 // stride
        rate, drop = self.head_dilation, nn.Dropout(self.dropout, deterministic=not train)
        x = nn.relu(Conv(self.head, (3, 3), padding=rate, kernel_dilation=rate, name="fc6")(x))
        x = nn.relu(Conv(self.head, (1, 1), name="fc7")(drop(x)))
        return nn.Conv(self.outputs, (1, 1), name="fc8")(drop(x))


def small(outputs: int) -> DeepLab:
    """Narrower, with batch normalization and scores of every fourth pixel, for scenes of 48 x 48."""
    blocks, strides = SMALL_BLOCKS, (2, 2, 1, 1, 1)
    return DeepLab(outputs, blocks, strides, head=96, head_dilation=4, dropout=0.2, is_normalized=True)
