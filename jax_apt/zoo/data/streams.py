"""Shuffled, augmented, resumable batches from a random-access source, through Grain."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

Example = dict[str, np.ndarray]


def training_stream(
    source,
    transform: Callable[[Example, np.random.Generator], Any],
    batch_size: int,
    seed: int,
    threads: int = 8,
):
    """Endless batches, in another order and with other augmentations in every epoch.

    Several processes (`jax.distributed`) read disjoint shares of the data and of each batch.

    Args:
      source: `len(source)` examples, `source[i]` one of them.
      transform: (example, rng) to what is batched.
      batch_size: examples per step, over all processes.
      seed: of order and augmentation.
      threads: that read ahead.

    Returns:
      A Grain iterator: `next`, `get_state` and `set_state`, which resumes at that very batch.

    Raises:
      ValueError: there are fewer examples than a batch has, or the processes cannot share a batch.
    """
    processes, index = jax.process_count(), jax.process_index()
    if batch_size > len(source):
        raise ValueError(f"batch_size must be at most the {len(source)} examples, got {batch_size}")
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()[index::processes]
    dataset = dataset.repeat().random_map(transform).batch(batch_size // processes, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads)))


def evaluation_batches(
    source, transform: Callable[[Example], Any], batch_size: int
) -> Iterator[tuple[Any, int]]:
    """(batch, examples that count) over the whole source in order; the last batch repeats its end."""
    for start in range(0, len(source), batch_size):
        count = min(batch_size, len(source) - start)
        examples = [transform(source[i]) for i in range(start, start + count)]
        examples += [examples[-1]] * (batch_size - count)
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *examples), count
