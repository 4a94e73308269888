"""Training steps in JAX: float32, jax_apt with gradients of fixed or adaptive width, Qwix.

Softmax cross entropy, SGD with momentum by Optax, everything that a step carries is donated.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jax_apt as apt
from harness.networks import batches, initial, module_of
from harness.worker import Calls
from jax_apt import residuals
from jax_apt.config import Recompute

_NEVER = 2**30  # a step that no training reaches
_INITIAL_STEPS = 10
_SETTLING = 150  # steps before anything is timed or counted


def build(case: dict, name: str) -> tuple[Calls, dict]:
    """Calls and info of a contender: float32, bfloat16, qwix, or apt- with 8, 16, 24, adaptive or random.

    With "-remat" behind it float32 keeps the products' results alone and computes what lies between them
    again in the backward pass. With "-products" jax_apt computes the products again as well.
    """
    if name.startswith("apt-"):
        return _apt(case, name.removeprefix("apt-"))
    name, is_remat, module = name.removesuffix("-remat"), name.endswith("-remat"), module_of(case)
    if name == "qwix":
        module = _quantized_by_qwix(module, case)
    elif name == "bfloat16":
        module = _InBfloat16(module)
    apply = jax.checkpoint(_model(module), policy=_are_products) if is_remat else _model(module)
    step, carry = _float_step(apply, case)
    compiled, info = _compile(step, carry, case)
    if case.get("memory_only"):
        return {}, info
    loop = _Loop(compiled, carry, case)
    loop()
    return {"step": loop}, info


class _Loop:
    """Runs a compiled step on and on; what it carries is donated from step to step."""

    def __init__(self, step: Callable, carry: Any, case: dict, before: Callable = lambda carry: carry):
        self.step, self.carry, self.before = step, jax.tree.map(jnp.copy, carry), before
        data = [(jnp.asarray(x), jnp.asarray(y)) for x, y in batches(case)]
        self.data = itertools.cycle(data)
        self.loss = float("nan")

    def __call__(self) -> None:
        x, y = next(self.data)
        self.carry, self.loss = self.step(self.before(self.carry), x, y)
        jax.block_until_ready((self.carry, self.loss))


def _compile(step: Callable, carry, case: dict) -> tuple[Callable, dict]:
    """The compiled step, with its memory and the seconds that compilation took."""
    x, y = batches(case, 1)[0]
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(carry, x, y).compile()
    seconds, sizes = time.perf_counter() - start, compiled.memory_analysis()
    memory = {
        what: getattr(sizes, f"{what}_size_in_bytes") for what in ("argument", "output", "alias", "temp")
    }
    return compiled, {"memory": memory, "compile_seconds": seconds}


def _are_products(primitive, *_, **__) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")


def _optimizer() -> optax.GradientTransformation:
    return optax.sgd(1e-3, momentum=0.9)


def _model(module) -> Callable:
    """params, the other variables, x -> logits and the other variables after it."""

    def apply(params, others, x):
        logits, others = module.apply({"params": params, **others}, x, mutable=list(others))
        return logits, others

    return apply


def _variables(case: dict):
    variables = jax.tree.map(jnp.asarray, initial(case))
    params = variables.pop("params")
    return params, variables


def _loss(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _float_step(apply: Callable, case: dict):
    optimizer = _optimizer()

    def step(carry, x, y):
        params, others, momenta = carry

        def loss_fn(params):
            logits, after = apply(params, others, x)
            return _loss(logits, y), after

        (loss, after), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, momenta = optimizer.update(gradients, momenta, params)
        return (optax.apply_updates(params, updates), after, momenta), loss

    params, others = _variables(case)
    return step, (params, others, optimizer.init(params))


class _InBfloat16:
    """A module on bfloat16 copies of parameters and float inputs; what is trained stays float32."""

    def __init__(self, module):
        self.module = module

    def apply(self, variables, x, **options):
        copies = variables | {"params": jax.tree.map(_half, variables["params"])}
        logits, others = self.module.apply(copies, _half(x), **options)
        return logits.astype(jnp.float32), others


def _half(x):
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _quantized_by_qwix(module, case: dict):
    import qwix

    rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8, bwd_qtype=jnp.int8)
    return qwix.quantize_model(module, qwix.QtProvider([rule]))


# jax_apt


def _apt(case: dict, grads: str) -> tuple[Calls, dict]:
    """grads: a width, or "adaptive" or "random": int8, int16 or int24 as the method chooses for each tensor.

    "random" rounds gradients at random, the others to nearest.
    """
    recompute = "products" if grads.endswith("-products") else "short_products"
    grads = grads.removesuffix("-products")
    is_adaptive = grads in ("adaptive", "random")
    rounding = "stochastic" if grads == "random" else "nearest"
    widths = {} if is_adaptive else {"grads": int(grads)}
    rules = [apt.Rule(rounding=rounding, **widths)]
    config = apt.Config(steps_per_epoch=1000, initial_fraction=_INITIAL_STEPS / 1000)
    q = apt.apt_quantize(_model(module_of(case)), rules, config=config)
    params, others = _variables(case)
    state = q.init(params, others, jnp.asarray(batches(case, 1)[0][0]))
    carry = (params, others, _optimizer().init(params), state)
    compiled, info = _compile(_apt_step(q, recompute), carry, case)
    if case.get("memory_only"):
        return {}, info
    loop = _Loop(compiled, carry, case)
    for _ in range(_SETTLING if is_adaptive else 3):
        loop()
    if not is_adaptive:
        loop.carry = _with_next_update(loop.carry, _NEVER)
        return {"step": loop}, info | _precision(q, loop)
    calls: Calls = {"step": loop}
    if case.get("adaptation"):
        info |= _update_rate(loop, case["adaptation"])
        calls |= _adaptation_passes(q, compiled, loop.carry, case)
    return calls, info | _precision(q, loop)


def _apt_step(q: apt.AptFunction, recompute: Recompute):
    optimizer = _optimizer()

    def step(carry, x, y):
        params, others, momenta, state = carry

        def loss_fn(params, state):
            logits, after = q.apply(params, state, others, x)
            return _loss(logits, y), after

        both = apt.value_and_grad(loss_fn, q, has_aux=True, recompute=recompute)
        (loss, after), gradients, state = both(params, state)
        updates, momenta = optimizer.update(gradients, momenta, params)
        return (optax.apply_updates(params, updates), after, momenta, state), loss

    return step


def _still_step(q: apt.AptFunction):
    """A step at the formats of the state: without taps, so without any measurement or adjustment."""
    optimizer = _optimizer()

    def step(carry, x, y):
        params, others, momenta, state = carry

        def loss_fn(params):
            logits, after = q.apply(params, state, others, x)
            return _loss(logits, y), after

        value = residuals.value_and_grad(loss_fn, (params,), [state.layout], has_aux=True)
        (loss, after), (gradients,) = value
        updates, momenta = optimizer.update(gradients, momenta, params)
        return (optax.apply_updates(params, updates), after, momenta, state), loss

    return step


def _with_next_update(carry, step: int):
    *rest, state = carry
    precision = state.precision
    moved = precision._replace(next_update=jnp.full(precision.next_update.shape, step, jnp.int32))
    return (*rest, replace(state, precision=moved))


def _adaptation_passes(q: apt.AptFunction, compiled: Callable, carry, case: dict) -> Calls:
    """One step at the widths reached: `still` without statistics, `none due`, `all due`."""
    still, _ = _compile(_still_step(q), carry, case)
    return {
        "still": _Loop(still, carry, case),
        "none due": _Loop(compiled, _with_next_update(carry, _NEVER), case),
        "all due": _Loop(compiled, carry, case, before=lambda carry: _with_next_update(carry, 0)),
    }


def _update_rate(loop: _Loop, steps: int) -> dict:
    """Share of tensors that a step after the initial phase measures."""
    before = int(loop.carry[-1].precision.updates.sum())
    for _ in range(steps):
        loop()
    updates = loop.carry[-1].precision.updates
    return {"update_rate": (int(updates.sum()) - before) / steps / updates.size, "counted_steps": steps}


def _precision(q: apt.AptFunction, loop: _Loop) -> dict:
    """How many gradients have which width, the loss, and the backends that run."""
    report = q.report(loop.carry[-1])
    widths = [bits for layer in report.tensors.values() for bits in _flat(layer["dy"].bits)]
    return {
        "gradient_widths": {str(bits): widths.count(bits) for bits in sorted(set(widths))},
        "loss": float(loop.loss),
        "backends": sorted({layer.backend for layer in report.layout.layers}),
    }


def _flat(bits) -> list[int]:
    return [bits] if isinstance(bits, int) else [one for part in bits for one in _flat(part)]
