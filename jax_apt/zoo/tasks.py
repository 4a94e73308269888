"""Tasks: data that need no download, a loss and a metric.

A task is one `Task` in `TASKS`. Networks know of it no more than the number of outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array


@dataclass(frozen=True)
class Dataset:
    """Arrays of a task; the leading axis counts examples."""

    train_inputs: np.ndarray  # float32 (examples, height, width, channels)
    train_labels: np.ndarray  # int32 (examples,)
    test_inputs: np.ndarray
    test_labels: np.ndarray
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled, augmented whole batches; they depend on seed and epoch alone."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.train_labels))
        inputs, labels = self.augment(self.train_inputs[order], rng), self.train_labels[order]
        for start in range(0, len(order) - size + 1, size):
            yield inputs[start : start + size], labels[start : start + size]


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored."""

    name: str
    load: Callable[[int], Dataset]  # seed -> data; the sizes are the same for every seed
    outputs: int  # of the network
    loss: Callable[[Array, Array], Array]  # (outputs, labels) -> scalar
    score: Callable[[Array, Array], Array]  # (outputs, labels) -> points, 0..100


# Digits

NOISE = 0.1  # of the range of a pixel: float32 stays clearly below 100 points
FOLDS = 10
TEST_COPIES = 8  # distortions of each test image, so that one image weighs less than 0.1 points


def load_digits(seed: int) -> Dataset:
    """scikit-learn's handwritten digits (8 x 8, 1797 images), shifted and noisy.

    Seed k tests on tenth k (mod 10) of the images and trains on the others, so that seeds differ
    in the split too. Test images are distorted once and for all.
    """
    from sklearn import datasets

    pixels, labels = map(np.asarray, datasets.load_digits(return_X_y=True))
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    size = len(order) // FOLDS
    order = np.roll(order[: size * FOLDS], -size * (seed % FOLDS))
    test, train = np.tile(order[:size], TEST_COPIES), order[size:]
    test_images = distort(images[test], np.random.default_rng(0))
    return Dataset(images[train], labels[train], test_images, labels[test], distort)


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


def top1(logits: Array, labels: Array) -> Array:
    """Share of correct first guesses, in points; 0 if an output is not finite."""
    share = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return jnp.where(jnp.all(jnp.isfinite(logits)), 100 * share, 0.0)


TASKS = {"digits": Task("digits", load_digits, 10, cross_entropy, top1)}
