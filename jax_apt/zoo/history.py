"""The formats of gradients over a training, kept as their changes: between two updates nothing moves."""

from collections.abc import Sequence

import numpy as np

from jax_apt.state import AptState

Changes = dict[str, list[int]]  # "steps" at which "bits" or "exponent" took a new value; the first is 0


def gradient_history(states: Sequence[AptState]) -> dict[str, Changes]:
    """Changes of each layer's output gradient, from the state after every step.

    A layer that holds a precision per slice counts with the greatest one.
    """
    bits = np.stack([state.precision.bits for state in states])  # (steps, tensors)
    exponents = np.stack([state.precision.exponent for state in states])
    return {
        layer.name: changes(*(_greatest_gradient(table[:, rows]) for table in (bits, exponents)))
        for layer, rows in states[0].layout.rows()
    }


def _greatest_gradient(table: np.ndarray) -> np.ndarray:
    """(steps,) from the rows x, w, dy of each slice of a layer."""
    return table.reshape(len(table), -1, 3)[:, :, 2].max(1)


def changes(bits: np.ndarray, exponents: np.ndarray) -> Changes:
    """From a value per step."""
    moves = (np.diff(bits) != 0) | (np.diff(exponents) != 0)
    steps = np.concatenate([[0], 1 + np.flatnonzero(moves)])
    return {"steps": steps.tolist(), "bits": bits[steps].tolist(), "exponent": exponents[steps].tolist()}


def per_step(kept: Changes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits, exponents), each with a value for each of `count` steps."""
    lengths = np.diff([*kept["steps"], count])
    return np.repeat(kept["bits"], lengths), np.repeat(kept["exponent"], lengths)
