"""One training run, in float32 or in adaptive fixed point, with everything else the same."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_apt as apt
from jax_apt.zoo.networks import NETWORKS
from jax_apt.zoo.tasks import TASKS, Dataset

PRECISIONS = ("float32", "apt")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on, apart from network, seed and precision."""

    task: str = "digits"
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    mode: str = "grow"
    widths: tuple[int, ...] = (8, 16, 24)
    backend: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"widths": list(self.widths)}


class Trainer:
    """A network on a task, with one compiled step per precision for all seeds."""

    def __init__(self, network: str, settings: Settings, data: Dataset):
        task = TASKS[settings.task]
        self.network, self.settings, self.data, self.task = network, settings, data, task
        self.steps_per_epoch = len(data.train_labels) // settings.batch_size
        self.model = NETWORKS[network](task.classes)
        self.optimizer = optax.adam(settings.learning_rate)
        self.quantized = apt.apt_quantize(
            self.model.apply,
            [apt.Rule("", grads=apt.Adaptive(*settings.widths))],
            config=apt.Config(steps_per_epoch=self.steps_per_epoch, mode=settings.mode),
            backend=settings.backend,
        )
        self.steps = {"float32": jax.jit(self._float32_step), "apt": jax.jit(self._apt_step)}
        self.scores = {"float32": jax.jit(self._float32_score), "apt": jax.jit(self._apt_score)}

    def start(self, seed: int):
        """(variables, optimizer state, precision state); the same values for both precisions."""
        example = self.data.train_inputs[: self.settings.batch_size]
        variables = self.model.init(jax.random.key(seed), example)
        return variables, self.optimizer.init(variables), self.quantized.init(variables, example)

    def run(self, seed: int, precision: str, on_step: Callable[[], None]) -> dict[str, Any]:
        """Trains from scratch. Returns the run's scores, losses, and for "apt" widths and ranges by step."""
        variables, opt_state, state = self.start(seed)
        losses, scores, formats = [], [], []
        for epoch in range(self.settings.epochs):
            for inputs, labels in self.data.batches(self.settings.batch_size, seed, epoch):
                variables, opt_state, state, loss = self.steps[precision](
                    variables, opt_state, state, inputs, labels
                )
                losses.append(loss)
                formats.append((state.precision.bits, state.precision.exponent))
                on_step()
            scores.append(self.scores[precision](variables, state))
        result = {
            "score": float(scores[-1]),
            "scores": [float(s) for s in scores],
            "losses": np.asarray(jnp.stack(losses)).astype(float).round(6).tolist(),
        }
        if precision == "apt":
            report = self.quantized.report(state).to_dict()
            result |= {"report": report, "history": _history(report, formats)}
        return result

    def step_times(self, repeats: int = 40) -> dict[str, float]:
        """Median seconds of a compiled step at each precision, taken alternately."""
        inputs, labels = next(self.data.batches(self.settings.batch_size, 0, 0))
        current = {p: (*self.start(0), None) for p in PRECISIONS}
        seconds: dict[str, list[float]] = {p: [] for p in PRECISIONS}
        for i in range(repeats + 3):
            for p in PRECISIONS:
                began = time.perf_counter()
                current[p] = jax.block_until_ready(self.steps[p](*current[p][:3], inputs, labels))
                if i >= 3:
                    seconds[p].append(time.perf_counter() - began)
        return {p: float(np.median(s)) for p, s in seconds.items()}

    # Compiled functions

    def _float32_step(self, variables, opt_state, state, inputs, labels):
        def loss_fn(variables):
            return self.task.loss(self.model.apply(variables, inputs), labels)

        loss, gradients = jax.value_and_grad(loss_fn)(variables)
        return *self._descend(variables, opt_state, gradients), state, loss

    def _apt_step(self, variables, opt_state, state, inputs, labels):
        def loss_fn(variables, state):
            return self.task.loss(self.quantized.apply(variables, state, inputs), labels)

        loss, gradients, state = apt.value_and_grad(loss_fn, self.quantized)(variables, state)
        return *self._descend(variables, opt_state, gradients), state, loss

    def _descend(self, variables, opt_state, gradients):
        updates, opt_state = self.optimizer.update(gradients, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state

    def _float32_score(self, variables, state):
        return self.task.score(self.model.apply(variables, self.data.test_inputs), self.data.test_labels)

    def _apt_score(self, variables, state):
        outputs = self.quantized.apply(variables, state, self.data.test_inputs)
        return self.task.score(outputs, self.data.test_labels)


def _history(report: dict, formats: list) -> dict[str, dict[str, list[int]]]:
    """Bits and exponent of each layer's output gradient at every step."""
    bits = np.stack([np.asarray(b) for b, _ in formats])
    exponents = np.stack([np.asarray(e) for _, e in formats])
    return {
        layer["name"]: {
            "bits": bits[:, 3 * i + 2].tolist(),
            "exponent": exponents[:, 3 * i + 2].tolist(),
        }
        for i, layer in enumerate(report["layers"])
    }
