"""Layers that several networks share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array, lax

Conv = partial(nn.Conv, kernel_init=nn.initializers.he_normal())
Dense = partial(nn.Dense, kernel_init=nn.initializers.he_normal())

# The usual 0.99 remembers more steps than an epoch of the small tasks has.
BatchNorm = partial(nn.BatchNorm, momentum=0.9)


class ConvBn(nn.Module):
    """Convolution, batch normalization and, unless it is the last of a block, a nonlinearity.

    With `is_zero_at_first` the scale of the normalization starts at 0: a residual block that ends so is the
    identity before training, and deep networks learn from the first steps on.
    Source: Goyal et al., arXiv 1706.02677, section 5.1.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    activation: str = "relu"  # "relu", "relu6" or "" for none
    is_zero_at_first: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = Conv(
            self.channels,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=(self.kernel - 1) // 2,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
        )(x)
        init = nn.initializers.zeros if self.is_zero_at_first else nn.initializers.ones
        x = BatchNorm(use_running_average=not train, scale_init=init)(x)
        return getattr(jax.nn, self.activation)(x) if self.activation else x


def max_pool(x: Array, window: int = 2, stride: int = 2, padding: Any = "VALID") -> Array:
    return nn.max_pool(x, (window, window), (stride, stride), padding)


def avg_pool(x: Array, window: int = 3, stride: int = 1) -> Array:
    """Padded at every side so that stride 1 keeps the size; padding does not count."""
    pad = (window - 1) // 2
    padding: Any = ((pad, pad), (pad, pad))
    return nn.avg_pool(x, (window, window), (stride, stride), padding, count_include_pad=False)


def local_response_normalization(
    x: Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Array:
    """x / (k + alpha * sum of x^2 over `size` neighbouring channels)^beta, for x (..., channels).

    Source: Krizhevsky et al. 2012, section 3.3.
    """
    window = (1,) * (x.ndim - 1) + (size,)
    padding = [(0, 0)] * (x.ndim - 1) + [(size // 2, size // 2)]
    squares = lax.reduce_window(x * x, np.zeros((), x.dtype), lax.add, window, (1,) * x.ndim, padding)
    return x * (k + alpha * squares) ** -beta


def vgg_block(
    x: Array,
    channels: tuple[int, ...],
    name: str,
    dilation: int = 1,
    norm: Callable[..., nn.Module] | None = None,
) -> Array:
    """3 x 3 convolutions with relu, normalized by `norm(name=...)`; call it inside a compact method."""
    for i, features in enumerate(channels):
        conv = Conv(features, (3, 3), padding=dilation, kernel_dilation=dilation, name=f"{name}_{i + 1}")
        x = conv(x)
        x = nn.relu(norm(name=f"{name}_{i + 1}_norm")(x) if norm else x)
    return x


def norm_if(is_normalized: bool, train: bool) -> Callable[..., nn.Module] | None:
    """Batch normalization for `vgg_block`, or None.

    The published VGG networks have none: they start from a shallower network, or from weights that have
    learnt ImageNet. The small presets start from random values and are normalized instead.
    """
    return partial(BatchNorm, use_running_average=not train) if is_normalized else None


VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
