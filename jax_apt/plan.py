"""What the transform will do with a jaxpr: which products are quantized, their names, widths, backends.

A layer is named by the pytree path of the parameter that feeds it, followed through whatever is computed
from parameters alone (casts, reshapes, transposes, weight standardization) and into the bodies of jit,
scan, remat, cond and custom rules. The same walk says which operand is the weight. A product of two
activations takes the name stack, or its primitive's name.
"""

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jax_apt import _jax_versions as versions
from jax_apt import max_pool, xla_ops
from jax_apt.config import Rule, candidates
from jax_apt.primitives import FAMILY_OF, PRODUCTS, RAGGED, is_product
from jax_apt.ragged import ragged_program
from jax_apt.state import Layer, Layout, LeftInFloat, Replaced

_WEIGHT_LEAVES = ("kernel", "weight", "w", "embedding")
_DEFAULT_RULE = Rule()


class Parameter(NamedTuple):
    """Where a value that depends on parameters alone comes from."""

    path: str  # of the largest parameter in it; "" for constants
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) if self.path else -1


_CONSTANT = Parameter("", ())
_GRADIENT = Parameter("<gradient>", ())  # depends on a gradient that a user's custom rule receives
Label = Parameter | None  # None: the value depends on data


class QuantizedProduct(NamedTuple):
    """A product that the replay swaps for its quantized form."""

    layer: str
    is_weight_lhs: bool


class MaxPool(NamedTuple):
    """Max pooling whose gradient is a custom call."""


class Nested(NamedTuple):
    """An equation with bodies in which products are quantized, or max pooling replaced."""

    bodies: tuple["Plan", ...]  # of a custom rule: the function, then its gradient
    is_over_layers: bool = False  # a scan whose slices have a precision each

    def layers(self) -> tuple[str, ...]:
        """Names of the layers in its bodies, each once."""
        return tuple(dict.fromkeys(name for body in self.bodies for name in body.layers()))


@dataclass(frozen=True)
class Plan:
    """A jaxpr and what happens to its equations; those not listed run as they are."""

    jaxpr: ClosedJaxpr
    nodes: dict[int, "Node"]

    def layers(self) -> tuple[str, ...]:
        """Names of the layers in this jaxpr and its bodies, each once."""
        names: dict[str, None] = {}
        for node in self.nodes.values():
            if isinstance(node, QuantizedProduct):
                names[node.layer] = None
            elif isinstance(node, Nested):
                names |= dict.fromkeys(node.layers())
        return tuple(names)


Node = QuantizedProduct | MaxPool | Nested


def make_plan(
    jaxpr: ClosedJaxpr, labels: Sequence[Label], rules: Sequence[Rule], backend: str, replace_slow: bool
) -> tuple[Plan, Layout]:
    """Plans the replay of a traced function.

    Args:
      jaxpr: the function.
      labels: for each of its inputs, the parameter that it is, or None for data.
      rules: first match wins; layers that none hits get the default rule.
      backend: default backend.
      replace_slow: whether custom calls take the place of slow float32 operations, where they can run.

    Raises:
      NotImplementedError: a primitive hides a product that cannot be reached.
      TypeError: a product's dtypes cannot be quantized.
    """
    has_kernels = backend in ("auto", "native") and not _native_obstacle()
    planner = _Planner(tuple(rules), backend, replace_slow and has_kernels)
    plan, _ = planner.walk(jaxpr, list(labels), stack=(), scope="")
    return plan, planner.layout()


def parameter_labels(variables: Any) -> list[Label]:
    """The label of each leaf of a pytree of parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return [Parameter(_parameter_path(path), np.shape(leaf)) for path, leaf in leaves]


def _parameter_path(path) -> str:
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]  # an NNX variable holds its array there
    return jax.tree_util.keystr(path, simple=True, separator="/") or "parameter"


def layer_name(path: str) -> str:
    """Layer of a parameter's path: "params/Conv_0/kernel" -> "Conv_0"."""
    parts = path.split("/")
    if parts[0] == "params" and len(parts) > 1:
        parts = parts[1:]
    if parts[-1] in _WEIGHT_LEAVES and len(parts) > 1:
        parts = parts[:-1]
    return "/".join(parts)


