"""The networks by name, in plain Flax Linen. None of them mentions quantization.

Each is called as `network(inputs, train)`; with `train` it draws from the random stream "dropout" and
updates the collection "batch_stats", where it has them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn

from jax_apt.zoo.networks import (
    alexnet,
    deeplab,
    digits,
    inception_bn,
    mobilenet_v2,
    resnet,
    seq2seq,
    ssd,
    transformer,
    vgg,
)


class Network(NamedTuple):
    """Makes a network with some number of outputs (classes or words)."""

    small: Callable[[int], nn.Module]  # trains in minutes on two cores
    published: Callable[[int], nn.Module] | None = None


NETWORKS: dict[str, Network] = {
    "convnet": Network(digits.ConvNet),
    "mlp": Network(digits.Mlp),
    "resnet": Network(digits.ResNet),
    "alexnet": Network(alexnet.small, alexnet.AlexNet),
    "vgg16": Network(vgg.small, vgg.Vgg),
    "inception-bn": Network(inception_bn.small, inception_bn.InceptionBn),
    "resnet18": Network(resnet.small18, resnet.ResNet18),
    "resnet50": Network(resnet.small50, resnet.ResNet50),
    "resnet152": Network(resnet.small152, resnet.ResNet152),
    "mobilenet-v2": Network(mobilenet_v2.small, mobilenet_v2.MobileNetV2),
    "ssd300": Network(ssd.small, ssd.Ssd),
    "deeplab-largefov": Network(deeplab.small, deeplab.DeepLab),
    "seq2seq-lstm": Network(partial(seq2seq.small, cell="lstm"), partial(seq2seq.Seq2Seq, cell="lstm")),
    "seq2seq-gru": Network(partial(seq2seq.small, cell="gru"), partial(seq2seq.Seq2Seq, cell="gru")),
    "transformer": Network(transformer.small, transformer.Transformer),
}
