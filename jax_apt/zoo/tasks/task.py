"""What a task is: data, a loss, predictions and a metric. Networks know of it the number of outputs alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters that all networks of a task share; float32 and fixed point train with the same."""

    epochs: int
    batch_size: int
    learning_rate: float  # of Adam; it falls to 0 along a cosine
    warmup: float = 0.0  # part of the training in which the learning rate rises to that
    timed_pairs: int = 10  # steps of each precision that are timed


@dataclass(frozen=True)
class Dataset:
    """Examples of a task: pytrees of arrays whose leading axis counts them.

    What is augmented may differ from what is stored: scenes are drawn anew from the same strokes.
    """

    train_inputs: Any
    train_labels: Any
    test_inputs: Any  # as the network takes them
    test_labels: Any
    augment: Callable[[Any, Any, np.random.Generator], tuple[Any, Any]]  # (inputs, labels, rng)
    is_augmented_by_batch: bool = False  # each batch when it is asked for, in place of the whole epoch

    def __len__(self) -> int:
        """Training examples in an epoch."""
        return len(jax.tree.leaves(self.train_labels)[0])

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Shuffled, augmented whole batches; they depend on seed and epoch alone."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self))
        examples = take((self.train_inputs, self.train_labels), order)
        if not self.is_augmented_by_batch:
            examples = self.augment(examples[0], examples[1], rng)
        for start in range(0, len(order) - size + 1, size):
            inputs, labels = take(examples, slice(start, start + size))
            yield self.augment(inputs, labels, rng) if self.is_augmented_by_batch else (inputs, labels)


def take(tree: Any, index) -> Any:
    """The examples of a pytree that an index selects."""
    return jax.tree.map(lambda array: array[index], tree)


def outputs_as_they_are(apply: Callable[[Any], Any], inputs: Any) -> Any:
    return apply(inputs)


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored."""

    name: str
    kind: str  # "classification", "detection", "segmentation" or "translation"
    metric: str  # what the score is, in points from 0 to 100
    networks: tuple[str, ...]
    recipe: Recipe
    load: Callable[[int], Dataset]  # seed -> data; the sizes are the same for every seed
    outputs: int  # of the network
    loss: Callable[[Any, Any], Array]  # (outputs, labels) -> scalar
    score: Callable[[Any, Any], float | Array]  # (predictions, labels) of the whole test set -> points
    predict: Callable[[Callable, Any], Any] = outputs_as_they_are  # (apply, inputs) -> predictions
