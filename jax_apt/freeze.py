"""Forward on frozen weights: `freeze` quantizes them once, `apply_frozen` runs on their codes.

The codes stay what `fixed_point.quantize` makes, on every backend. What the function does to a parameter on
its way to a product (transposes, slices, casts) is done to the codes, so the result equals that of
`apply` bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from jax_apt import _jax_versions as versions
from jax_apt import xla_ops
from jax_apt.fixed_point import Fixed, container, quantize
from jax_apt.frozen import (
    Frozen,
    FrozenLayer,
    FrozenLayout,
    FrozenWeight,
    SharedWeight,
    frozen_leaves,
    is_array,
    is_frozen,
    leaf_name,
)
from jax_apt.ops import Site, forward_product, frozen_product
from jax_apt.plan import Nested, Plan, QuantizedProduct
from jax_apt.products import Operand, Program, Programs, trace_forward
from jax_apt.state import AptState, Layer, check_same_layers, check_state, formats
from jax_apt.transform import NOTHING_LATER, AptFunction, Later, Sites, _Replayer, _trace
from jax_apt.weight_uses import (
    ProductUse,
    Uses,
    find_uses,
    forward_bodies,
    forward_layers,
    is_inlined,
    moves_codes,
    takes_codes,
)

# Freezing


def freeze(q: AptFunction, variables: Any, state: AptState, *args, **kwargs) -> Frozen:
    """Integer weights with exponents, and the formats of the activations.

    A parameter that reaches products as their weight, moved or cast but not computed with, becomes codes: one
    byte an element at 8 bits. The others stay as they are; `Frozen.report` says which and why.

    Args:
      q: the quantized function.
      variables: trained parameters, as `q.apply` takes them.
      state: the precision state after training.
      *args, **kwargs: the rest of the function's arguments as inference has them, for example
        `train=False`; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TypeError: `q` was not made by `apt_quantize`, `state` is no AptState, or one of the arrays is traced.
      ValueError: the state belongs to another function, or a weight has NaN or infinite values.
    """
    _check_function(q, "freeze(q, variables, state, ...)")
    check_state(state, "freeze(q, variables, state, ...)")
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((variables, state))):
        raise TypeError("freeze looks at the values of variables and state: call it outside of jax.jit")
    traced = _trace(_forward_only(q), variables, args, kwargs)
    check_same_layers(state, traced.layout)
    layers = {layer.name: layer for layer in traced.layout.layers}
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    uses = find_uses(traced.plan, sum(is_array(leaf) for _, leaf in leaves), layers)
    remaining, new_leaves, weights = iter(uses), [], []
    for path, leaf in leaves:
        new = leaf
        if is_array(leaf):
            new, weight = _freeze_leaf(leaf_name(path), leaf, next(remaining), state)
            weights.append(weight)
        new_leaves.append(new)
    table, forward = formats(replace(state, taps=None)), forward_layers(traced.plan)
    frozen = tuple(_frozen_layer(layer, state, layer.name in forward) for layer in layers.values())
    return Frozen(
        variables=jax.tree.unflatten(tree, new_leaves),
        formats={name: table[name][..., :2, :].at[..., 3].set(0) for name in layers},
        layout=FrozenLayout(frozen, tuple(weights)),
    )


def _check_function(q, call: str) -> None:
    if not isinstance(q, AptFunction):
        raise TypeError(f"{call}: q must be made by apt_quantize, got {type(q).__name__}")


def _forward_only(q: AptFunction) -> AptFunction:
    return replace(q, replace_slow=False)  # these are gradients


def _frozen_layer(layer: Layer, state: AptState, is_forward: bool) -> FrozenLayer:
    precision, widths, is_settled = state[layer.name], [], True
    for tensor, candidates in zip(("x", "w"), layer.widths, strict=False):
        is_measured = bool(np.all(np.asarray(precision[tensor].updates) > 0))
        in_use = sorted(set(np.asarray(precision[tensor].bits).ravel().tolist()))
        widths.append(tuple(in_use) if is_measured else candidates)
        is_settled &= is_measured
    has_weight = is_forward and layer.weight_shape is not None and "fwd" in layer.gemms
    is_settled |= not is_forward
    return FrozenLayer(layer.name, layer.stack, (*widths, layer.widths[2]), has_weight, is_settled)


def _freeze_leaf(path: str, leaf: Array, uses: Uses, state: AptState) -> tuple[Any, FrozenWeight]:
    numbers: dict[tuple, int] = {}  # format -> its number
    layers, requantized = [], []
    for use in uses.products:
        precision = state[use.layer]["w"]
        if np.all(np.asarray(precision.updates) > 0):
            key = (use.casts, *(tuple(np.ravel(x).tolist()) for x in (precision.bits, precision.exponent)))
            layers.append((use, numbers.setdefault(key, len(numbers))))
        else:
            requantized.append((use.layer, "never measured"))
    weight = FrozenWeight(
        path=path,
        shape=tuple(np.shape(leaf)),
        dtype=str(leaf.dtype),
        layers=tuple((use.layer, number) for use, number in layers),
        in_float=tuple(uses.others),
        requantized=tuple(requantized),
    )
    codes = [_codes(path, leaf, next(u for u, n in layers if n == i), state) for i in range(len(numbers))]
    needs_value = bool(uses.others or requantized)
    if not codes:
        return leaf, weight
    if len(codes) == 1 and not needs_value:
        return codes[0], weight
    return SharedWeight(tuple(codes), leaf if needs_value else None), weight


def _codes(path: str, leaf: Array, use: ProductUse, state: AptState) -> Fixed:
    """The parameter in the format of a layer; in a scan over layers each slice in its own."""
    precision = state[use.layer]["w"]
    value = jnp.asarray(leaf)
    for dtype in (*use.casts, "float32"):
        value = value.astype(dtype)
    nonfinite = int(jnp.sum(~jnp.isfinite(value)))
    if nonfinite:
        raise ValueError(f"{path} has {nonfinite} NaN or infinite values: there is nothing to freeze")
    bits, exponent = (
        x.reshape(*x.shape, *[1] * (value.ndim - x.ndim)) for x in (precision.bits, precision.exponent)
    )
    with jax.numpy_rank_promotion("allow"):
        codes = quantize(value, bits, exponent, container(int(np.max(precision.bits))))
    return Fixed(codes, precision.bits, precision.exponent)


# Running


def apply_frozen(q: AptFunction, frozen: Frozen, *args, **kwargs) -> Any:
    """`q.apply` on frozen weights: the same result, bit for bit, without quantizing them again.

    It is the forward pass alone and has no derivative.

    Args:
      q: the quantized function, on any backend.
      frozen: what `freeze` made of its parameters.
      *args, **kwargs: the rest of the function's arguments; their sizes may differ from those at `freeze`.

    Raises:
      TypeError: `q` was not made by `apt_quantize`, `frozen` is no Frozen, or a derivative is taken.
      ValueError: the function has other layers than the frozen model, or it uses the float value of a
        weight that was not kept; the message names them.
    """
    _check_function(q, "apply_frozen(q, frozen, ...)")
    if not isinstance(frozen, Frozen):
        raise TypeError(f"apply_frozen(q, frozen, ...): frozen must be a Frozen, got {type(frozen).__name__}")
    leaves, tree = frozen_leaves(frozen.variables)
    infos = iter(frozen.layout.weights)
    pairs = [(leaf, next(infos) if is_array(leaf) or is_frozen(leaf) else None) for leaf in leaves]
    shapes = [_shape(leaf, info) if is_frozen(leaf) else leaf for leaf, info in pairs]
    traced = _trace(_forward_only(q), jax.tree.unflatten(tree, shapes), args, kwargs)
    weights = [_weight(leaf, info) for leaf, info in pairs if info is not None]
    inputs = [*weights, *traced.inputs[len(weights) :]]
    replayer = _replayer(q, frozen.layout, traced.layout.layers)
    sites = cast(Sites, {x.name: (frozen.formats[x.name], None) for x in traced.layout.layers})
    return jax.tree.unflatten(traced.out_tree, replayer.replay(traced.plan, inputs, sites))


def _shape(leaf, info: FrozenWeight | None) -> jax.ShapeDtypeStruct:
    assert info is not None
    return jax.ShapeDtypeStruct(info.shape, np.dtype(info.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Weight:
    """A frozen parameter on its way to products: all of its arrays are moved alike."""

    codes: tuple[Array, ...]
    value: Array | None
    info: FrozenWeight = field(metadata={"static": True})

    def for_layer(self, name: str) -> Array | None:
        number = dict(self.info.layers).get(name)
        return None if number is None else self.codes[number]

    def moved(self, move: Callable[[Array], Array], convert: Callable[[Array], Array]) -> "_Weight":
        """`move` for all arrays, `convert` for the value alone."""
        value = None if self.value is None else convert(self.value)
        return _Weight(tuple(map(move, self.codes)), value, self.info)


def _weight(leaf, info: FrozenWeight):
    if isinstance(leaf, Fixed):
        return _Weight((leaf.codes,), None, info)
    if isinstance(leaf, SharedWeight):
        return _Weight(tuple(number.codes for number in leaf.numbers), leaf.value, info)
    return leaf


def _replayer(q: AptFunction, frozen: FrozenLayout, layers: tuple[Layer, ...]) -> "_FrozenReplayer":
    known = {layer.name: layer for layer in frozen.layers}
    missing = [layer.name for layer in layers if layer.name not in known]
    missing += [x.name for x in layers if x.name in known and known[x.name].stack != x.stack]
    if missing:
        raise ValueError(
            "the frozen model belongs to another function: it has not the layer(s) "
            f"{', '.join(missing)}, but {', '.join(known) or 'none'}"
        )
    return _FrozenReplayer(
        q.config,
        {name: layer.widths for name, layer in known.items()},
        {layer.name: layer for layer in layers},
        settled=frozenset(layer.name for layer in frozen.layers if layer.is_settled),
    )


class _Forward(NamedTuple):
    """`Programs` of which nothing but the forward one is asked for."""

    forward: Program


@dataclass(frozen=True)
class _FrozenReplayer(_Replayer):
    """Runs a plan forward; an argument may be a `_Weight`."""

    settled: frozenset[str] = frozenset()

    def replay(self, plan: Plan, args, sites: Sites, later: Later = NOTHING_LATER) -> list:
        return list(map(_value, super().replay(plan, args, sites, later)))

    def _plain(self, eqn: JaxprEqn, inputs) -> list:
        if not any(isinstance(x, _Weight) for x in inputs):
            return versions.bind(eqn, inputs)
        if is_inlined(eqn):
            (program,) = versions.sub_jaxprs(eqn)
            return super().replay(Plan(program, {}), inputs, {})
        first, *others = inputs
        if not moves_codes(eqn) or any(isinstance(x, _Weight) for x in others):
            return versions.bind(eqn, list(map(_value, inputs)))

        def run(x):
            return versions.bind(eqn, [x, *others])[0]

        is_cast = eqn.primitive.name == "convert_element_type"
        return [first.moved((lambda codes: codes) if is_cast else run, run)]

    def _product(self, eqn: JaxprEqn, node: QuantizedProduct, inputs, sites: Sites, run, same) -> Array:
        formats, _ = sites[node.layer]
        x, weight = reversed(inputs) if node.is_weight_lhs else inputs
        x, codes = _not_differentiable(_value(x).astype(jnp.float32)), None
        if isinstance(weight, _Weight):
            codes = weight.for_layer(node.layer)
        w = _value(weight).astype(jnp.float32) if codes is None else codes
        axes = self.mesh_axes
        if axes and self.is_typed:
            varying = versions.varying_axes(x) | versions.varying_axes(w)
            x, w = versions.as_varying(x, varying), versions.as_varying(w, varying)
            axes = tuple(a for a in axes if a in varying)
        site = self._site(eqn, node, axes)
        with jax.named_scope(f"apt/{node.layer}"):
            if codes is None:
                out = forward_product(site, *((w, x) if node.is_weight_lhs else (x, w)), formats)
            else:
                out = frozen_product(site, x, _operand(w, formats[1], site), formats)
        return out.astype(versions.aval(eqn.outvars[0]).dtype)

    def _site(self, eqn: JaxprEqn, node: QuantizedProduct, axes: tuple[str, ...] = ()) -> Site:
        """The forward product alone: the depths of its gradients may be symbolic, in an exported program."""
        layer = self.layers[node.layer]
        program = trace_forward(eqn, *(versions.aval(v).shape for v in eqn.invars))
        return Site(
            programs=cast(Programs, _Forward(program)),
            is_weight_lhs=node.is_weight_lhs,
            widths=self.widths[node.layer],
            backend=layer.backend,
            config=self.config,
            gemms=layer.gemms,
            mesh_axes=axes,
            is_settled=node.layer in self.settled,
        )

    def _nested(self, eqn: JaxprEqn, node: Nested, inputs, sites: Sites) -> list:
        takes = takes_codes(eqn)
        inputs = [x if is_taken else _value(x) for x, is_taken in zip(inputs, takes, strict=True)]
        if versions.name(eqn) == "scan":
            return self._run_scan(eqn, node, inputs, sites)[0]
        if len(forward_bodies(eqn, node)) < len(node.bodies):
            return self._call(eqn, node, inputs, sites)
        return super()._nested(eqn, node, inputs, sites)


def _value(x):
    """An argument as it is, a frozen parameter's float value."""
    if not isinstance(x, _Weight):
        return x
    if x.value is None:
        raise ValueError(
            f"{x.info.path} was frozen without its float value, which this call of the function uses: freeze "
            "with the arguments that the function is called with"
        )
    return x.value


@jax.custom_jvp
def _not_differentiable(x: Array) -> Array:
    return x


@_not_differentiable.defjvp
def _refuse_derivative(primals, tangents):
    raise TypeError("apply_frozen is the forward pass alone; differentiate q.apply on the weights themselves")


def _operand(codes: Array, format: Array, site: Site) -> Operand:
    """A frozen weight as an operand of the site's backend."""
    bits, exponent, widths = format[0], format[1], site.widths[1]
    if site.backend == "native":
        codes = _limb_planes(codes, bits, xla_ops.limb_count(widths[-1]))
    return Operand(Fixed(codes, bits, exponent), widths, jnp.float32(0))


def _limb_planes(codes: Array, bits: Array, limbs: int) -> Array:
    """Codes as the CPU's kernels take them: bytes of code + 2**(8 * used - 1), a plane for each."""
    shifted = codes.astype(jnp.int32) + jnp.left_shift(1, 8 * ((bits + 7) // 8) - 1)
    return jnp.stack([(shifted >> (8 * i) & 255).astype(jnp.uint8) for i in range(limbs)])
