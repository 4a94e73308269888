"""One training run, in float32 or in adaptive fixed point, with everything else the same."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import jax_apt as apt
from jax_apt.zoo.networks import NETWORKS
from jax_apt.zoo.tasks import TASKS, Dataset


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on, apart from network, seed and precision."""

    task: str = "digits"
    epochs: int = 24
    batch_size: int = 32
    learning_rate: float = 1e-2  # at the start; it falls to 0 along a cosine
    mode: Literal["grow", "restart"] = "grow"
    widths: tuple[int, ...] = (8, 16, 24)
    # Published code: 0.1, of an epoch of thousands of steps. 0.1 of the 50 steps here freezes
    # formats while activations still grow, and they clip: one convnet of five seeds ends 27 points
    # lower, another 4. The mlp (-0.3 points on average) and the resnet (+0.3) do not need it.
    initial_fraction: float = 1.0
    backend: apt.Backend = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"widths": list(self.widths)}


# Precisions


class Precision(NamedTuple):
    """All in which the two runs of a pair differ."""

    init: Callable  # (variables, inputs) -> state
    apply: Callable  # (variables, state, inputs) -> outputs
    value_and_grad: Callable  # loss_fn -> (variables, state) -> (loss, gradients, state)
    report: Callable  # state -> report as a dictionary, or None


def float32(apply: Callable) -> Precision:
    """The function as it is; its state is None."""

    def value_and_grad(loss_fn):
        def with_state(variables, state):
            return *jax.value_and_grad(loss_fn)(variables, state), state

        return with_state

    def ignoring_state(variables, state, inputs):
        return apply(variables, inputs)

    return Precision(lambda *_: None, ignoring_state, value_and_grad, lambda _: None)


def adaptive(apply: Callable, settings: Settings, steps_per_epoch: int) -> Precision:
    """The function in adaptive fixed point; its state is an `AptState`."""
    quantized = apt.apt_quantize(
        apply,
        [apt.Rule("", grads=apt.Adaptive(*settings.widths))],
        config=adaptive_config(settings, steps_per_epoch),
        backend=settings.backend,
    )
    return Precision(
        quantized.init,
        quantized.apply,
        lambda loss_fn: apt.value_and_grad(loss_fn, quantized),
        lambda state: quantized.report(state).to_dict(),
    )


def adaptive_config(settings: Settings, steps_per_epoch: int) -> apt.Config:
    """The method's constants: published ones, apart from what the settings name."""
    return apt.Config(
        steps_per_epoch=steps_per_epoch,
        mode=settings.mode,
        initial_fraction=settings.initial_fraction,
    )


PRECISIONS = ("float32", "apt")


# Runs


