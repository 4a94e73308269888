"""Flax NNX: a module that computes in adaptive fixed point, and a `value_and_grad` that trains it.

A thin layer over `nnx.split`, `apt_quantize` and `nnx.merge`; it works in NNX's graph mode and in its tree
mode. The precision state is one more Variable of the module, so `nnx.jit`, `nnx.state` and checkpoints carry
it along. Whatever a call changes in the module or in its arguments (BatchNorm's statistics, the counters of
`nnx.Rngs`) is written back, as NNX itself does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from flax.nnx import filterlib

from jax_apt import residuals
from jax_apt.config import Backend, Config, Recompute, Rule, check_recompute
from jax_apt.report import Report, make_report
from jax_apt.state import update, zero_taps
from jax_apt.transform import apt_quantize


class Precision(nnx.Variable):
    """Holds the `AptState` of a `Quantized` module; no optimizer touches it."""


class Quantized(nnx.Module):
    """An NNX module whose products run in adaptive fixed point; called like the module itself.

    Layers are named by their path in `model`: "conv/kernel" is layer "conv".

    Args:
      model: the module, unmodified; it is shared, not copied.
      *args, **kwargs: what `model` is called with, arrays or `jax.ShapeDtypeStruct`; only shapes matter.
      rules, config, backend: as in `apt_quantize`.

    Raises:
      TypeError: `model` is no NNX module, or a product cannot be quantized; the message has your line.

    >>> import jax.numpy as jnp
    >>> model = Quantized(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)), backend="xla")
    >>> model(jnp.ones((4, 3))).shape
    (4, 2)
    """

    def __init__(
        self,
        model: Any,
        *args,
        rules: Sequence[Rule] = (),
        config: Config | None = None,
        backend: Backend = "auto",
        **kwargs,
    ):
        if not isinstance(model, nnx.Module):
            raise TypeError(f"Quantized takes an nnx.Module, got {type(model).__name__}")
        checked = apt_quantize(type(model), rules, config=config, backend=backend)
        self.model: Any = model
        self.options = nnx.static((checked.rules, checked.config, backend))
        q, inputs, _ = self._function(args, kwargs)
        self.precision = Precision(q.init(*inputs))

    def __call__(self, *args, **kwargs) -> Any:
        """`model(*args, **kwargs)` with its products in fixed point."""
        q, (variables, others), whole = self._function(args, kwargs)
        out, changed = q.apply(variables, self.precision.get_value(), others)
        nnx.update(whole, changed)
        return out

    def report(self) -> Report:
        """Every layer with its rule, widths, backend and reason, and what was left in float."""
        return make_report(self.precision.get_value())

    def _function(self, args, kwargs):
        """The call as a quantized function of (the model's variables, all else), those two, and all nodes.

        Model and arguments are split together: they may share Variables, for example an `nnx.Rngs`.
        """
        whole = (self.model, args, kwargs)
        graph, variables, data = nnx.split(whole, nnx.Variable, ...)
        own = variables.get(0, nnx.State({}))
        others = nnx.State({k: v for k, v in variables.items() if k != 0})

        def fn(own, rest):
            others, data = rest
            variables = nnx.State({0: own, **others}) if own else others
            before = _values(variables)
            model, args, kwargs = nodes = nnx.merge(graph, variables, data)
            out = model(*args, **kwargs)
            return out, _changed(nodes, before)

        rules, config, backend = self.options
        q = apt_quantize(fn, rules, config=config, backend=backend)
        return q, (own, (others, data)), whole


def value_and_grad(
    loss_fn: Callable, *, has_aux: bool = False, wrt: Any = nnx.Param, recompute: Recompute = "short_products"
) -> Callable[..., Any]:
    """Like `nnx.value_and_grad`, and moves the precision of every `Quantized` module one step on.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)`, a scalar, or (scalar, aux) if `has_aux`.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      wrt: NNX filter of the Variables of `model` to differentiate with respect to.
      recompute: what the backward pass computes again; see `jax_apt.value_and_grad`.

    Returns:
      A function of (model, *args, **kwargs) that returns (value, gradients); value is (loss, aux) if
      `has_aux`, gradients are an `nnx.State` as `nnx.Optimizer.update` takes it.

    Raises:
      TypeError: `loss_fn` is no function, or `model` is or holds no `Quantized` module.
      ValueError: `recompute` is none of the four.
    """
    if not callable(loss_fn):
        raise TypeError(f"value_and_grad(loss_fn): loss_fn must be a function, got {type(loss_fn).__name__}")
    check_recompute(recompute)
    is_wrt = filterlib.to_predicate(wrt)

    def is_parameter(path, value):
        return path[0] == 0 and isinstance(value, nnx.Variable) and is_wrt(path[1:], value)

    def with_statistics(model, *args, **kwargs):
        layers = _quantized_modules(model)
        states = [layer.precision.get_value() for layer in layers]
        whole = (model, args, kwargs)
        graph, parameters, variables, data = nnx.split(whole, is_parameter, nnx.Variable, ...)

        def tapped(parameters, taps):
            before = _values(nnx.merge_state(parameters, variables))
            model, args, kwargs = nodes = nnx.merge(graph, parameters, variables, data, copy=True)
            inner = _quantized_modules(model)
            for layer, state, tap in zip(inner, states, taps, strict=True):
                layer.precision.set_value(replace(state, taps=tap))
            out = loss_fn(model, *args, **kwargs)
            for layer, state in zip(inner, states, strict=True):
                layer.precision.set_value(state)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, _changed(nodes, before))

        taps = [zero_taps(state.layout) for state in states]
        layouts = [state.layout for state in states]
        (loss, (aux, changed)), (gradients, statistics) = residuals.value_and_grad(
            tapped, (parameters, taps), layouts, has_aux=True, recompute=recompute
        )
        nnx.update(whole, changed)
        for layer, state, tap in zip(layers, states, statistics, strict=True):
            layer.precision.set_value(update(state, tap, layer.options[1]))
        return ((loss, aux) if has_aux else loss), gradients.get(0, nnx.State({}))

    return with_statistics


def _quantized_modules(model) -> list[Quantized]:
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, Quantized)]
    if not found:
        raise TypeError(
            f"value_and_grad: the first argument must be or hold a Quantized module, "
            f"got {type(model).__name__}"
        )
    return found


def _values(variables: nnx.State) -> dict[tuple, list]:
    """The arrays of each Variable by its path."""
    return {path: jax.tree.leaves(value) for path, value in nnx.to_flat_state(variables)}


def _changed(nodes, before: dict[tuple, list]) -> nnx.State:
    """Variables of `nodes` that are new or hold other arrays than before."""

    def is_changed(path, value):
        if not isinstance(value, nnx.Variable):
            return False
        leaves, old = jax.tree.leaves(value), before.get(path)
        return (
            old is None
            or len(old) != len(leaves)
            or any(a is not b for a, b in zip(leaves, old, strict=True))
        )

    return nnx.split(nodes, is_changed, ...)[1]
