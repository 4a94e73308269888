"""VGG-16, configuration D.

Source: Simonyan and Zisserman, arXiv 1409.1556.
"""

import flax.linen as nn
from jax import Array

from jax_apt.zoo.networks.layers import VGG16, Dense, max_pool, norm_if, vgg_block


class Vgg(nn.Module):
    """Blocks of 3 x 3 convolutions, each followed by pooling, and three dense layers."""

    outputs: int = 1000
    blocks: tuple[tuple[int, ...], ...] = VGG16
    hidden: int = 4096
    dropout: float = 0.5
    is_normalized: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = norm_if(self.is_normalized, train)
        for i, channels in enumerate(self.blocks):
            x = max_pool(vgg_block(x, channels, f"conv{i + 1}", norm=norm))
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = Dense(self.hidden, name=name)(x)
            x = nn.relu(norm(name=f"{name}_norm")(x) if norm else x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name="fc8")(x)


SMALL_BLOCKS = ((16, 16), (32, 32), (48, 48, 48), (64, 64, 64), (64, 64, 64))


def small(outputs: int) -> Vgg:
    """All sixteen layers, narrower and with batch normalization, for 32 x 32 images."""
    return Vgg(outputs, SMALL_BLOCKS, hidden=128, dropout=0.0, is_normalized=True)