class Trainer:
    """A network on a task, with one compiled step per precision for all seeds."""

    def __init__(self, network: str, settings: Settings):
        self.settings, self.task = settings, TASKS[settings.task]
        self.steps_per_epoch = count_steps(settings)
        self.model = NETWORKS[network](self.task.outputs)
        steps = settings.epochs * self.steps_per_epoch
        self.optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, steps))
        self.precisions = {
            "float32": float32(self.model.apply),
            "apt": adaptive(self.model.apply, settings, self.steps_per_epoch),
        }
        self.init = jax.jit(self.model.init)
        self.steps = {p: self._compiled_step(self.precisions[p]) for p in PRECISIONS}
        self.scores = {p: self._compiled_score(self.precisions[p]) for p in PRECISIONS}

    def _compiled_step(self, precision: Precision) -> Callable:
        def step(variables, opt_state, state, inputs, labels):
            def loss_fn(variables, state):
                return self.task.loss(precision.apply(variables, state, inputs), labels)

            loss, gradients, state = precision.value_and_grad(loss_fn)(variables, state)
            updates, opt_state = self.optimizer.update(gradients, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state, state, loss

        # The precision state is not donated: a run keeps all of them for its history.
        return jax.jit(step, donate_argnums=(0, 1))

    def _compiled_score(self, precision: Precision) -> Callable:
        def score(variables, state, inputs, labels):
            return self.task.score(precision.apply(variables, state, inputs), labels)

        return jax.jit(score)

    def start(self, seed: int, precision: str, data: Dataset):
        """(variables, optimizer state, precision state); variables depend on the seed alone."""
        example = data.train_inputs[: self.settings.batch_size]
        variables = self.init(jax.random.key(seed), example)
        state = self.precisions[precision].init(variables, example)
        return variables, self.optimizer.init(variables), state

    def run(self, seed: int, precision: str, on_step: Callable[[], None]) -> dict[str, Any]:
        """Trains from scratch.

        Returns:
          "score" in points after the last epoch, "scores" and mean training "losses" by epoch (None
          where not finite), and for "apt" the "report" and the "history" of the gradients' formats.
        """
        data = self.task.load(seed)
        current = self.start(seed, precision, data)
        scores, losses, states = [], [], []
        for epoch in range(self.settings.epochs):
            epoch_losses = []
            for batch in data.batches(self.settings.batch_size, seed, epoch):
                *current, loss = self.steps[precision](*current, *batch)
                epoch_losses.append(loss)
                states.append(current[2])
                on_step()
            losses.append(float(np.mean(jax.device_get(epoch_losses))))
            variables, _, state = current
            test = (data.test_inputs, data.test_labels)
            scores.append(float(self.scores[precision](variables, state, *test)))
        result = {"score": scores[-1], "scores": scores, "losses": list(map(_finite, losses))}
        report = self.precisions[precision].report(current[2])
        return result if report is None else result | {"report": report, "history": history(states)}

    def step_times(self, pairs: int = 200) -> dict[str, Any]:
        """Wall time of the compiled step at each precision, in milliseconds.

        Both train with seed 0; from half of the training on, one step of each is timed in turn.
        """
        data = self.task.load(0)
        current = {p: list(self.start(0, p, data)) for p in PRECISIONS}
        milliseconds: dict[str, list[float]] = {p: [] for p in PRECISIONS}
        warm_up = math.ceil(self.settings.epochs * self.steps_per_epoch / 2)
        batches = self._endless_batches(data)
        for i in range(warm_up + pairs):
            batch = next(batches)
            for p in PRECISIONS:
                began = time.perf_counter()
                *current[p], _ = jax.block_until_ready(self.steps[p](*current[p], *batch))
                if i >= warm_up:
                    milliseconds[p].append(1e3 * (time.perf_counter() - began))
        return {p: _quartiles(milliseconds[p]) for p in PRECISIONS} | {"pairs": pairs}

    def _endless_batches(self, data: Dataset):
        epoch = 0
        while True:
            yield from data.batches(self.settings.batch_size, 0, epoch)
            epoch += 1


def count_steps(settings: Settings) -> int:
    """Training steps per epoch; 0 if the batch is larger than the training data."""
    return len(TASKS[settings.task].load(0).train_labels) // settings.batch_size


def describe_config(settings: Settings) -> dict[str, Any]:
    """JSON-serializable constants of the method, as the runs use them."""
    config = adaptive_config(settings, count_steps(settings))
    return asdict(config) | {"initial_steps": config.initial_steps}


def history(states: list[apt.AptState]) -> dict[str, dict[str, list[int]]]:
    """Bits and exponent of each layer's output gradient after every step."""

    def gradient_formats(state):
        tensors = {name: state[name]["dy"] for name in state.layout.names()}
        return {name: {"bits": t.bits, "exponent": t.exponent} for name, t in tensors.items()}

    stacked = jax.tree.map(lambda *values: np.stack(values), *states)
    formats = jax.vmap(gradient_formats)(stacked)
    formats = jax.tree.map(lambda values: np.asarray(values).tolist(), formats)
    return {name: formats[name] for name in states[0].layout.names()}  # as in the network


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}
