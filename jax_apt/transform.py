"""`apt_quantize`: turns any apply function into one whose products run in adaptive fixed point.

The function is traced to a jaxpr and replayed; `dot_general` and `conv_general_dilated` are swapped for
quantized products, everything else runs as it was. No monkey-patching, no global context.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn, Literal
from jax.sharding import PartitionSpec

from jax_apt import _jax_versions as versions
from jax_apt.config import Backend, Config, Rule, check_backend
from jax_apt.derivatives import refuse_gradient, reverse_once
from jax_apt.max_pool import max_pool
from jax_apt.ops import DY, Site, quantized_product
from jax_apt.plan import (
    MaxPool,
    Nested,
    Plan,
    QuantizedProduct,
    make_plan,
    parameter_labels,
    warn_unused_rules,
)
from jax_apt.primitives import RAGGED
from jax_apt.products import check_sums_fit, trace_programs
from jax_apt.report import Report, make_report
from jax_apt.residuals import with_few_residuals
from jax_apt.scan_over_time import (
    NOTHING_LATER,
    Deferred,
    Later,
    Loop,
    differentiate_later,
    find_deferred,
    hoist,
    probe_shapes,
    weight_gradient,
)
from jax_apt.state import (
    WATCH,
    AptState,
    Layer,
    Layout,
    check_same_layers,
    check_state,
    check_taps,
    formats,
    initial_state,
    update,
    zero_taps,
)

# API


def apt_quantize(
    fn: Callable,
    rules: Sequence[Rule] = (),
    *,
    config: Config | None = None,
    backend: Backend = "auto",
    replace_slow: bool = True,
) -> "AptFunction":
    """Wraps an apply function so that its products train in adaptive fixed point.

    Args:
      fn: `fn(variables, *args, **kwargs)`, a function of a pytree of parameters and of data: a Linen
        model's `apply`, an NNX `merge` and call, a Haiku or Equinox apply function, a plain function.
        Array arguments are traced; Python scalars, strings and None stay as they are.
      rules: pick layers by name, first match wins; layers that no rule hits get `Rule()`.
      config: constants of the method; `Config()` if None. Set `steps_per_epoch`.
      backend: "auto" takes "native" where it can run, else "xla"; or one of "native", "xla", "emulate".
      replace_slow: whether exact custom calls may take the place of float32 operations that XLA runs slowly
        on a CPU (max pooling's gradient), where "native" runs. Values are the same, bit for bit.

    Returns:
      The quantized function, with `init`, `apply`, `update` and `report`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: the backend is unknown.

    >>> import jax, jax.numpy as jnp
    >>> q = apt_quantize(lambda params, x: x @ params["w"], backend="xla")
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> state = q.init(params, x)
    >>> q.apply(params, state, x).shape
    (4, 2)
    """
    if not callable(fn):
        raise TypeError(f"apt_quantize takes a function, got {type(fn).__name__}")
    if isinstance(getattr(fn, "__self__", None), AptFunction):
        raise TypeError("apt_quantize takes the original function; this one is made by apt_quantize already")
    _check_rules(rules)
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {config!r}")
    check_backend(backend)
    return AptFunction(fn, tuple(rules), config or Config(), backend, replace_slow)


def _check_rules(rules) -> None:
    if isinstance(rules, Config):
        raise TypeError("the second argument is the list of rules; pass the Config as config=...")
    if isinstance(rules, Rule) or not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a list of Rule objects, got {rules!r}; one rule is [rule]")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules must be Rule objects, got {rule!r}")


@dataclass(frozen=True)
class AptFunction:
    """A function whose products run in adaptive fixed point; made by `apt_quantize`."""

    fn: Callable
    rules: tuple[Rule, ...]
    config: Config
    backend: Backend
    replace_slow: bool = True

    def init(self, variables: Any, *args, **kwargs) -> AptState:
        """The precision state before the first step, for arguments of these shapes.

        Args:
          variables: parameters, as `fn` takes them; arrays or `jax.ShapeDtypeStruct`.
          *args, **kwargs: the rest of `fn`'s arguments.

        Raises:
          TypeError: a product of float64 or complex operands; the message has your line.
          RuntimeError: a backend that was asked for cannot run here.

        Warns:
          UserWarning: a rule hit no layer.
        """
        traced = _trace(self, variables, args, kwargs)
        warn_unused_rules(traced.layout)
        return initial_state(traced.layout)

    def apply(self, variables: Any, state: AptState, *args, **kwargs) -> Any:
        """`fn(variables, *args, **kwargs)` with its products in fixed point.

        Formats are read from the state. Only in training, when the state carries taps
        (`value_and_grad`, or `with_taps`), is a tensor measured that is due; a tensor that was never
        measured is quantized by its own range.

        Raises:
          TypeError: `state` is no AptState, or a forward-mode or second derivative is taken.
          ValueError: the state belongs to another function; the message names the difference.
        """
        check_state(state, "apply(variables, state, ...)")
        if (watch := WATCH.get()) is not None:
            watch.see(state)
        traced = _trace(self, variables, args, kwargs)
        check_same_layers(state, traced.layout)
        taps = zero_taps(state.layout) if state.taps is None else state.taps
        check_taps(state, taps)
        table = formats(state)
        sites = {name: (table[name], taps[name]) for name in traced.layout.names()}
        layers = {layer.name: layer for layer in traced.layout.layers}
        replayer = _Replayer(self.config, state.layout.padded_widths(), layers)
        out = replayer.replay(traced.plan, traced.inputs, sites)
        return jax.tree.unflatten(traced.out_tree, out)

    def with_taps(self, state: AptState, taps: dict[str, Array] | None = None) -> AptState:
        """The state as training uses it: zeros whose gradient is the statistics of the step."""
        check_state(state, "with_taps(state, taps)")
        return replace(state, taps=zero_taps(state.layout) if taps is None else taps)

    def taps(self, state: AptState) -> dict[str, Array]:
        """Zeros to differentiate with respect to: float32 arrays by layer name."""
        check_state(state, "taps(state)")
        return zero_taps(state.layout)

    def update(self, state: AptState, taps: dict[str, Array]) -> AptState:
        """The state after a training step, from the gradient of the loss with respect to the taps.

        Raises:
          TypeError: `state` is no AptState, or the taps are no dictionary.
          ValueError: the taps are not those of the state's layers.
        """
        return update(state, taps, self.config)

    def report(self, state: AptState) -> Report:
        """Every layer with its rule, widths, backend and reason, and what was left in float."""
        check_state(state, "report(state)")
        return make_report(state)


# Trace


def _check_no_state(variables, args) -> None:
    """A precision state in the wrong place would be traced like parameters or data."""
    for name, value in (("variables", variables), *((f"argument {i + 1}", x) for i, x in enumerate(args))):
        if isinstance(value, AptState):
            raise TypeError(
                f"{name} is an AptState: init takes (variables, *args) and apply (variables, state, *args)"
            )


@dataclass(frozen=True)
class _Traced:
    plan: Plan
    layout: Layout
    inputs: list  # array leaves of the arguments
    out_tree: Any


def _trace(q: AptFunction, variables, args, kwargs) -> _Traced:
    _check_no_state(variables, args)
    leaves, tree = jax.tree.flatten((variables, args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    count = len(jax.tree.leaves(variables))
    labels = parameter_labels(variables) + [None] * (len(leaves) - count)

    def flat_fn(*arrays):
        remaining = iter(arrays)
        merged = [next(remaining) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        variables, args, kwargs = jax.tree.unflatten(tree, merged)
        return q.fn(variables, *args, **kwargs)

    arrays = [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]
    labels = [label for a, label in zip(is_array, labels, strict=True) if a]
    jaxpr, out_shape = jax.make_jaxpr(flat_fn, return_shape=True)(*arrays)
    plan, layout = make_plan(jaxpr, labels, q.rules, q.backend, q.replace_slow)
    return _Traced(plan, layout, arrays, jax.tree.structure(out_shape))


# Interpreter

Sites = dict[str, tuple[Array, Array]]  # layer name -> (formats, tap)


@dataclass(frozen=True)
class _Replayer:
    """Runs a plan. Every method takes the arguments of an equation and returns its list of results."""

    config: Config
    widths: dict[str, tuple[tuple[int, ...], ...]]  # layer name -> padded candidates of x, w, dy
    layers: dict[str, Layer]
    mesh_axes: tuple[str, ...] = ()  # those that a `shard_map` around maps over
    is_typed: bool = True  # whether that `shard_map` checks along which of them a value varies

    def replay(self, plan: Plan, args: Sequence, sites: Sites, later: Later = NOTHING_LATER) -> list:
        values: dict = dict(zip(plan.jaxpr.jaxpr.invars, args, strict=True))
        values |= dict(zip(plan.jaxpr.jaxpr.constvars, plan.jaxpr.consts, strict=True))
        values |= later.weights
        same_along: dict = defaultdict(frozenset)  # variable -> axes of a shard_map, where it is known

        def read(var):
            return var.val if isinstance(var, Literal) else values[var]

        for i, eqn in enumerate(plan.jaxpr.jaxpr.eqns):
            if all(var in later.weights for var in eqn.outvars):
                continue
            inputs = [read(v) for v in eqn.invars]
            node = plan.nodes.get(i)
            if node is None:
                out = self._plain(eqn, inputs)
                same_along |= dict.fromkeys(eqn.outvars, versions.spread_axes(eqn))
            elif isinstance(node, MaxPool):
                out = [max_pool(eqn, *inputs)]
            elif isinstance(node, QuantizedProduct):
                run = partial(later.product, i) if i in later.probes else quantized_product
                same = [frozenset() if isinstance(v, Literal) else same_along[v] for v in eqn.invars]
                out = [self._product(eqn, node, inputs, sites, run, same)]
            else:
                own = {n: sites[n] for body in node.bodies for n in body.layers()}
                out = self._nested(eqn, node, inputs, own)
            values |= dict(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in plan.jaxpr.jaxpr.outvars]

    def _plain(self, eqn: JaxprEqn, inputs) -> list:
        return versions.bind(eqn, inputs)

    def _product(self, eqn: JaxprEqn, node: QuantizedProduct, inputs, sites: Sites, run, same) -> Array:
        # A loop that is differentiated later is watched as a whole: links would tie its weights to the step.
        watch = reverse_once if run is quantized_product else list
        lhs, rhs = watch([x.astype(jnp.float32) for x in inputs])
        out = versions.aval(eqn.outvars[0])
        if self.mesh_axes and (left := versions.explicit_axes(out)):
            why = _PARTLY_EXPLICIT.format(node.layer, ", ".join(self.mesh_axes), ", ".join(left))
            lhs, rhs = refuse_gradient(lhs, why), refuse_gradient(rhs, why)
        quantized = versions.without_explicit_axes(partial(self._quantized, eqn, node, run, same), out)
        (result,) = watch([quantized(lhs, rhs, *sites[node.layer])])
        return result.astype(out.dtype)

    def _quantized(self, eqn, node: QuantizedProduct, run, same, lhs, rhs, formats, tap) -> Array:
        axes, copied = self.mesh_axes, ((), ())
        if axes and self.is_typed:
            own = versions.varying_axes(lhs), versions.varying_axes(rhs)
            varying = own[0] | own[1]
            copied = tuple(tuple(sorted(s | varying - o)) for s, o in zip(same, own, strict=True))
            lhs, rhs, tap = (versions.as_varying(x, varying) for x in (lhs, rhs, tap))
            axes = tuple(a for a in axes if a in varying)
        site = self._site(eqn, node, axes)._replace(copied=copied)
        with jax.named_scope(f"apt/{node.layer}"):
            return run(site, lhs, rhs, formats, tap)

    def _site(self, eqn: JaxprEqn, node: QuantizedProduct, axes: tuple[str, ...] = ()) -> Site:
        layer = self.layers[node.layer]
        site = Site(
            programs=trace_programs(eqn, *(versions.aval(v).shape for v in eqn.invars)),
            is_weight_lhs=node.is_weight_lhs,
            widths=self.widths[node.layer],
            backend=layer.backend,
            config=self.config,
            gemms=layer.gemms,
            rounding=layer.rounding,
            seed=zlib.crc32(layer.name.encode()),
            mesh_axes=axes,
        )
        _check_sums_fit(eqn, node, site)
        return site

    def _nested(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        return _BODIES[eqn.primitive.name](self, eqn, node, inputs, sites)

    def _body(self, plan: Plan, sites: Sites, *args) -> list:
        return self.replay(plan, args, sites)

    def _jit(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        asked_in, asked_out = versions.jit_shardings(eqn)

        def named(sites, *args):
            out = self._body(node.bodies[0], sites, *map(_constrained, args, asked_in))
            return list(map(_constrained, out, asked_out))

        named.__name__ = named.__qualname__ = str(eqn.params.get("name", "jit"))
        return jax.jit(named, inline=eqn.params.get("inline", False))(sites, *inputs)

    def _remat(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        body = partial(self._body, node.bodies[0])
        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(sites, *inputs)

    def _call(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        return self._body(node.bodies[0], sites, *inputs)

    def _cond(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        branches = [partial(self._body, body) for body in node.bodies]
        return lax.switch(inputs[0], branches, sites, *inputs[1:])

    def _scan(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        """One precision per slice in a scan over layers, one for all steps in a scan over time."""
        num_consts, _ = versions.scan_parts(eqn)
        is_explicit = any(versions.explicit_axes(versions.aval(v)) for v in eqn.outvars)
        if not node.is_over_layers and not self.mesh_axes and not is_explicit:
            deferred = find_deferred(node.bodies[0], num_consts, self._can_defer)
            if deferred.products:
                return self._scan_over_time(eqn, node, inputs, sites, deferred)
        return self._run_scan(eqn, node, inputs, sites)[0]

    def _run_scan(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites, weights=None, probes=None):
        """(outputs, codes of X of every deferred product, stacked over the steps)"""
        p = eqn.params
        num_consts, num_carry = versions.scan_parts(eqn)
        consts, rest = inputs[:num_consts], inputs[num_consts:]
        carry, xs = rest[:num_carry], rest[num_carry:]

        def step(carry, scanned):
            xs, sliced, probes = scanned
            inner = sliced if node.is_over_layers else sites
            later = Later(weights or {}, probes, {})
            out = self.replay(node.bodies[0], [*consts, *carry, *xs], inner, later)
            return out[:num_carry], (out[num_carry:], later.codes)

        step = with_few_residuals(step, self.layers.values())
        scanned = (xs, sites if node.is_over_layers else None, probes or {})
        carry, (ys, codes) = lax.scan(
            step, carry, scanned, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        return [*carry, *ys], codes

    def _can_defer(self, node: QuantizedProduct) -> bool:
        return "dw" in self.layers[node.layer].gemms

    def _scan_over_time(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites, deferred: Deferred) -> list:
        """A scan over time whose weight gradients are computed after it."""
        (body,) = node.bodies
        eqns, names = body.jaxpr.jaxpr.eqns, list(sites)
        nodes = {i: node for i, node in body.nodes.items() if isinstance(node, QuantizedProduct)}
        products = {i: self._site(eqns[i], nodes[i]) for i in deferred.products}
        weights = hoist(body, deferred, inputs[: versions.scan_parts(eqn)[0]])

        def run(weights, values, formats, probes):
            taps, inputs = values[: len(names)], values[len(names) :]
            inner = {name: (formats[name], tap) for name, tap in zip(names, taps, strict=True)}
            given = dict(zip(deferred.weights, weights, strict=True))
            return self._run_scan(eqn, node, inputs, inner, given, probes)

        def gradient(i, codes, probe, formats):
            training_step = formats[nodes[i].layer][DY, 3]
            return weight_gradient(products[i], codes, probe, training_step)

        loop = Loop(
            run=run,
            gradient=gradient,
            probes={i: probe_shapes(site, eqn.params["length"]) for i, site in products.items()},
            weight_of=deferred.products,
        )
        taps = [tap for _, tap in sites.values()]
        inputs = [
            lax.stop_gradient(value) if var in deferred.weights else value
            for var, value in zip(body.jaxpr.jaxpr.invars, inputs, strict=True)
        ]
        both = reverse_once([*weights, *inputs])
        weights, inputs = both[: len(weights)], both[len(weights) :]
        formats = {name: table for name, (table, _) in sites.items()}
        return reverse_once(differentiate_later(loop, weights, [*taps, *inputs], formats))

    def _shard_map(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        """Formats are the same on all devices; what a device measures is added to the others'."""
        p = eqn.params
        axes = tuple(sorted(p["newly_manual_axes"]))
        inner = replace(self, mesh_axes=(*self.mesh_axes, *axes), is_typed=p["check_vma"])

        def body(sites, *args):
            return tuple(inner.replay(node.bodies[0], args, sites))

        mapped = jax.shard_map(
            body,
            mesh=p["mesh"],
            in_specs=(PartitionSpec(), *p["in_specs"]),
            out_specs=tuple(p["out_specs"]),
            axis_names=set(axes),
            check_vma=p["check_vma"],
        )
        return list(mapped(sites, *inputs))

    def _while(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        c, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = inputs[:c], inputs[c : c + b], inputs[c + b :]
        test, body = node.bodies

        def should_continue(carry):
            return self.replay(test, [*cond_consts, *carry], sites)[0]

        def step(carry):
            return self.replay(body, [*body_consts, *carry], sites)

        return lax.while_loop(should_continue, step, list(carry))

    def _custom_rule(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        """A custom_jvp or custom_vjp function: its own gradient rule, with that rule's products quantized.

        The products in here are not differentiated, so their statistics are pulled out of them with zero
        cotangents.
        """
        if len(node.bodies) == 1:
            return self._call(eqn, node, inputs, sites)
        forward, gradient = node.bodies

        def observed(plan, formats, taps, args):
            def function(taps):
                return self.replay(plan, args, {n: (formats[n], taps[n]) for n in formats})

            out, pullback = jax.vjp(function, taps)
            return out, pullback

        @jax.custom_vjp
        def rule(formats, taps, *args):
            return self.replay(forward, args, {n: (formats[n], taps[n]) for n in formats})

        def rule_forward(formats, taps, *args):
            out, pullback = observed(forward, formats, taps, args)
            (statistics,) = pullback(jax.tree.map(_zero_cotangent, out))
            return out, (formats, taps, args, statistics)

        def rule_backward(residuals, cotangents):
            formats, taps, args, statistics = residuals
            cotangents = [c for c in cotangents if c.dtype != jax.dtypes.float0]
            floats, pullback = observed(gradient, formats, taps, (*args, *cotangents))
            (more,) = pullback(jax.tree.map(_zero_cotangent, floats))
            remaining = iter(floats)
            gradients = [next(remaining) if versions.is_float(x) else _zero_cotangent(x) for x in args]
            statistics = jax.tree.map(jnp.add, statistics, more)
            return jax.tree.map(_zero_cotangent, formats), statistics, *gradients

        rule.defvjp(rule_forward, rule_backward)
        tables = {name: table for name, (table, _) in sites.items()}
        taps = {name: tap for name, (_, tap) in sites.items()}
        return reverse_once(rule(tables, taps, *reverse_once(inputs)))


_BODIES = {
    "shard_map": _Replayer._shard_map,
    "scan": _Replayer._scan,
    "while": _Replayer._while,
    "cond": _Replayer._cond,
    **dict.fromkeys(versions.CUSTOM_RULE, _Replayer._custom_rule),
    "jit": _Replayer._jit,
    "remat2": _Replayer._remat,
    **dict.fromkeys((*versions.CALL, *RAGGED), _Replayer._call),
}


_PARTLY_EXPLICIT = (
    "layer {}: a shard_map over {} that leaves {} explicit can be evaluated but not differentiated; map over "
    "all axes, or make them automatic: jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
)


def _constrained(x, sharding):
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


def _check_sums_fit(eqn: JaxprEqn, node: QuantizedProduct, site: Site) -> None:
    x, w, dy = (widths[-1] for widths in site.widths)
    try:
        check_sums_fit(site.programs, *((w, x) if site.is_weight_lhs else (x, w)), dy)
    except ValueError as error:
        where = f"{eqn.primitive.name} at {versions.source_line(eqn)}"
        raise ValueError(f"layer {node.layer}: {where}: {error}") from None


def _zero_cotangent(x):
    if versions.is_float(x):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
