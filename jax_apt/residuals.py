"""What the backward pass keeps of the forward pass: what it cannot cheaply make again.

JAX keeps every value that a derivative reads. Behind a convolution, batch normalization and relu read three
of the size of its result y: y, y - mean, and where the sum is positive. All three are elementwise functions
of y and of values as small as the mean, so here the backward pass makes them again, when it gets there.

XLA's compiler for CPUs merges equal operations and ignores an optimization barrier, so that `jax.checkpoint`
saves nothing: what is to be made again already exists. So y comes through a custom call that gives its own
operand back, in place, and that takes a gradient of the layers behind as a second operand: what is made from
it is new to XLA, and is not made before that gradient is there.

y is made again too, from the codes of its operands, which are kept anyway, if it sums few terms: such a
product takes hardly longer than to write its result. How many are few is a matter of the instruction set.
With `recompute="products"` every product is.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jax_apt import _jax_versions as versions
from jax_apt import xla_ops
from jax_apt.config import Recompute
from jax_apt.derivatives import in_no_derivative
from jax_apt.state import Layer, Layout
from jax_apt.xla_ops.partitioning import may_be_split

# A value is kept in any case, like a mean of each channel, if it has at most so many bytes and is so many
# times smaller than the largest residual.
_SMALL, _SMALLER = 1 << 14, 64
# Terms of a sum that is made again. With as many an element of a product takes about as long as to write and
# read what it would have been: 1152 are a 3 x 3 convolution of 128 channels, on an accelerator or with AMX.
# AMX, AVX-512 VNNI and AVX2 were timed; the others stand at the rates of their instructions.
_SHORT, _SHORT_OF_ISA = 1152, {"amx": 1152, "avx512vnni": 576, "avxvnni": 144, "neon_i8mm": 144, "avx2": 72}
_MAX_ROOTS = 3  # kept values that one is made from; more would recompute a whole path of shortcuts

_NAMES = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type broadcast_in_dim "
    "cbrt ceil clamp clz complex concatenate conj convert_element_type copy cos cosh div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow iota is_finite le log log1p log2 "
    "logistic lt max min mul mulhi ne neg nextafter not one_minus_square or pad polynomial "
    "population_count pow real reduce_precision rem reshape rev round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square squeeze stack "
    "stop_gradient sub tan tanh tile transpose xor"
)
_ELEMENTWISE = frozenset(_NAMES.split())


def value_and_grad(
    function: Callable,
    arguments: tuple,
    layouts: Sequence[Layout],
    *,
    has_aux: bool,
    recompute: Recompute = "short_products",
) -> tuple[Any, tuple[Any, ...]]:
    """`jax.value_and_grad` with respect to all arguments, with few residuals.

    Nothing is saved outside `jax.jit`, where JAX runs and frees one operation after the other.

    Args:
      function: returns a float scalar, or (scalar, aux) if `has_aux`.
      arguments: pytrees of float arrays.
      layouts: of the precision states that the function uses; whether custom calls may run is in them.
      has_aux: whether the function returns auxiliary data.
      recompute: what the backward pass may compute again.

    Returns:
      (value, gradients), as `jax.value_and_grad` has them.
    """
    if recompute == "nothing" or not any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
        positions = tuple(range(len(arguments)))
        return jax.value_and_grad(function, argnums=positions, has_aux=has_aux)(*arguments)
    forward = _trace(function, arguments, has_aux)
    program, results = forward.program, forward.results
    values = program.run([in_no_derivative(x) for x in jax.tree.leaves(arguments)])
    loss, *aux = (values[v] for v in program.outputs[:results])

    def pull_back(residuals, cotangent):
        return jax.tree.unflatten(forward.pullback, residuals)(cotangent)

    is_native = any(_has_native(layout.layers) for layout in layouts)
    later = partial(_later, is_native=is_native)
    residuals, cotangent = program.outputs[results:], later(jnp.ones_like(loss), loss)
    types = [jax.typeof(values[v]) for v in residuals]
    closed, shapes = jax.make_jaxpr(pull_back, return_shape=True)(types, jax.typeof(cotangent))
    again = _Again(values, *_choose(program, results, _longest(recompute, is_native)), later)
    gradients = _run_backward(_flatten(closed), residuals, cotangent, again)
    gradients = jax.tree.unflatten(jax.tree.structure(shapes), gradients)
    return (loss, forward.with_aux(aux)) if has_aux else loss, gradients


def with_few_residuals(step: Callable, layers: Iterable[Layer]) -> Callable:
    """The step of a loop; there a plain remat will do, since XLA cannot merge the bodies of two loops."""
    longest = _longest("short_products", _has_native(layers))

    def is_kept(primitive, *operands, **params) -> bool:
        terms = _count_terms(primitive.name, operands, params)
        return primitive.name not in _ELEMENTWISE and terms > longest

    return jax.checkpoint(step, prevent_cse=False, policy=is_kept)


def _has_native(layers: Iterable[Layer]) -> bool:
    return any(layer.backend == "native" for layer in layers)


def _longest(recompute: Recompute, is_native: bool) -> int:
    """Terms that a product may sum to be made again."""
    short = _SHORT_OF_ISA.get(xla_ops.isa(), 0) if is_native else _SHORT
    return {"elementwise": 0, "short_products": short, "products": sys.maxsize}[recompute]


# Programs: jaxprs as graphs, with the jits in them written out


@dataclass(eq=False)
class _Value:
    """A variable or constant."""

    aval: Any
    step: "_Step | None" = None  # that makes it
    constant: Any = None  # where neither a step makes it nor the caller gives it

    def size(self) -> int:
        """In bytes."""
        dtype = self.aval.dtype
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        return math.prod(self.aval.shape) * (0 if is_key else dtype.itemsize)


@dataclass(eq=False)
class _Step:
    eqn: JaxprEqn
    number: int  # in its program
    inputs: list[_Value]
    outputs: list[_Value] = field(default_factory=list)

    def run(self, inputs: Sequence) -> dict[_Value, Any]:
        return dict(zip(self.outputs, versions.bind(self.eqn, list(inputs)), strict=True))


@dataclass
class _Program:
    inputs: list[_Value]
    steps: list[_Step]
    outputs: list[_Value]

    def run(self, arguments: Sequence) -> dict[_Value, Any]:
        """Every value of the program."""
        values = dict(zip(self.inputs, arguments, strict=True))
        for v in (*(v for step in self.steps for v in step.inputs), *self.outputs):
            if v.constant is not None:
                is_given = isinstance(v.constant, Tracer) and versions.is_float(v.constant)
                values[v] = in_no_derivative(v.constant) if is_given else v.constant
        for step in self.steps:
            values |= step.run([values[v] for v in step.inputs])
        return values


def _flatten(closed: ClosedJaxpr) -> _Program:
    inputs = [_Value(versions.aval(v)) for v in closed.jaxpr.invars]
    steps: list[_Step] = []
    return _Program(inputs, steps, _add_steps(closed, inputs, steps))


def _add_steps(closed: ClosedJaxpr, inputs: Sequence[_Value], steps: list[_Step]) -> list[_Value]:
    """Appends the steps of a jaxpr; returns its outputs."""
    known = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    constants = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    known |= {v: _Value(versions.aval(v), constant=x) for v, x in constants}

    def read(v) -> _Value:
        return _Value(versions.aval(v), constant=v.val) if isinstance(v, Literal) else known[v]

    for eqn in closed.jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "jit" and not any(map(any, versions.jit_shardings(eqn))):
            made = _add_steps(versions.closed(eqn.params["jaxpr"]), given, steps)
        else:
            steps.append(step := _Step(eqn, len(steps), given))
            made = step.outputs = [_Value(versions.aval(v), step) for v in eqn.outvars]
        known |= dict(zip(eqn.outvars, made, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


# Forward


@dataclass
class _Forward:
    """A traced function; its program gives loss and array leaves of aux, the `results`, and the residuals."""

    program: _Program
    results: int
    pullback: Any  # tree of the pullback, whose leaves are the residuals
    aux: list  # leaves; None where the program gives it
    aux_tree: Any

    def with_aux(self, arrays: Sequence) -> Any:
        remaining = iter(arrays)
        return jax.tree.unflatten(self.aux_tree, [next(remaining) if x is None else x for x in self.aux])


def _trace(function: Callable, arguments: tuple, has_aux: bool) -> _Forward:
    leaves, tree = jax.tree.flatten(arguments)
    found: dict[str, Any] = {}

    def forward(*leaves):
        loss, pullback, *aux = jax.vjp(function, *jax.tree.unflatten(tree, leaves), has_aux=has_aux)
        _check_loss(loss)
        aux, found["aux_tree"] = jax.tree.flatten(aux[0] if has_aux else None)
        residuals, found["pullback"] = jax.tree.flatten(pullback)
        is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in aux]
        found["aux"] = [None if a else x for x, a in zip(aux, is_array, strict=True)]
        results = [loss, *(x for x, a in zip(aux, is_array, strict=True) if a)]
        found["results"] = len(results)
        return [*results, *residuals]

    return _Forward(_flatten(jax.make_jaxpr(forward)(*leaves)), **found)


def _check_loss(loss) -> None:
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(loss)):
        raise TypeError(f"the loss must be a real scalar, got {loss}; return (loss, aux) with has_aux=True")
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        kind = jax.typeof(loss).str_short()
        raise TypeError(f"the loss must be a real scalar, for a gradient is taken of it; got {kind}")


# Choice


def _choose(program: _Program, results: int, longest: int) -> tuple[set[_Value], set[_Value]]:
    """(values that are kept, those of them whose origin is hidden from XLA).

    Hidden are those that other residuals are made from, even if small: XLA would merge what is made of them
    with what the forward pass has made; and those that could be made too: XLA would make these in the
    backward pass, and keep alive what they are made from.

    Args:
      program: gives results, then residuals.
      results: how many of the former.
      longest: terms that a product may sum to be made again.
    """
    residuals = program.outputs[results:]
    small = min(_SMALL, max((v.size() for v in residuals), default=0) // _SMALLER)
    roots = _find_roots(program, results, small, longest)
    groups: dict[frozenset[_Value], set[_Value]] = {}
    for v in residuals:
        groups.setdefault(roots[v], set()).add(v)
    vectors = {v for v in roots if v.size() <= small}
    kept = {v for v in residuals if roots[v] == {v}} | vectors
    enlarging = (step for step in program.steps if any(v.size() > small for v in step.outputs))
    hidden = {v for step in enlarging for v in step.inputs if v in vectors and v.aval.shape and v.size()}
    for needed, group in sorted(groups.items(), key=lambda item: len(item[0])):
        new, made = needed - kept, group - kept
        gain = sum(v.size() for v in made) - sum(v.size() for v in new)
        kept |= new if gain > 0 else made
        if gain > 0:
            hidden |= needed
        elif gain < 0:
            hidden |= made
    return kept, hidden


def _find_roots(program: _Program, results: int, small: int, longest: int) -> dict[_Value, frozenset[_Value]]:
    """The large values that each is an elementwise function of; itself if there are many, or it is none.

    What the program takes and its results live through the backward pass anyway: nothing is made from them.
    """
    roots = {v: frozenset({v}) for v in (*program.inputs, *program.outputs)}
    fixed = {*program.inputs, *program.outputs[:results]}
    for step in program.steps:
        for v in step.inputs:
            if v.step is None:
                roots[v] = frozenset({v})
                fixed.add(v)
        found = frozenset().union(*(roots[v] for v in step.inputs if v.size() > small))
        terms = _count_terms(step.eqn.primitive.name, [v.aval for v in step.inputs], step.eqn.params)
        can_recompute = _is_elementwise(step.eqn) or terms <= longest
        is_made = can_recompute and len(found) <= _MAX_ROOTS and not found & fixed
        roots |= {v: found if is_made else frozenset({v}) for v in step.outputs}
    return roots


def _is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether it costs no more than to read its operands and write its results."""
    if eqn.primitive.name in ("custom_jvp_call", "jit"):
        return all(_is_elementwise(inner) for body in versions.sub_jaxprs(eqn) for inner in body.jaxpr.eqns)
    return eqn.primitive.name in _ELEMENTWISE