def _equations(jaxpr: ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Every equation, with those of bodies; what stays in float stays so as a whole."""
    for eqn in jaxpr.jaxpr.eqns:
        yield eqn
        for body in () if _reason_left_in_float(eqn) else versions.sub_jaxprs(eqn):
            yield from _equations(body)


def has_product(jaxpr: ClosedJaxpr) -> bool:
    return any(is_product(eqn.primitive.name) for eqn in _equations(jaxpr))


def _is_passed_over(jaxpr: ClosedJaxpr) -> bool:
    """Whether nothing in a body is quantized or reported."""
    return not any(is_product(e.primitive.name) or _reason_left_in_float(e) for e in _equations(jaxpr))


def _reason_left_in_float(eqn: JaxprEqn) -> str:
    """Why an equation's results stay in float and the report says so; else ""."""
    name = eqn.primitive.name
    if not all(any(map(_is_float, variables)) for variables in (eqn.invars, eqn.outvars)):
        return ""
    if name in FAMILY_OF:
        return FAMILY_OF[name].reason
    return "" if versions.sub_jaxprs(eqn) else "unknown to jax_apt: whatever it computes stays as it is"


def _is_float(var) -> bool:
    dtype = getattr(versions.aval(var), "dtype", None)  # a token has none
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def has_max_pool(jaxpr: ClosedJaxpr) -> bool:
    return any(
        (eqn.primitive.name == max_pool.PRIMITIVE and max_pool.has_native_gradient(eqn))
        or (versions.name(eqn) in _PASSED_THROUGH and any(map(has_max_pool, versions.sub_jaxprs(eqn))))
        for eqn in jaxpr.jaxpr.eqns
    )


# Walk


@dataclass
class _Planner:
    rules: tuple[Rule, ...]
    backend: str
    replaces: bool
    found: dict[str, Layer] = field(default_factory=dict)
    left: dict[str, LeftInFloat] = field(default_factory=dict)
    replaced: list[Replaced] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    shard_maps: tuple[JaxprEqn, ...] = ()  # around the equation at hand
    is_in_rule: bool = False  # the walk is inside a custom rule

    def layout(self) -> Layout:
        unused = tuple(str(r) for i, r in enumerate(self.rules) if i not in self.used)
        return Layout(tuple(self.found.values()), tuple(self.left.values()), unused, tuple(self.replaced))

    def walk(
        self, jaxpr: ClosedJaxpr, labels: list[Label], stack: tuple[int, ...], scope: str
    ) -> tuple[Plan, list[Label]]:
        """Plan of a jaxpr whose inputs have these labels, and the labels of its outputs."""
        known: dict[Any, Label] = dict(zip(jaxpr.jaxpr.invars, labels, strict=True))
        known |= dict.fromkeys(jaxpr.jaxpr.constvars, _CONSTANT)

        def label_of(var) -> Label:
            return _CONSTANT if isinstance(var, Literal) else known[var]

        nodes: dict[int, Node] = {}
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            inputs = [label_of(v) for v in eqn.invars]
            node, outputs = self._visit(eqn, inputs, stack, _join_scope(scope, versions.scope(eqn)))
            if node is not None:
                nodes[i] = node
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return Plan(jaxpr, nodes), [label_of(v) for v in jaxpr.jaxpr.outvars]

    def _visit(self, eqn, inputs: list[Label], stack, scope):
        """(node or None, labels of the outputs) of one equation."""
        name = versions.name(eqn)
        outputs = [_join(inputs)] * len(eqn.outvars)
        if name in PRODUCTS:
            return self._product(eqn, inputs, stack, scope), outputs
        if reason := _reason_left_in_float(eqn):
            self._leave(scope or name, eqn, reason)
            return None, outputs
        if name == max_pool.PRIMITIVE and self.replaces and max_pool.has_native_gradient(eqn):
            by = f"gradient by a custom call ({xla_ops.isa()})"
            self.replaced.append(Replaced(scope or name, name, by))
            return MaxPool(), outputs
        if name not in RAGGED and all(map(self._is_passed_over(name), versions.sub_jaxprs(eqn))):
            return None, outputs
        visit = _BODIES.get(eqn.primitive.name, _Planner._unreachable)
        node, outputs = visit(self, eqn, inputs, stack, scope)
        return (node if node is not None and any(body.nodes for body in node.bodies) else None), outputs

    def _is_passed_over(self, name: str) -> Callable[[ClosedJaxpr], bool]:
        if self.replaces and name in _PASSED_THROUGH:
            return lambda body: _is_passed_over(body) and not has_max_pool(body)
        return _is_passed_over

    def _unreachable(self, eqn, inputs, stack, scope):
        """A primitive whose body cannot be replayed: left in float if a rule says so, else an error."""
        name = _join_scope(scope, versions.name(eqn))
        bodies = versions.sub_jaxprs(eqn)
        if not any(map(has_product, bodies)):
            inside = {
                e.primitive.name: None for b in bodies for e in _equations(b) if _reason_left_in_float(e)
            }
            self._leave(name, eqn, f"{', '.join(inside)} inside stays in float")
            return None, [_join(inputs)] * len(eqn.outvars)
        index, rule = self._rule_for(name, eqn, None)
        if index is None or rule.quantize:
            raise NotImplementedError(
                f"{name} at {versions.source_line(eqn)} hides a matrix product or convolution that "
                "apt_quantize cannot reach; call it outside the quantized function, or leave it in float "
                f"with Rule({re.escape(name)!r}, quantize=False)"
            )
        self._leave(name, eqn, f"rule {str(rule)!r}")
        return None, [_join(inputs)] * len(eqn.outvars)

    # Bodies

    def _call(self, eqn, inputs, stack, scope):
        (body,) = versions.sub_jaxprs(eqn)
        plan, outputs = self.walk(body, inputs, stack, scope)
        return Nested((plan,)), outputs

    def _ragged(self, eqn, inputs, stack, scope):
        body = ragged_program(eqn)
        if body is None:
            self._leave(
                scope or eqn.primitive.name, eqn, "this form of ragged_dot_general has none in fixed point"
            )
            return None, [_join(inputs)] * len(eqn.outvars)
        plan, outputs = self.walk(body, inputs, stack, scope)
        return Nested((plan,)), outputs

    def _scan(self, eqn, inputs, stack, scope):
        consts, carry = versions.scan_parts(eqn)
        scanned = inputs[consts + carry :]
        is_over_layers = any(label is not None and label.path for label in scanned)
        inner = (*stack, eqn.params["length"]) if is_over_layers else stack
        labels = [*inputs[:consts], *[None] * carry, *scanned]
        (body,) = versions.sub_jaxprs(eqn)
        plan, outputs = self.walk(body, labels, inner, scope)
        return Nested((plan,), is_over_layers), outputs

    def _while(self, eqn, inputs, stack, scope):
        c, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry: list[Label] = [None] * (len(inputs) - c - b)
        test, _ = self.walk(versions.closed(eqn.params["cond_jaxpr"]), [*inputs[:c], *carry], stack, scope)
        program = versions.closed(eqn.params["body_jaxpr"])
        body, outputs = self.walk(program, [*inputs[c : c + b], *carry], stack, scope)
        return Nested((test, body)), outputs

    def _cond(self, eqn, inputs, stack, scope):
        walks = [self.walk(b, inputs[1:], stack, scope) for b in versions.sub_jaxprs(eqn)]
        outputs = [_join(labels) for labels in zip(*(out for _, out in walks), strict=True)]
        return Nested(tuple(plan for plan, _ in walks)), outputs

    def _shard_map(self, eqn, inputs, stack, scope):
        outer, self.shard_maps = self.shard_maps, (*self.shard_maps, eqn)
        node, outputs = self._call(eqn, inputs, stack, scope)
        self.shard_maps = outer
        return node, outputs

    def _custom_rule(self, eqn, inputs, stack, scope):
        """The function's own products, and those of the gradient that its author wrote.

        A rule inside another is a call: the outer one's gradient has its derivative already, and may call
        the very function that it is the rule of.
        """
        if self.is_in_rule:
            return self._call(eqn, inputs, stack, scope)
        self.is_in_rule = True
        (body,) = versions.sub_jaxprs(eqn)
        forward, outputs = self.walk(body, inputs, stack, scope)
        program = versions.gradient_program(eqn, self.shard_maps)
        cotangents: list[Label] = [_GRADIENT] * (len(program.in_avals) - len(inputs))
        gradient, _ = self.walk(program, [*inputs, *cotangents], stack, scope)
        self.is_in_rule = False
        return Nested((forward, gradient)), outputs

    # Products

    def _product(self, eqn: JaxprEqn, inputs, stack, scope) -> QuantizedProduct | None:
        is_weight_lhs = _is_weight_lhs(*inputs)
        other, weight = reversed(inputs) if is_weight_lhs else inputs
        parameter = weight if weight not in (None, _CONSTANT, _GRADIENT) else None
        name = layer_name(parameter.path) if parameter else scope or eqn.primitive.name
        if _GRADIENT in inputs:
            name = f"{name}/gradient"
        if _is_integer_product(eqn):
            self._leave(name, eqn, "an integer product is exact already")
            return None
        if _is_elementwise(eqn):
            self._leave(name, eqn, "nothing is summed: it multiplies element by element")
            return None
        index, rule = self._rule_for(name, eqn, parameter)
        if not rule.quantize:
            self._leave(name, eqn, f"rule {str(rule)!r}")
            return None
        _check_dtypes(eqn, name)
        backend, reason = choose_backend(rule.backend or self.backend)
        layer = Layer(
            name=name,
            primitive=eqn.primitive.name,
            stack=stack,
            weight_shape=parameter.shape if parameter else None,
            widths=(_widths(rule, other), _widths(rule, weight), candidates(rule.grads)),
            backend=backend,
            reason=reason,
            rule=str(rule) if index is not None else None,
            gemms=tuple(rule.gemms),
            rounding=rule.rounding,
        )
        return QuantizedProduct(self._register(layer, bool(parameter)), is_weight_lhs)

    def _rule_for(self, name: str, eqn, parameter: Label) -> tuple[int | None, Rule]:
        shape = parameter.shape if parameter else None
        for i, rule in enumerate(self.rules):
            if rule.hits(name, versions.name(eqn), shape):
                self.used.add(i)
                return i, rule
        return None, _DEFAULT_RULE

    def _register(self, layer: Layer, is_shared: bool) -> str:
        """The layer's name; a parameter's further uses share its entry, others get a number."""
        for name in _numbered(layer.name):
            if name not in self.found:
                self.found[name] = layer._replace(name=name)
                return name
            if is_shared and self.found[name] == layer._replace(name=name):
                return name
        raise AssertionError("unreachable: the numbers do not end")

    def _leave(self, name: str, eqn: JaxprEqn, reason: str) -> None:
        name = next(n for n in _numbered(name) if n not in self.left)
        self.left[name] = LeftInFloat(name, versions.name(eqn), reason)


_PASSED_THROUGH = ("scan", "cond", "jit", "remat2", "shard_map", *versions.CALL)

_BODIES = {
    "scan": _Planner._scan,
    "while": _Planner._while,
    "cond": _Planner._cond,
    **dict.fromkeys(versions.CUSTOM_RULE, _Planner._custom_rule),
    **dict.fromkeys(("jit", "remat2", *versions.CALL), _Planner._call),
    "shard_map": _Planner._shard_map,
    **dict.fromkeys(RAGGED, _Planner._ragged),
}


def _numbered(name: str):
    return itertools.chain([name], (f"{name}#{k}" for k in itertools.count(1)))


def _join_scope(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


def _join(labels: Sequence[Label]) -> Label:
    """Label of a value computed from values with these labels."""
    if _GRADIENT in labels:
        return _GRADIENT
    if None in labels:
        return None
    return max((p for p in labels if p is not None), key=lambda p: p.size, default=_CONSTANT)


def _is_weight_lhs(lhs: Label, rhs: Label) -> bool:
    if lhs in (None, _GRADIENT) or rhs in (None, _GRADIENT):
        return rhs in (None, _GRADIENT) and lhs not in (None, _GRADIENT)
    return lhs.size > rhs.size


def _widths(rule: Rule, label: Label) -> tuple[int, ...]:
    if label == _GRADIENT:
        return candidates(rule.grads)
    return candidates(rule.acts if label is None else rule.weights)


def _is_integer_product(eqn: JaxprEqn) -> bool:
    return all(jnp.issubdtype(versions.aval(v).dtype, jnp.integer) for v in eqn.invars)


def _is_elementwise(eqn: JaxprEqn) -> bool:
    """A `dot_general` without contracting dimensions, as einsum writes a scale or an outer product."""
    return eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][0][0]


def _check_dtypes(eqn: JaxprEqn, name: str) -> None:
    """Integers beside floats are fine: the replay takes their float32 value, as XLA does."""
    allowed = (jnp.float32, jnp.bfloat16, jnp.float16)
    for var in (*eqn.invars, *eqn.outvars):
        dtype = versions.aval(var).dtype
        is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
        if dtype not in allowed and not (is_integer and var in eqn.invars):
            raise TypeError(
                f"layer {name}: {eqn.primitive.name} at {versions.source_line(eqn)} has "
                f"{dtype} values; apt_quantize takes float32, bfloat16 and float16, and integers beside "
                f"them (results are float32 sums). Cast them, or leave the layer in float with "
                f"Rule({name!r}, quantize=False)"
            )


def choose_backend(requested: str) -> tuple[str, str]:
    """The backend that runs here and why.

    Raises:
      RuntimeError: "native" was asked for by name and cannot run here; the message says why.
    """
    if requested in ("emulate", "xla"):
        return requested, "asked for"
    obstacle = _native_obstacle()
    if requested == "native":
        if obstacle:
            raise RuntimeError(f"backend 'native' cannot run here: {obstacle}")
        return "native", f"asked for ({xla_ops.isa()})"
    if obstacle:
        return "xla", f"native cannot run: {obstacle}"
    return "native", f"CPU with {xla_ops.isa()}"


def _native_obstacle() -> str:
    if versions.platform() != "cpu":
        return f"JAX runs on {versions.platform()}, native is for the CPU"
    return "" if xla_ops.is_available() else xla_ops.unavailable_reason()


def warn_unused_rules(layout: Layout) -> None:
    """Warns of rules that hit no layer, with the names that there are."""
    if layout.unused_rules:
        names = [layer.name for layer in layout.layers] + [left.name for left in layout.left_in_float]
        warnings.warn(
            f"no layer is hit by the rule(s) {', '.join(map(repr, layout.unused_rules))}; the layers are "
            f"{', '.join(names) or 'none'}",
            stacklevel=4,
        )
