"""Everything that depends on JAX's version: names and parameters of jaxpr primitives, source lines.

Written for jax 0.10.2 and newer; other modules see none of it.
"""

import os
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

CUSTOM_RULE = ("custom_jvp_call", "custom_vjp_call", "call_hi_primitive")
CALL = ("closed_call", "eval_jaxpr", "custom_vmap_call", "composite")

_LIBRARIES = tuple(
    os.path.join(sysconfig.get_paths()[kind], package) + os.sep
    for kind in ("purelib", "platlib")
    for package in ("jax", "jaxlib", "flax", "optax", "haiku", "equinox")
)
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def bind(eqn: JaxprEqn, args: list) -> list:
    """Runs one equation as it is; always a list of results."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def aval(var) -> Any:
    """Shape and dtype of a variable or literal."""
    return var.aval


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def sub_jaxprs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """Every jaxpr among an equation's parameters; for a HiPrim what it expands to."""
    if "_prim" in eqn.params:
        return [_expansion(eqn)]
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                found.append(closed(item))
    return found


def _expansion(eqn: JaxprEqn) -> ClosedJaxpr:
    """The program that a HiPrim ("call_hi_primitive") stands for."""
    primitive = eqn.params["_prim"]

    def expanded(*args):
        return primitive.expand(*jax.tree.unflatten(primitive.in_tree, args))

    return jax.make_jaxpr(expanded)(*(jax.ShapeDtypeStruct(aval(v).shape, aval(v).dtype) for v in eqn.invars))


def name(eqn: JaxprEqn) -> str:
    """Name of an equation's primitive; a HiPrim goes by its own."""
    if "_prim" in eqn.params:
        return type(eqn.params["_prim"]).__name__
    return eqn.primitive.name


def scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in eqn.params:  # before jax 0.12
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def jit_shardings(eqn: JaxprEqn) -> tuple[list, list]:
    """Shardings that a jit asks of its inputs and outputs; None where it asks for none."""

    def asked(shardings):
        return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]

    return asked(eqn.params["in_shardings"]), asked(eqn.params["out_shardings"])


def varying_axes(x) -> frozenset[str]:
    """Mesh axes of `shard_map` along which devices hold different values of `x`, as its type says."""
    return jax.typeof(x).mat.varying


def as_varying(x, axes: frozenset[str]):
    """`x` with a type that varies along `axes` too."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def explicit_axes(aval) -> tuple[str, ...]:
    """Mesh axes along which the type of a value says how it is sharded."""
    return aval.sharding.mesh.explicit_axes


def without_explicit_axes(function: Callable, out) -> Callable:
    """`function`, run as on a mesh whose explicit axes are automatic; its result is sharded as `out`'s type.

    Inside, XLA chooses how to shard, and types say nothing of it.
    """
    explicit = explicit_axes(out)
    if not explicit:
        return function
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out.sharding)


def without_out_sharding(params: dict) -> dict:
    """Parameters of a product that asks for no sharding of its result."""
    return {name: None if name == "out_sharding" else value for name, value in params.items()}


def spread_axes(eqn: JaxprEqn) -> frozenset[str]:
    """Axes along which an equation declares a value as varying that is the same on all devices."""
    return frozenset(eqn.params["axes"]) if eqn.primitive.name == "pvary" else frozenset()


def gradient_program(eqn: JaxprEqn, shard_maps: tuple[JaxprEqn, ...] = ()) -> ClosedJaxpr:
    """(inputs, cotangents of the float outputs) -> gradients of the float inputs.

    The rule that the author of a custom_jvp or custom_vjp function wrote, traced inside these shard_maps.
    """
    inputs = [aval(v).strip_weak_type() for v in eqn.invars]  # with shardings and what varies in a shard_map
    cotangents = [aval(v).strip_weak_type() for v in eqn.outvars if is_float(aval(v))]

    def gradients(*values):
        args = list(values[: len(inputs)])
        places = [i for i, x in enumerate(inputs) if is_float(x)]

        def function(*floats):
            merged = list(args)
            for i, x in zip(places, floats, strict=True):
                merged[i] = x
            return [out for out in bind(eqn, merged) if is_float(out)]

        _, pullback = jax.vjp(function, *(args[i] for i in places))
        return pullback(list(values[len(inputs) :]))

    def trace():
        with eqn.ctx.manager:
            return jax.make_jaxpr(gradients)(*inputs, *cotangents)

    for outer in reversed(shard_maps):
        trace = partial(_inside, outer, trace)
    return trace()


def _inside(shard_map: JaxprEqn, trace: Callable[[], ClosedJaxpr]) -> ClosedJaxpr:
    """What `trace` returns where the axes of a shard_map are bound."""
    found, p = [], shard_map.params

    def body():
        found.append(trace())
        return ()

    axes = set(p["newly_manual_axes"])
    mapped = jax.shard_map(
        body, mesh=p["mesh"], in_specs=(), out_specs=(), axis_names=axes, check_vma=p["check_vma"]
    )
    jax.eval_shape(mapped)
    return found[0]


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def scope(eqn: JaxprEqn) -> str:
    """Name stack of an equation without the marks of transformations, "" if it has none."""
    return re.sub(r"\w+\(|\)", "", str(eqn.source_info.name_stack)).strip("/")


def source_line(eqn: JaxprEqn) -> str:
    """ "file.py:12 (function)" of the innermost frame outside the libraries, or "an unknown line"."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        path = os.path.abspath(frame.file_name)
        if not path.startswith((*_LIBRARIES, _HERE)) and not frame.file_name.startswith("<"):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return "an unknown line"


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where JAX runs by default."""
    return jax.default_backend()
