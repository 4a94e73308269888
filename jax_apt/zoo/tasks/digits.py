"""Handwritten digits: 8 x 8 images of scikit-learn, shifted and noisy."""

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_apt.zoo.metrics import top1
from jax_apt.zoo.tasks.task import Dataset, Recipe, Task

NOISE = 0.1  # of the range of a pixel: float32 stays clearly below 100 points
FOLDS = 10
TEST_COPIES = 8  # distortions of each test image, so that one image weighs less than 0.1 points


def split(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(training images, their labels, test images, their labels) of scikit-learn's 1797 digits.

    Seed k tests on tenth k (mod 10) of the images and trains on the others, so that seeds differ
    in the split too. Images are float32 (examples, 8, 8, 1) in 0..1.
    """
    from sklearn import datasets

    pixels, labels = map(np.asarray, datasets.load_digits(return_X_y=True))
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    size = len(order) // FOLDS
    order = np.roll(order[: size * FOLDS], -size * (seed % FOLDS))
    test, train = order[:size], order[size:]
    return images[train], labels[train], images[test], labels[test]


def load_digits(seed: int) -> Dataset:
    """Training images are distorted anew in each epoch, test images once and for all."""
    train, train_labels, test, test_labels = split(seed)
    test, test_labels = (np.tile(a, (TEST_COPIES,) + (1,) * (a.ndim - 1)) for a in (test, test_labels))
    test = distort(test, np.random.default_rng(0))
    return Dataset(train, train_labels, test, test_labels, _distort_examples)


def _distort_examples(images, labels, rng):
    return distort(images, rng), labels


def distort(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves each image (height, width, channels) by up to a pixel and adds Gaussian noise."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, right = rng.integers(0, 3, (2, count, 1, 1))
    rows, columns = down + np.arange(height)[:, None], right + np.arange(width)
    moved = padded[np.arange(count)[:, None, None], rows, columns]
    return moved + np.float32(NOISE) * rng.standard_normal(images.shape, np.float32)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross entropy of logits (batch, classes) and labels (batch,)."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


DIGITS = Task(
    name="digits",
    kind="classification",
    metric="top-1",
    networks=("convnet", "mlp", "resnet"),
    recipe=Recipe(epochs=24, batch_size=32, learning_rate=1e-2, timed_pairs=200),
    load=load_digits,
    outputs=10,
    loss=cross_entropy,
    score=top1,
)
