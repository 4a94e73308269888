"""The training step and the prediction of a network at one precision, as pure functions to be compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from jax_apt.zoo.precisions import Precision


class Trained(NamedTuple):
    """What a step changes beside the precision state."""

    params: Any
    model_state: dict[str, Any]  # the network's other collections, such as "batch_stats"
    opt_state: Any


def make_forward(model) -> Callable:
    """A Linen module as a function of its parameters first.

    Returns:
      `forward(params, model_state, key, inputs, train)`: (outputs, new model state).
    """

    def forward(params, model_state, key, inputs, train: bool):
        variables = {"params": params, **model_state}
        if not train:
            return model.apply(variables, inputs, train=False), model_state
        mutable = list(model_state)
        return model.apply(variables, inputs, train=True, rngs={"dropout": key}, mutable=mutable)

    return forward


def make_step(
    precision: Precision, loss: Callable[[Any, Any], Array], optimizer: optax.GradientTransformation
) -> Callable:
    """`step(trained, state, key, number, inputs, labels)`: (trained, state, loss).

    `key` is the run's and `number` the step's; together they seed the step's dropout.
    """

    def step(trained: Trained, state, key: Array, number: Array, inputs, labels):
        dropout = jax.random.fold_in(key, number)

        def loss_fn(params, state):
            outputs, model_state = precision.apply(params, state, trained.model_state, dropout, inputs, True)
            return loss(outputs, labels), model_state

        value, gradients, state = precision.value_and_grad(loss_fn)(trained.params, state)
        mean_loss, model_state = value
        updates, opt_state = optimizer.update(gradients, trained.opt_state, trained.params)
        return Trained(optax.apply_updates(trained.params, updates), model_state, opt_state), state, mean_loss

    return step


def make_predictor(precision: Precision, predict: Callable) -> Callable:
    """`predictor(params, model_state, state, inputs)`: what the task predicts, with nothing updated."""

    def predictor(params, model_state, state, inputs):
        def apply(inputs):
            return precision.apply(params, state, model_state, jax.random.key(0), inputs, False)[0]

        return predict(apply, inputs)

    return predictor


def make_initializer(model, optimizer: optax.GradientTransformation) -> Callable:
    """`initialize(key, example)`: what a training starts from, the same at all precisions."""

    def initialize(key: Array, example) -> Trained:
        model_state = dict(model.init(key, example, train=False))
        params = model_state.pop("params")
        return Trained(params, model_state, optimizer.init(params))

    return initialize


def start(model, precision: Precision, optimizer, key: Array, example) -> tuple[Trained, Any]:
    """(parameters and the like, precision state); the former depend on the key alone."""
    trained = jax.jit(make_initializer(model, optimizer))(key, example)
    return trained, precision.init(trained.params, trained.model_state, key, example, True)
