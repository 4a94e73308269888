"""A product's contenders in JAX: float32, jax_apt at fixed widths, AQT and Qwix.

Passes: forward, dX, dW, and all, which is the three in one jitted function, so that what they share (codes
of X and W, one read of dY) is done once. dX and dW start from the residuals that the forward pass keeps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_apt as apt
from harness import oracle
from harness.cases import arrays
from harness.products import APT
from harness.worker import Calls, UnavailableError


def build(case: dict, name: str) -> tuple[Calls, dict]:
    """Calls and info of a contender: float32, aqt, qwix, or apt-X-W-G with three bit-widths."""
    if name == "float32":
        return _differentiable(_function(case), case)
    if name.startswith("apt-"):
        acts, weights, grads = map(int, name.split("-")[1:])
        return _apt(case, acts, weights, grads)
    return _PEERS[name](case)


def _function(case: dict) -> Callable:
    """w, x -> y in float32."""
    if case["kind"] == "gemm":
        return lambda w, x: x @ w
    return partial(_convolve, case)


def _convolve(case: dict, w, x):
    pad = case["window"] // 2
    return jax.lax.conv_general_dilated(
        x,
        w,
        (case["stride"],) * 2,
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=case["in"] if case.get("depthwise") else 1,
    )


def _differentiable(function: Callable, case: dict, *context) -> tuple[Calls, dict]:
    """The passes of `function(*context, w, x)`; context is an argument of the jitted functions."""
    x, w, dy = map(jnp.asarray, arrays(case))

    def vjp(context, w, x):
        return jax.vjp(lambda w, x: function(*context, w, x), w, x)

    def every(context, w, x, dy):
        y, pullback = vjp(context, w, x)
        return y, *pullback(dy)

    pullback = jax.jit(vjp)(context, w, x)[1]
    passes = {
        "forward": partial(jax.jit(lambda context, w, x: function(*context, w, x)), context, w, x),
        "dX": partial(jax.jit(lambda pullback, dy: pullback(dy)[1]), pullback, dy),
        "dW": partial(jax.jit(lambda pullback, dy: pullback(dy)[0]), pullback, dy),
        "all": partial(jax.jit(every), context, w, x, dy),
    }
    wanted = case.get("passes", list(passes))
    return {one: _blocking(passes[one]) for one in wanted}, {}


def _blocking(function: Callable) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function())


# jax_apt


def _apt(case: dict, acts: int, weights: int, grads: int) -> tuple[Calls, dict]:
    x, w, dy = map(jnp.asarray, arrays(case))
    function = _function(case)
    rule = apt.Rule(acts=acts, weights=weights, grads=grads, rounding="nearest")
    q = apt.apt_quantize(lambda params, x: function(params["w"], x), [rule])
    state = _measured_state(q, w, x, dy)
    case = case | {"passes": APT[f"apt-{acts}-{weights}-{grads}"]}
    calls, _ = _differentiable(lambda state, w, x: q.apply({"w": w}, state, x), case, state)
    return calls, {"check": _check(case, q, state, calls), "backend": state.layout.layers[0].backend}


def _measured_state(q: apt.AptFunction, w, x, dy) -> apt.AptState:
    """The state after one training step whose output gradient is dy: formats that fit."""

    def loss(params, state, x, dy):
        return jnp.vdot(q.apply(params, state, x), dy)

    @jax.jit  # operands are arguments: XLA would spend seconds on products of constants
    def step(params, state, x, dy):
        return apt.value_and_grad(loss, q)(params, state, x, dy)[2]

    return step({"w": w}, q.init({"w": w}, x), x, dy)


def _check(case: dict, q: apt.AptFunction, state: apt.AptState, calls: Calls) -> dict[str, dict[str, float]]:
    """Per pass: largest difference from the exact integers, and the relative error against float32."""
    results = _results(calls)
    precision = state[state.layout.names()[0]]
    numbers = dict(zip(("x", "w", "dy"), arrays(case), strict=True))
    codes = {t: _codes(value, precision[t]) for t, value in numbers.items()}
    exact = oracle.products(case, codes["x"], codes["w"], codes["dy"])
    in_float = oracle.products(case, numbers["x"], numbers["w"], numbers["dy"])
    pairs = {"forward": ("x", "w"), "dX": ("dy", "w"), "dW": ("x", "dy")}
    checks = {}
    for one, result in results.items():
        exponent = sum(int(precision[t].exponent) for t in pairs[one])
        integers = np.float64(result) * 2.0**-exponent
        checks[one] = {
            "integer_error": float(np.abs(integers - exact[one].astype(np.float32)).max()),
            "relative_error": _relative(result, in_float[one]),
        }
    return checks


def _results(calls: Calls) -> dict[str, np.ndarray]:
    """What each pass computed; `all` stands for those that are not timed alone."""
    results = {one: np.asarray(call()) for one, call in calls.items() if one != "all"}
    if "all" in calls:
        y, dw, dx = map(np.asarray, calls["all"]())
        for one, value in {"forward": y, "dX": dx, "dW": dw}.items():
            if not np.array_equal(results.setdefault(one, value), value):
                raise AssertionError(f"{one} alone and among all three differ")
    return results


def _codes(value: np.ndarray, precision) -> np.ndarray:
    """numpy's own quantization: round half to even, then clip."""
    largest = 2 ** (int(precision.bits) - 1) - 1
    return np.clip(np.rint(np.float64(value) * 2.0 ** -int(precision.exponent)), -largest, largest)


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


# Peers


def _forward(function: Callable, case: dict) -> tuple[Calls, dict]:
    x, w, dy = arrays(case)
    call = _blocking(partial(jax.jit(function), jnp.asarray(x), jnp.asarray(w)))
    reference = oracle.products(case, x, w, dy)["forward"]
    check = {"forward": {"relative_error": _relative(np.asarray(call()), reference)}}
    return {"forward": call}, {"check": check}


def _aqt(case: dict) -> tuple[Calls, dict]:
    import aqt.jax.v2.config as aqt_config

    if case["kind"] != "gemm":
        raise UnavailableError("the convolution of AQT is not timed")
    dot = aqt_config.dot_general_make(8, 8)
    return _forward(lambda x, w: dot(x, w, (((1,), (0,)), ((), ()))), case)


def _qwix(case: dict) -> tuple[Calls, dict]:
    import qwix

    def product(x, w):
        x, w = qwix.quantize(x, jnp.int8), qwix.quantize(w, jnp.int8)
        if case["kind"] == "gemm":
            return qwix.dot(x, w)
        pad = case["window"] // 2
        return qwix.conv_general_dilated(
            x,
            w,
            (case["stride"],) * 2,
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case["in"] if case.get("depthwise") else 1,
        )

    return _forward(product, case)


_PEERS = {"aqt": _aqt, "qwix": _qwix}
