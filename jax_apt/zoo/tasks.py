"""Tasks: data that need no download, a loss and a metric.

A task is one `Task` object in `TASKS`; networks do not know of it beyond the shape of its inputs.
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

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled whole batches; the order depends on seed and epoch alone."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.train_labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield self.train_inputs[rows], self.train_labels[rows]


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored."""

    name: str
    load: Callable[[], Dataset]
    classes: int
    loss: Callable[[Array, Array], Array]  # (outputs, labels) -> scalar
    score: Callable[[Array, Array], Array]  # (outputs, labels) -> points, 0..100


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits (8 x 8, 1797 images), half for training and half for testing."""
    from sklearn.datasets import load_digits as load

    digits = load()
    inputs = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    return Dataset(inputs[train], labels[train], inputs[test], labels[test])


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross entropy of logits (batch, classes) and labels (batch,)."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def top1(logits: Array, labels: Array) -> Array:
    """Share of correct first guesses, in points."""
    return 100 * jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


TASKS = {"digits": Task("digits", load_digits, 10, cross_entropy, top1)}
