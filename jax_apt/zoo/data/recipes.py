"""The published training recipes as configurations, from random initial values.

`source` names where each one's figures are from. Where a paper leaves something open, or trains until a
plateau, the figures are those of its released code or of torchvision's reference scripts (pytorch/vision,
references/classification/README.md), and the source says so. What differs from the publication:

- SSD300 and DeepLab were published with weights that had learnt ImageNet first; without those they end lower.
- DeepLab's last layer trained at ten times the rate of the others; here one rate serves all.
- Weight decay spares biases and the scales of normalization.
- Rates that were lowered "when the validation error stops improving" fall at fixed places.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """One network on one data set as its paper trains it."""

    network: str
    dataset: str  # "cifar10", "imagenet", "voc-detection", "voc-segmentation" or "text"
    source: str  # where the recipe is published
    image_size: int = 0
    batch_size: int
    epochs: int
    learning_rate: float
    drops: tuple[float, ...] = ()  # parts of the training after each of which the rate falls to a tenth
    decay: float = 1.0  # factor of the rate per epoch
    decay_after: int = 0  # epochs before the first such factor
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    algorithm: str = "sgd"  # "sgd", "rmsprop" or "adam"
    warmup_steps: int = 0  # of Adam with the rate 1/sqrt(step)
    clip: float = math.inf  # of the gradients' global norm
    network_options: dict = field(default_factory=dict)

    def schedule(self, steps_per_epoch: int) -> Callable:
        """step to learning rate."""
        if self.warmup_steps:
            return lambda step: self.learning_rate * _inverse_root(step + 1, self.warmup_steps)
        if self.decay != 1.0:
            begin = self.decay_after * steps_per_epoch
            return optax.exponential_decay(
                self.learning_rate, steps_per_epoch, self.decay, transition_begin=begin, staircase=True
            )
        total = self.epochs * steps_per_epoch
        return optax.piecewise_constant_schedule(
            self.learning_rate, {int(part * total): 0.1 for part in self.drops}
        )

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        rate, momentum = self.schedule(steps_per_epoch), self.momentum or None
        algorithms = {
            "sgd": lambda: optax.sgd(rate, momentum=momentum),
            "rmsprop": lambda: optax.rmsprop(rate, decay=0.9, eps=1.0, momentum=momentum),
            "adam": lambda: optax.adam(rate, b1=0.9, b2=0.98, eps=1e-9),
        }
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip < math.inf else []
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=_is_matrix))
        return optax.chain(*parts, algorithms[self.algorithm]())


def _inverse_root(step, warmup: int):
    """step^-0.5, after a linear rise over the warm-up (1706.03762, equation 3)."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(step**-0.5, step * warmup**-1.5)


def _is_matrix(params):
    """Weight decay spares biases and the scales of normalization."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _imagenet(network: str, source: str, **options) -> PublishedRecipe:
    defaults = {"image_size": 224, "batch_size": 256, "weight_decay": 1e-4}
    return PublishedRecipe(network=network, dataset="imagenet", source=source, **(defaults | options))


def _resnet(network: str) -> PublishedRecipe:
    source = "1512.03385, section 3.4; length and drops: torchvision's reference script (30, 60 of 90 epochs)"
    return _imagenet(network, source, epochs=90, learning_rate=0.1, drops=(1 / 3, 2 / 3))


def _seq2seq(network: str) -> PublishedRecipe:
    return PublishedRecipe(
        network=network,
        dataset="text",
        source="1508.04025, section 4.1, with dropout: the rate halves each epoch after the eighth",
        batch_size=128,
        epochs=12,
        learning_rate=1.0,
        decay=0.5,
        decay_after=8,
        momentum=0.0,
        clip=5.0,
    )


RECIPES: dict[str, PublishedRecipe] = {
    "resnet18-cifar10": PublishedRecipe(
        network="resnet18",
        dataset="cifar10",
        source="1512.03385, section 4.2: 64,000 steps of 50,000 images, drops at 32,000 and 48,000",
        image_size=32,
        batch_size=128,
        epochs=164,
        learning_rate=0.1,
        drops=(0.5, 0.75),
        weight_decay=1e-4,
        network_options={"is_stem_strided": False},
    ),
    "alexnet-imagenet": _imagenet(
        "alexnet",
        "Krizhevsky et al. 2012, section 5: about 90 epochs, three drops by hand",
        image_size=227,
        batch_size=128,
        epochs=90,
        learning_rate=0.01,
        drops=(0.33, 0.67, 0.9),
        weight_decay=5e-4,
    ),
    "vgg16-imagenet": _imagenet(
        "vgg16",
        "1409.1556, section 3.1: 74 epochs, three drops at plateaus",
        epochs=74,
        learning_rate=0.01,
        drops=(0.33, 0.67, 0.9),
        weight_decay=5e-4,
    ),
    "inception-bn-imagenet": _imagenet(
        "inception-bn",
        "1502.03167, section 4.2, BN-x5: five times the rate, a fifth of the weight decay; decay and length "
        "are ours",
        batch_size=32,
        epochs=14,
        learning_rate=0.0075,
        decay=0.75,
        weight_decay=1e-5,
    ),
    "resnet18-imagenet": _resnet("resnet18"),
    "resnet50-imagenet": _resnet("resnet50"),
    "resnet152-imagenet": _resnet("resnet152"),
    "mobilenet-v2-imagenet": _imagenet(
        "mobilenet-v2",
        "1801.04381, section 6.1; 300 epochs: torchvision's reference script",
        batch_size=96,
        epochs=300,
        learning_rate=0.045,
        decay=0.98,
        weight_decay=4e-5,
        algorithm="rmsprop",
    ),
    "ssd300-voc": PublishedRecipe(
        network="ssd300",
        dataset="voc-detection",
        source="1512.02325, section 3.1; the released solver: 120,000 steps of 16,551 images, drops at "
        "80,000 and 100,000",
        image_size=300,
        batch_size=32,
        epochs=232,
        learning_rate=1e-3,
        drops=(2 / 3, 5 / 6),
        weight_decay=5e-4,
    ),
    "deeplab-largefov-voc": PublishedRecipe(
        network="deeplab-largefov",
        dataset="voc-segmentation",
        source="1412.7062, section 5; 6,000 steps of 10,582 images, drops every 2,000",
        image_size=321,
        batch_size=20,
        epochs=12,
        learning_rate=1e-3,
        drops=(1 / 3, 2 / 3),
        weight_decay=5e-4,
    ),
    "seq2seq-lstm-text": _seq2seq("seq2seq-lstm"),
    "seq2seq-gru-text": _seq2seq("seq2seq-gru"),
    "transformer-text": PublishedRecipe(
        network="transformer",
        dataset="text",
        source="1706.03762, section 5; 100,000 steps of about 800 sentences",
        batch_size=800,
        epochs=18,
        learning_rate=512**-0.5,
        warmup_steps=4000,
        algorithm="adam",
        label_smoothing=0.1,
    ),
}