def _count_terms(primitive: str, operands: Sequence, params: Mapping[str, Any]) -> float:
    """That a product sums for an element of its result; infinity for everything else."""
    if primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(operands[0].shape[d] for d in contracted)
    if primitive == "conv_general_dilated":
        shape, dims = operands[1].shape, params["dimension_numbers"].rhs_spec
        return math.prod(shape) / shape[dims[0]]
    if primitive == "ffi_call" and params["target_name"] == "jax_apt_product":
        return xla_ops.count_terms(dict(params["attributes"]), operands[4].shape)
    return math.inf


# Backward


class _Again:
    """The forward pass's values as the backward pass reads them: kept, or made again when asked for."""

    def __init__(self, values: dict[_Value, Any], kept: set[_Value], hidden: set[_Value], later: Callable):
        self.values, self.kept, self.hidden, self.later = values, kept, hidden, later
        self.ready: dict[_Value, Any] = {}

    def get(self, value: _Value, after: Array) -> Any:
        for step in self._steps(value):
            self.ready |= step.run([self._kept(v, after) for v in step.inputs])
        return self._kept(value, after)

    def _steps(self, value: _Value) -> list[_Step]:
        """Those that make a value from what is ready or kept, in order."""
        steps: set[_Step] = set()
        unknown = [value]
        while unknown:
            v = unknown.pop()
            if v in self.ready or v in self.kept or v.step is None or v.step in steps:
                continue
            steps.add(v.step)
            unknown += v.step.inputs
        return sorted(steps, key=lambda step: step.number)

    def _kept(self, value: _Value, after: Array) -> Any:
        if value not in self.ready:
            x = self.values[value]
            self.ready[value] = self.later(x, after) if value in self.hidden else x
        return self.ready[value]


