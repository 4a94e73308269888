"""The networks whose training steps are timed: plain Flax Linen, none of which mentions quantization."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class ResNet18(nn.Module):
    """For 32x32 images: a 3x3 stem without pooling, stages of 64 to 512 channels (He et al. 2016)."""

    outputs: int = 10
    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_norm(_conv(x, self.width, 3, 1)))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self._block(x, self.width << stage, stride)
        return nn.Dense(self.outputs)(x.mean((1, 2)))

    def _block(self, x, channels, stride):
        y = nn.relu(_norm(_conv(x, channels, 3, stride)))
        y = _norm(_conv(y, channels, 3, 1))
        if x.shape != y.shape:
            x = _norm(_conv(x, channels, 1, stride))
        return nn.relu(x + y)


class AlexNet(nn.Module):
    """For 227x227 images, in one column (Krizhevsky 2014)."""

    outputs: int = 1000
    hidden: int = 4096

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(64, (11, 11), (4, 4), padding=2)(x))
        x = nn.relu(nn.Conv(192, (5, 5), padding=2)(_pool(x)))
        x = nn.relu(nn.Conv(384, (3, 3), padding=1)(_pool(x)))
        x = nn.relu(nn.Conv(256, (3, 3), padding=1)(x))
        x = _pool(nn.relu(nn.Conv(256, (3, 3), padding=1)(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.outputs)(x)


MOBILENET_STAGES = (  # expansion, channels, blocks, stride (Sandler et al. 2018)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Inverted residual blocks around 3x3 depthwise convolutions."""

    outputs: int = 1000
    stages: tuple = MOBILENET_STAGES
    head: int = 1280

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(_norm(_conv(x, 32, 3, 2)))
        for expansion, channels, blocks, stride in self.stages:
            for block in range(blocks):
                x = self._block(x, expansion, channels, stride if block == 0 else 1)
        x = nn.relu6(_norm(_conv(x, self.head, 1, 1)))
        return nn.Dense(self.outputs)(x.mean((1, 2)))

    def _block(self, x, expansion, channels, stride):
        y, wide = x, x.shape[-1] * expansion
        if expansion > 1:
            y = nn.relu6(_norm(_conv(y, wide, 1, 1)))
        y = nn.relu6(_norm(_conv(y, wide, 3, stride, groups=wide)))
        y = _norm(_conv(y, channels, 1, 1))
        return x + y if x.shape == y.shape else y


class Transformer(nn.Module):
    """Encoder blocks with normalization first; a prediction for every token."""

    vocabulary: int = 1000
    width: int = 512
    heads: int = 8
    blocks: int = 2

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    """One LSTM layer over a sequence of features; a prediction from its last output."""

    outputs: int = 10
    width: int = 512

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x)[:, -1])


class Mlp(nn.Module):
    """Three hidden layers."""

    outputs: int = 1000
    width: int = 2048

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs)(x)


def _conv(x, channels, window, stride, groups=1):
    conv = nn.Conv(
        channels,
        (window, window),
        (stride, stride),
        padding=window // 2,
        use_bias=False,
        feature_group_count=groups,
    )
    return conv(x)


def _norm(x):
    return nn.BatchNorm(use_running_average=False, momentum=0.9)(x)


def _pool(x):
    return nn.max_pool(x, (3, 3), (2, 2))


class Network(NamedTuple):
    """A network, its shape of one example, and a tiny twin for a look whether everything runs."""

    make: Callable[..., nn.Module]
    example: tuple[int, ...]
    quick: dict
    quick_example: tuple[int, ...]
    is_tokens: bool = False


_TINY_STAGES = ((1, 8, 1, 1), (2, 8, 2, 1))

NETWORKS = {
    "resnet18": Network(ResNet18, (32, 32, 3), {"width": 4}, (8, 8, 3)),
    "alexnet": Network(AlexNet, (227, 227, 3), {"hidden": 16, "outputs": 10}, (67, 67, 3)),
    "mobilenet_v2": Network(
        MobileNetV2, (96, 96, 3), {"stages": _TINY_STAGES, "head": 16, "outputs": 10}, (8, 8, 3)
    ),
    "transformer": Network(
        Transformer, (128,), {"vocabulary": 20, "width": 16, "heads": 2, "blocks": 1}, (6,), True
    ),
    "lstm": Network(Lstm, (64, 512), {"width": 16}, (5, 8)),
    "mlp": Network(Mlp, (1024,), {"width": 32, "outputs": 10}, (16,)),
}


def module_of(case: dict) -> nn.Module:
    network = NETWORKS[case["network"]]
    return network.make(**network.quick) if case["quick"] else network.make()


def batches(case: dict, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs with something to learn: noise around one pattern per class. The same in every process."""
    network, rng = NETWORKS[case["network"]], np.random.default_rng(0)
    example = network.quick_example if case["quick"] else network.example
    classes, size = 10, case["batch"]
    patterns = rng.standard_normal((classes, *example), np.float32)
    made = []
    for _ in range(count):
        labels = rng.integers(0, classes, size)
        if network.is_tokens:
            tokens = rng.integers(0, 20, (size, *example))
            made.append((tokens.astype(np.int32), np.roll(tokens, 1, 1).astype(np.int32)))
        else:
            noise = rng.standard_normal((size, *example), np.float32)
            made.append((0.5 * patterns[labels] + noise, labels.astype(np.int32)))
    return made


def initial(case: dict) -> dict:
    """Variables of the module, as numpy arrays; drawn here because to compile Flax's own draws takes long."""
    x, rng = jnp.asarray(batches(case, 1)[0][0]), np.random.default_rng(1)

    def draw(path, leaf):
        what = path[-1].key
        if what in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if leaf.ndim < 2:
            return np.zeros(leaf.shape, np.float32)
        fan_in = leaf.shape[1] if what == "embedding" else np.prod(leaf.shape[:-1])
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

    shapes = jax.eval_shape(module_of(case).init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def steps(quick: bool) -> list[dict]:
    """The training steps that are timed."""
    one = ("apt-adaptive", "apt-random")
    every, some = ("apt-8", "apt-16", *one), ("apt-8", *one)
    sizes = (  # the contenders are fewer where compilation is long
        ("ResNet-18 CIFAR, batch 16", "resnet18", 16, (*every, "qwix")),
        ("ResNet-18 CIFAR, batch 64", "resnet18", 64, one),
        ("AlexNet 227, batch 16", "alexnet", 16, every),
        ("MobileNetV2 96, batch 16", "mobilenet_v2", 16, one),
        ("Transformer d512, 8 x 128", "transformer", 8, (*some, "qwix")),
        ("LSTM 512, 32 x 64", "lstm", 32, some),
        ("MLP 2048, batch 256", "mlp", 256, (*some, "qwix")),
    )
    cases = [
        {
            "work": "step",
            "name": name,
            "network": network,
            "batch": 2 if quick else batch,
            "quick": quick,
            "contenders": list(contenders),
        }
        for name, network, batch, contenders in sizes
    ]
    return [case for case in cases if not (quick and "batch 64" in case["name"])]
