"""Where each parameter of a planned function goes: into products as codes, or elsewhere as float.

Quantization acts element by element, so whatever only moves elements or casts them may as well be done to
the codes. A parameter that reaches the weight side of a product through such operations alone can be
quantized once; any other use needs its float value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.extend.core import JaxprEqn, Literal

from jax_apt import _jax_versions as versions
from jax_apt.plan import Nested, Plan, QuantizedProduct
from jax_apt.state import Layer

_MOVES = (
    "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice", "dynamic_slice",
)  # fmt: skip
_SAME = ("copy", "copy_p", "sharding_constraint", "pvary", "pcast", "convert_element_type")


class ProductUse(NamedTuple):
    """A layer that takes the parameter as its weight."""

    layer: str
    casts: tuple[str, ...]  # dtypes that it goes through before


@dataclass
class Uses:
    """Everything that is done with one parameter."""

    products: dict[ProductUse, None] = field(default_factory=dict)  # an ordered set
    others: dict[str, None] = field(default_factory=dict)  # what needs its float value


def find_uses(plan: Plan, count: int, layers: dict[str, Layer]) -> list[Uses]:
    """The uses of the first `count` inputs of a function in its forward pass.

    Args:
      plan: the planned function.
      count: how many of its inputs are parameters.
      layers: the function's layers by name.
    """
    walk = _Walk(layers, [Uses() for _ in range(count)])
    others = len(plan.jaxpr.jaxpr.invars) - count
    outputs = walk.body(plan, [_Trail(i) for i in range(count)] + [None] * others)
    walk.need_float(outputs, "returned")
    return walk.uses


def forward_layers(plan: Plan) -> set[str]:
    """Names of the layers whose products run in the forward pass."""
    names = set()
    for i, node in plan.nodes.items():
        if isinstance(node, QuantizedProduct):
            names.add(node.layer)
        elif isinstance(node, Nested):
            names |= set().union(*map(forward_layers, forward_bodies(plan.jaxpr.jaxpr.eqns[i], node)))
    return names


def forward_bodies(eqn: JaxprEqn, node: Nested) -> tuple[Plan, ...]:
    """The bodies of an equation that run in the forward pass: of a custom rule not its gradient."""
    return node.bodies if versions.name(eqn) in ("cond", "while") else node.bodies[:1]


def moves_codes(eqn: JaxprEqn) -> bool:
    """Whether the equation only moves or casts the elements of its first operand."""
    if eqn.primitive.name == "convert_element_type":
        return all(versions.is_float(versions.aval(v)) for v in (*eqn.invars, *eqn.outvars))
    return eqn.primitive.name in (*_MOVES, *_SAME)


def is_inlined(eqn: JaxprEqn) -> bool:
    """Whether an equation without products is replayed in place where a parameter goes through it."""
    return versions.name(eqn) == "jit"


def takes_codes(eqn: JaxprEqn) -> list[bool]:
    """For each input of an equation with bodies, whether codes may go into them in place of floats."""
    name, count = versions.name(eqn), len(eqn.invars)
    if name == "scan":
        consts, carry = versions.scan_parts(eqn)
        return [i < consts or i >= consts + carry for i in range(count)]
    if name == "while":
        consts = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        return [i < consts for i in range(count)]
    return [True] * count


class _Trail(NamedTuple):
    """A value that is a parameter but for casts and moved elements."""

    parameter: int
    casts: tuple[str, ...] = ()
    slices: int = 0  # scans over layers that have sliced it
    is_moved: bool = False


Trails = list[_Trail | None]


@dataclass
class _Walk:
    layers: dict[str, Layer]
    uses: list[Uses]

    def body(self, plan: Plan, trails: Sequence[_Trail | None]) -> Trails:
        """Notes the uses in a jaxpr; returns the trails of its outputs."""
        known = dict(zip(plan.jaxpr.jaxpr.invars, trails, strict=True))

        def trail_of(var):
            return None if isinstance(var, Literal) else known.get(var)

        for i, eqn in enumerate(plan.jaxpr.jaxpr.eqns):
            inputs = [trail_of(v) for v in eqn.invars]
            if any(inputs):
                outputs = self.equation(eqn, plan.nodes.get(i), inputs)
                known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [trail_of(v) for v in plan.jaxpr.jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, node, inputs: Trails) -> Trails:
        nothing: Trails = [None] * len(eqn.outvars)
        if isinstance(node, QuantizedProduct):
            self.product(eqn, node, inputs)
        elif isinstance(node, Nested):
            self.nested(eqn, node, inputs)
        elif is_inlined(eqn):
            (program,) = versions.sub_jaxprs(eqn)
            return self.body(Plan(program, {}), inputs)
        elif moves_codes(eqn) and not any(inputs[1:]):
            return [_moved(eqn, inputs[0])]
        else:
            self.need_float(inputs, f"{versions.name(eqn)} at {versions.source_line(eqn)}")
        return nothing

    def product(self, eqn: JaxprEqn, node: QuantizedProduct, inputs: Trails) -> None:
        x, weight = reversed(inputs) if node.is_weight_lhs else inputs
        layer = self.layers[node.layer]
        self.need_float([x], f"quantized as the activation of {layer.name}")
        if weight is None:
            return
        if "fwd" not in layer.gemms:
            self.need_float([weight], f"the forward product of {layer.name} is in float")
        elif weight.slices != len(layer.stack):
            self.need_float([weight], f"{layer.name} has a precision per slice, and all use this weight")
        else:
            self.uses[weight.parameter].products[ProductUse(layer.name, weight.casts)] = None

    def nested(self, eqn: JaxprEqn, node: Nested, inputs: Trails) -> None:
        name, line = versions.name(eqn), versions.source_line(eqn)
        takes = takes_codes(eqn)
        self.need_float(
            [t for t, is_taken in zip(inputs, takes, strict=True) if not is_taken],
            f"carried by the {name} at {line}",
        )
        inputs = [t if is_taken else None for t, is_taken in zip(inputs, takes, strict=True)]
        for body, entering in zip(forward_bodies(eqn, node), _entering(eqn, node, inputs), strict=True):
            self.need_float(self.body(body, entering), f"a result of the {name} at {line}")

    def need_float(self, trails: Sequence[_Trail | None], reason: str) -> None:
        for trail in trails:
            if trail is not None:
                self.uses[trail.parameter].others[reason] = None


def _moved(eqn: JaxprEqn, trail: _Trail | None) -> _Trail | None:
    if trail is None:
        return None
    if eqn.primitive.name == "convert_element_type":
        return trail._replace(casts=(*trail.casts, str(versions.aval(eqn.outvars[0]).dtype)))
    return trail if eqn.primitive.name in _SAME else trail._replace(is_moved=True)


def _entering(eqn: JaxprEqn, node: Nested, inputs: Trails) -> list[Trails]:
    """Trails of the inputs of each body in the forward pass."""
    name = versions.name(eqn)
    if name == "cond":
        return [inputs[1:] for _ in node.bodies]
    if name == "while":
        c, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry: Trails = [None] * (len(inputs) - c - b)
        return [[*inputs[:c], *carry], [*inputs[c : c + b], *carry]]
    if name == "scan":
        consts, carried = versions.scan_parts(eqn)
        return [[*inputs[: consts + carried], *map(_sliced, inputs[consts + carried :])]]
    return [inputs]


def _sliced(trail: _Trail | None) -> _Trail | None:
    """A slice of a scan over layers. Codes of moved elements would not have their exponents in front."""
    if trail is None:
        return None
    return trail._replace(slices=-1 if trail.is_moved or trail.slices < 0 else trail.slices + 1)
