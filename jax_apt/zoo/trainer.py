"""One training run at one precision, with everything else the same as at the others."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_apt.zoo.history import gradient_history
from jax_apt.zoo.networks import NETWORKS
from jax_apt.zoo.precisions import (
    ALL_PRECISIONS,
    PRECISIONS,
    Precision,
    Settings,
    adaptive_config,
    make_precision,
)
from jax_apt.zoo.steps import Trained, make_forward, make_initializer, make_predictor, make_step
from jax_apt.zoo.tasks import TASKS, Dataset
from jax_apt.zoo.tasks.task import take

EVALUATED = 256  # test examples that are predicted at once
CURVE_POINTS = 6  # scores in a training: those of translations take as long as an epoch


class Trainer:
    """A network on a task: its initialization and a step per precision are compiled once for all seeds."""

    def __init__(self, network: str, settings: Settings):
        self.settings, self.task = settings, TASKS[settings.task]
        self.steps_per_epoch = count_steps(settings)
        self.model = NETWORKS[network].small(self.task.outputs)
        self.optimizer = optax.adam(schedule(settings, self.steps_per_epoch))
        self.initialize = jax.jit(make_initializer(self.model, self.optimizer))
        self.initial_states: dict[str, Any] = {}  # by precision; a function of shapes alone
        self.forward = make_forward(self.model)
        self.precisions: dict[str, Precision] = {}
        self.steps: dict[str, Callable] = {}
        self.predictors: dict[str, Callable] = {}
        for name in ALL_PRECISIONS:
            self.add(name, make_precision(name, self.forward, settings, self.steps_per_epoch))

    def add(self, name: str, precision: Precision) -> None:
        """A precision of `forward`, to run by this name."""
        self.precisions[name] = precision
        # The precision state is not donated: a run keeps all of them for its history.
        step = make_step(precision, self.task.loss, self.optimizer)
        self.steps[name] = jax.jit(step, donate_argnums=0)
        self.predictors[name] = jax.jit(make_predictor(precision, self.task.predict))

    def start(self, seed: int, precision: str, data: Dataset) -> tuple[Trained, Any]:
        """(parameters and the like, precision state); the former depend on the seed alone."""
        example = take(data.test_inputs, np.arange(self.settings.batch_size) % EVALUATED)
        key = jax.random.key(seed)
        trained = self.initialize(key, example)
        if precision not in self.initial_states:
            arguments = trained.params, trained.model_state, key, example, True
            self.initial_states[precision] = self.precisions[precision].init(*arguments)
        return trained, self.initial_states[precision]

    def run(self, seed: int, precision: str, on_step: Callable[[], None]) -> dict[str, Any]:
        """Trains from scratch.

        Returns:
          "score" in points after the last epoch, "scores" after the "scored_epochs", mean training "losses"
          by epoch (None where not finite), and in fixed point the "report" and the "history" of the
          gradients' formats.
        """
        data, key = self.task.load(seed), jax.random.key(seed)
        trained, state = self.start(seed, precision, data)
        scored_epochs = _scored_epochs(self.settings.epochs)
        scores, losses, states = [], [], []
        for epoch in range(self.settings.epochs):
            epoch_losses = []
            for batch in data.batches(self.settings.batch_size, seed, epoch):
                number = jnp.int32(len(states))
                trained, state, loss = self.steps[precision](trained, state, key, number, *batch)
                epoch_losses.append(loss)
                states.append(state)
                on_step()
            losses.append(float(np.mean(jax.device_get(epoch_losses))))
            if epoch + 1 in scored_epochs:
                scores.append(self.score(precision, trained, state, data))
        curves = {"scored_epochs": scored_epochs, "scores": scores, "losses": list(map(_finite, losses))}
        result = {"score": scores[-1], "steps": len(states), **curves}
        report = self.precisions[precision].report(state)
        return result if report is None else result | {"report": report, "history": gradient_history(states)}

    def score(self, precision: str, trained: Trained, state, data: Dataset) -> float:
        """The task's metric over the whole test set, in points."""
        count, parts = len(jax.tree.leaves(data.test_labels)[0]), []
        size = min(count, EVALUATED)
        for first in range(0, count, size):
            inputs = take(data.test_inputs, np.arange(first, first + size) % count)
            part = self.predictors[precision](trained.params, trained.model_state, state, inputs)
            parts.append(jax.device_get(part))
        predicted = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
        return float(self.task.score(predicted, data.test_labels))

    def step_times(self, precisions: Sequence[str] = PRECISIONS, pairs: int | None = None) -> dict[str, Any]:
        """Wall time of the compiled step at each precision, in milliseconds.

        All train with seed 0; after a warm-up of half of the training, at most three times as many
        steps as are timed, one step of each is timed in turn.
        """
        data, key = self.task.load(0), jax.random.key(0)
        pairs = pairs or self.task.recipe.timed_pairs
        current = {p: self.start(0, p, data) for p in precisions}
        milliseconds: dict[str, list[float]] = {p: [] for p in precisions}
        warm_up = min(math.ceil(self.settings.epochs * self.steps_per_epoch / 2), 3 * pairs)
        batches = self._endless_batches(data)
        for i in range(warm_up + pairs):
            batch = next(batches)
            for p in precisions:
                began = time.perf_counter()
                done = self.steps[p](*current[p], key, jnp.int32(i), *batch)
                current[p] = jax.block_until_ready(done)[:2]
                if i >= warm_up:
                    milliseconds[p].append(1e3 * (time.perf_counter() - began))
        return {p: _quartiles(milliseconds[p]) for p in precisions} | {"pairs": pairs}

    def _endless_batches(self, data: Dataset):
        epoch = 0
        while True:
            yield from data.batches(self.settings.batch_size, 0, epoch)
            epoch += 1


def schedule(settings: Settings, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate: a linear rise over the warm-up, a cosine down to 0."""
    steps = settings.epochs * steps_per_epoch
    if settings.warmup == 0:
        return optax.cosine_decay_schedule(settings.learning_rate, steps)
    rise = math.ceil(settings.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, rise, steps)


def settings_for(task: str, **chosen) -> Settings:
    """The task's hyper-parameters, apart from what is chosen (None: not chosen)."""
    recipe = asdict(TASKS[task].recipe)
    recipe.pop("timed_pairs")
    given = {name: value for name, value in chosen.items() if value is not None}
    return Settings(task=task, **(recipe | given))


def count_steps(settings: Settings) -> int:
    """Training steps per epoch; 0 if the batch is larger than the training data."""
    return count_examples(settings.task) // settings.batch_size


@functools.cache
def count_examples(task: str) -> int:
    """Training examples in an epoch, the same for every seed."""
    return len(TASKS[task].load(0))


def describe_config(settings: Settings) -> dict[str, Any]:
    """JSON-serializable constants of the method, as the runs use them."""
    config = adaptive_config(settings, count_steps(settings))
    return asdict(config) | {"initial_steps": config.initial_steps}


def _scored_epochs(epochs: int) -> list[int]:
    """Counted from 1; the last one is among them."""
    return np.unique(np.linspace(0, epochs, CURVE_POINTS + 1).round().astype(int))[1:].tolist()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}