def _run_backward(program: _Program, residuals: Sequence[_Value], cotangent: Array, again: _Again) -> list:
    """The gradients; every residual is asked for where it is first read.

    Args:
      program: takes the residuals, then the cotangent.
    """
    is_residual = dict(zip(program.inputs, residuals, strict=False))
    values = {program.inputs[-1]: cotangent}
    after = cotangent  # the latest of the values that depend on it

    def read(v: _Value):
        if v.constant is not None:
            return v.constant
        return again.get(is_residual[v], after) if v in is_residual else values[v]

    late = {program.inputs[-1]}
    for step in program.steps:
        after = next((values[v] for v in step.inputs if v in late), after)
        is_late = any(v in late for v in step.inputs)
        made = step.run([read(v) for v in step.inputs])
        values |= made
        late |= made.keys() if is_late else set()
    return [read(v) for v in program.outputs]


def _later(x: Array, after: Array, is_native: bool) -> Array:
    """`x`, which XLA takes for a new value, made after `after`."""
    axes, others = versions.varying_axes(x), versions.varying_axes(after)
    if is_native and not may_be_split() and others <= axes:
        return versions.as_varying(xla_ops.barrier(x, versions.as_varying(after, axes)), axes)
    return lax.optimization_barrier((x, after))[0]
