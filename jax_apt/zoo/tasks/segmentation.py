"""Which digit, or none, each pixel of a scene belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_apt.zoo.metrics import mean_iou
from jax_apt.zoo.tasks import scenes
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task

STYLE = scenes.Style(size=48, digits=3, fragments=1, scale=(2.2, 3.2))
CLASSES = 11  # the background and ten digits
IGNORED = 255  # label of a pixel that does not count


def load(seed: int) -> Dataset:
    return scenes.load(seed, STYLE, copies=4, as_example=lambda s, labels: (s.images, s.masks))


def enlarge(logits: Array, size: tuple[int, ...]) -> Array:
    """Scores (batch, h, w, classes) of every few pixels, bilinearly at all pixels."""
    shape = (logits.shape[0], *size, logits.shape[-1])
    return jax.image.resize(logits, shape, "bilinear")


def pixel_cross_entropy(logits: Array, masks: Array) -> Array:
    """Mean over the pixels that count, of scores enlarged to the size of the masks (batch, H, W)."""
    logits, counts = enlarge(logits, masks.shape[1:3]), masks != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, masks, 0))
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1)


def predict_pixels(apply, images: Array) -> Array:
    """int32 (batch, height, width); -1 where a score is not finite."""
    logits = enlarge(apply(images), images.shape[1:3])
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), jnp.argmax(logits, axis=-1), -1)


def score(predicted: np.ndarray, masks: np.ndarray) -> float:
    return mean_iou(predicted, masks, CLASSES)


SEGMENTATION = Task(
    name="segmentation",
    kind="segmentation",
    metric="mean IoU",
    networks=("deeplab-largefov",),
    recipe=Recipe(epochs=24, batch_size=16, learning_rate=3e-3, warmup=0.05),
    load=load,
    outputs=CLASSES,
    loss=pixel_cross_entropy,
    score=score,
    predict=predict_pixels,
)
