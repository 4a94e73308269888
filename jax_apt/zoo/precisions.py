"""The precisions that are compared: all in which the runs of a pair differ."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax

import jax_apt as apt


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on, apart from network, seed and precision."""

    task: str = "digits"
    epochs: int = 24
    batch_size: int = 32
    learning_rate: float = 1e-2  # the greatest; it falls to 0 along a cosine
    warmup: float = 0.0  # part of the training in which the learning rate rises to that
    mode: Literal["grow", "restart"] = "grow"
    widths: tuple[int, ...] = (8, 16, 24)
    # Published code: 0.1, of an epoch of thousands of steps. 0.1 of the 50 steps here freezes
    # formats while activations still grow, and they clip: one convnet of five seeds ends 27 points
    # lower, another 4. The mlp (-0.3 points on average) and the resnet (+0.3) do not need it.
    initial_fraction: float = 1.0
    backend: apt.Backend = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"widths": list(self.widths)}


class Variant(NamedTuple):
    """In what a precision differs from the library's default."""

    widths: tuple[int, ...] | None = None  # of the gradients; None: those of the settings
    rounding: Literal["nearest", "stochastic"] = "stochastic"  # of the gradients


VARIANTS = {
    "apt": Variant(),
    "apt-nearest": Variant(rounding="nearest"),
    "int8": Variant((8,)),
    "int8-nearest": Variant((8,), "nearest"),
    "apt-14": Variant((8, 14, 16, 24)),
    "int16": Variant((16,)),
}
PRECISIONS = ("float32", "apt")
ALL_PRECISIONS = ("float32", *VARIANTS)
LABELS = {
    "float32": "float32",
    "apt": "APT",
    "apt-nearest": "APT, gradients rounded to nearest (as published)",
    "apt-14": "APT 8/14/16/24",
    "int8": "int8 gradients",
    "int8-nearest": "int8 gradients rounded to nearest",
    "int16": "int16 gradients",
}


class Precision(NamedTuple):
    """A network's function at one precision."""

    init: Callable  # (params, *args) -> state
    apply: Callable  # (params, state, *args) -> result
    value_and_grad: Callable  # loss_fn -> (params, state) -> ((loss, aux), gradients, state)
    report: Callable  # state -> report as a dictionary, or None


def make_precision(name: str, apply: Callable, settings: Settings, steps_per_epoch: int) -> Precision:
    """One of `ALL_PRECISIONS` for `apply(params, *args)`."""
    if name == "float32":
        return float32(apply)
    variant, config = VARIANTS[name], adaptive_config(settings, steps_per_epoch)
    variant = variant._replace(widths=variant.widths or settings.widths)
    return adaptive(apply, variant, config, settings.backend)


def float32(apply: Callable) -> Precision:
    """The function as it is; its state is None."""

    def value_and_grad(loss_fn):
        def with_state(params, state):
            return *jax.value_and_grad(loss_fn, has_aux=True)(params, state), state

        return with_state

    def ignoring_state(params, state, *args):
        return apply(params, *args)

    return Precision(lambda *_: None, ignoring_state, value_and_grad, lambda _: None)


def adaptive(
    apply: Callable,
    variant: Variant,
    config: apt.Config,
    backend: apt.Backend,
    rules: Sequence[apt.Rule] = (),
) -> Precision:
    """The function in adaptive fixed point; its state is an `AptState`. The rules go before that for all."""
    widths = variant.widths or Settings.widths
    rules = [*rules, apt.Rule("", grads=apt.Adaptive(*widths), rounding=variant.rounding)]
    quantized = apt.apt_quantize(apply, rules, config=config, backend=backend)
    return Precision(
        quantized.init,
        quantized.apply,
        lambda loss_fn: apt.value_and_grad(loss_fn, quantized, has_aux=True),
        lambda state: quantized.report(state).to_dict(),
    )


def adaptive_config(settings: Settings, steps_per_epoch: int) -> apt.Config:
    """The method's constants: published ones, apart from what the settings name."""
    return apt.Config(
        steps_per_epoch=steps_per_epoch,
        mode=settings.mode,
        initial_fraction=settings.initial_fraction,
    )
