"""A scan over time, as in a recurrent network: weight gradients are computed once, after it.

    in the loop    dW = sum over steps t of X_t^T . dY_t     every step reads and writes all of dW
    after it       dW = X^T . dY                             one product over all steps

The loop stacks the codes of X_t, its reverse the gradients dY_t; products whose results are added, as an
LSTM's of its input and its last output, share one stack. Formats are the same at all steps unless this
training step measures: then each step of the loop has chosen its own, and the sum runs over the steps.
Where dY is rounded at random, dW has draws of its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn, Literal, jaxpr_as_fun

from jax_apt import _jax_versions as versions
from jax_apt.fixed_point import Fixed
from jax_apt.ops import Site, X, product_without_weight_gradient, weight_product
from jax_apt.plan import Plan, QuantizedProduct
from jax_apt.products import PRODUCTS, Operand, Program, Programs, trace_programs

# Which products


class Deferred(NamedTuple):
    """Products of a loop's body whose weight gradient is computed after the loop."""

    products: dict[int, int]  # their equations, and the number of each one's weight
    weights: tuple[Any, ...]  # variables that hold their weights, each once
    hoisted: tuple[int, ...]  # equations that compute these from the loop's constants


def find_deferred(plan: Plan, num_consts: int, can_defer: Callable[[QuantizedProduct], bool]) -> Deferred:
    """Finds products of a loop-invariant weight, which is used for nothing else in the body."""
    jaxpr = plan.jaxpr.jaxpr
    maker: dict[Any, int | None] = dict.fromkeys((*jaxpr.constvars, *jaxpr.invars[:num_consts]))
    for i, eqn in enumerate(jaxpr.eqns):
        is_known = all(isinstance(v, Literal) or v in maker for v in eqn.invars)
        if is_known and i not in plan.nodes and not eqn.effects:
            maker |= dict.fromkeys(eqn.outvars, i)
    found: dict[int, Any] = {}
    for i, node in plan.nodes.items():
        if isinstance(node, QuantizedProduct) and can_defer(node):
            x, w = _operands(jaxpr.eqns[i], node.is_weight_lhs)
            if not isinstance(w, Literal) and w in maker and x not in maker:
                found[i] = w
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    as_weight = Counter(found.values())
    found = {i: w for i, w in found.items() if uses[w] == as_weight[w]}
    weights = tuple(dict.fromkeys(found.values()))
    products = {i: weights.index(w) for i, w in found.items()}
    return Deferred(products, weights, _makers(jaxpr.eqns, maker, weights))


def _operands(eqn: JaxprEqn, is_weight_lhs: bool) -> tuple[Any, Any]:
    lhs, rhs = eqn.invars
    return (rhs, lhs) if is_weight_lhs else (lhs, rhs)


def _makers(eqns: Sequence[JaxprEqn], maker: dict, variables) -> tuple[int, ...]:
    """Equations from which the variables follow, in order."""
    needed, stack = set(), list(variables)
    while stack:
        i = None if isinstance(v := stack.pop(), Literal) else maker[v]
        if i is not None and i not in needed:
            needed.add(i)
            stack += eqns[i].invars
    return tuple(sorted(needed))


def hoist(plan: Plan, deferred: Deferred, consts: Sequence) -> list:
    """Values of the deferred products' weights, from the loop's constants."""
    jaxpr = plan.jaxpr.jaxpr
    values: dict = dict(zip(jaxpr.constvars, plan.jaxpr.consts, strict=True))
    values |= dict(zip(jaxpr.invars, consts, strict=False))
    for i in deferred.hoisted:
        eqn = jaxpr.eqns[i]
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        values |= dict(zip(eqn.outvars, versions.bind(eqn, inputs), strict=True))
    return [values[v] for v in deferred.weights]


# The loop

Probe = tuple[Array | None, Array]  # zeros whose cotangents are dY, and its bits and exponent as float32


class Later(NamedTuple):
    """What the replay of a body needs whose weight gradients are computed later."""

    weights: dict  # variable -> value
    probes: dict[int, Probe]  # product -> probe; empty where nothing is differentiated
    codes: dict[int, tuple[Fixed, Array]]  # product -> X and its count of NaN; filled by the replay

    def product(self, i: int, site: Site, lhs: Array, rhs: Array, formats: Array, tap: Array) -> Array:
        """The product of equation `i`; its codes are kept."""
        out, self.codes[i] = product_without_weight_gradient(site, lhs, rhs, formats, tap, self.probes[i])
        return out


NOTHING_LATER = Later({}, {}, {})


def probe_shapes(site: Site, steps: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of a product's probe, for all steps."""
    (out,) = site.programs.forward.jaxpr.out_avals
    return (
        jax.ShapeDtypeStruct((steps, *out.shape), jnp.float32),
        jax.ShapeDtypeStruct((steps, 2), jnp.float32),
    )


class Loop(NamedTuple):
    """A scan that `differentiate_later` runs."""

    run: Callable  # (weights, values, formats, probes) -> (outputs, codes by product)
    gradient: Callable  # (product, its codes, cotangents of its probe, formats) -> dW
    probes: dict[int, tuple]  # product -> shapes of its probe
    weight_of: dict[int, int]  # product -> number of its weight


def differentiate_later(loop: Loop, weights: list, values: list, formats) -> list:
    """The loop's outputs; differentiated, its weight gradients are products over all steps.

    Args:
      loop: the scan.
      weights: of the deferred products.
      values: everything else that may be differentiated, and what goes with it.
      formats: int32 formats by layer.
    """

    @jax.custom_vjp
    def scanned(weights, values, formats):
        return loop.run(weights, values, formats, {})[0]

    def forward(*args):
        weights, values, formats = jax.tree.map(lambda leaf: leaf.value, args)
        perturbed = {i: leaf.value for i, leaf in enumerate(args[1]) if leaf.perturbed}
        probes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), loop.probes)

        def of_perturbed(perturbed, probes):
            merged = [perturbed.get(i, value) for i, value in enumerate(values)]
            return loop.run(weights, merged, formats, probes)

        first = find_equal_gradients(of_perturbed, perturbed, probes)
        probes = {i: probe if first[i] == i else (None, probe[1]) for i, probe in probes.items()}
        out, pullback, codes = jax.vjp(of_perturbed, perturbed, probes, has_aux=True)
        return out, (pullback, codes, first, formats)

    def backward(residuals, cotangents):
        pullback, codes, first, formats = residuals
        perturbed, probes = _begin_late(pullback, [_instantiated(c) for c in cotangents], formats)
        gradients: list = [None] * len(weights)
        for i, number in loop.weight_of.items():
            probe = probes[first[i]][0], probes[i][1]
            gradient = loop.gradient(i, codes[i], probe, formats).astype(weights[number].dtype)
            earlier = gradients[number]
            gradients[number] = gradient if earlier is None else earlier + gradient
        return gradients, [perturbed.get(i) for i in range(len(values))], None

    scanned.defvjp(forward, backward, symbolic_zeros=True)
    return scanned(weights, values, formats)


def _begin_late(pullback: Callable, cotangents: list, formats) -> tuple:
    """What the pullback returns, from a branch that is always taken; not inside a `shard_map`.

    The stack of dY begins as zeros, which depend on nothing: XLA allocates them before the forward loop. In a
    branch it cannot, and the stacks of the two loops are never in memory together.
    """
    run = partial(pullback, cotangents)
    if any(versions.varying_axes(c) for c in cotangents):
        return run()
    bits = jax.tree.leaves(formats)[0][..., 0, 0]
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
    return lax.cond(jnp.min(bits) > 0, run, zeros)


def _instantiated(cotangent):
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return np.zeros(aval.shape, aval.dtype)


# Equal gradients


def find_equal_gradients(run: Callable, perturbed, probes: dict[int, Probe]) -> dict[int, int]:
    """For each product the first whose dY is the same, by the operations that the reverse loop applies.

    Args:
      run: (perturbed, probes) -> (outputs, codes), a loop.
      perturbed: its arguments.
      probes: of its products.
    """
    first = {i: i for i in probes}
    if len(probes) < 2:
        return first

    def gradients(perturbed, probes):
        out, pullback, _ = jax.vjp(run, perturbed, probes, has_aux=True)
        return {i: dy for i, (dy, _) in pullback(jax.tree.map(jnp.ones_like, out))[1].items()}

    jaxpr = jax.make_jaxpr(gradients)(perturbed, probes).jaxpr
    loops = {v: eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" for v in eqn.outvars}
    known: dict = {}
    seen: dict = {}
    for i, var in zip(sorted(probes), jaxpr.outvars, strict=True):
        loop = None if isinstance(var, Literal) else loops.get(var)
        if loop is not None:
            body = versions.closed(loop.params["jaxpr"])
            inputs = [(id(loop), n) for n in range(len(body.jaxpr.invars))]
            names = name_values(body.jaxpr, known, [*map(id, body.consts), *inputs])
            result = body.jaxpr.outvars[loop.outvars.index(var)]
            if not isinstance(result, Literal):
                first[i] = seen.setdefault(names[result], i)
    return first


def name_values(jaxpr, known: dict, given: Sequence) -> dict[Any, Any]:
    """A name for each variable of a jaxpr; the same where the same operations made the same of the same.

    Args:
      jaxpr: whose calls are looked into.
      known: names of results, by operation and operands; grows.
      given: names of constants and inputs.
    """
    names: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

    def name(v):
        is_literal = isinstance(v, Literal)
        return (str(versions.aval(v)), np.asarray(v.val).tobytes()) if is_literal else names[v]

    for eqn in jaxpr.eqns:
        inputs = tuple(map(name, eqn.invars))
        if eqn.primitive.name in ("jit", "remat2"):
            (body,) = versions.sub_jaxprs(eqn)
            inner = name_values(body.jaxpr, known, [*map(id, body.consts), *inputs])
            results = [name(v) if isinstance(v, Literal) else inner[v] for v in body.jaxpr.outvars]
        else:
            key = (eqn.primitive, inputs, tuple(sorted(eqn.params.items())))
            key = key if _is_hashable(key) and not eqn.effects else object()
            results = [known.setdefault((key, i), object()) for i in range(len(eqn.outvars))]
        names |= dict(zip(eqn.outvars, results, strict=True))
    return names


def _is_hashable(key) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


# The weight gradient over all steps


def weight_gradient(
    site: Site, codes: tuple[Fixed, Array], probe: tuple[Array, Array], training_step: Array
) -> Array:
    """Sum over steps of X_t^T . dY_t.

    Args:
      site: the product of one step.
      codes: of X, and how many values were NaN or infinite; a leading axis of steps in every array.
      probe: cotangents: float32 dY (steps, *shape of y), and (steps, 2) bits and exponent.
      training_step: int32 scalar, of random rounding.

    Returns:
      float32, shape of W. The exact sum rounded once, if all steps have the same formats.
    """
    (number, nonfinite), (dy, dy_formats) = codes, probe
    bits, exponents = jnp.moveaxis(dy_formats.astype(jnp.int32), 1, 0)
    formats = (number.bits, number.exponent, bits, exponents)
    x_widths = tuple(dict.fromkeys(site.widths[X]))
    is_uniform = jnp.all(jnp.stack([jnp.all(f == f[0]) for f in formats]))

    def dy_format(bits, exponent):
        return jnp.stack([bits, exponent, jnp.zeros_like(bits), training_step])

    def together():
        eqn, x_shape, join_x, join_dy = _joined(site, dy.shape[0])
        is_planes = site.backend == "native"
        codes = jnp.moveaxis(number.codes, 1, 0) if is_planes else number.codes
        codes = (jax.vmap(join_x) if is_planes else join_x)(codes)
        joined = Operand(Fixed(codes, formats[0][0], formats[1][0]), x_widths, jnp.sum(nonfinite))
        shapes = (_weight_shape(site), x_shape) if site.is_weight_lhs else (x_shape, _weight_shape(site))
        program = _weight_program(site.is_weight_lhs, trace_programs(eqn, *shapes))
        return weight_product(site, program, joined, join_dy(dy), dy_format(bits[0], exponents[0]))

    def step_by_step():
        program = _weight_program(site.is_weight_lhs, site.programs)

        def add(total, step):
            codes, formats, dy, nonfinite = step
            x_t = Operand(Fixed(codes, formats[0], formats[1]), x_widths, nonfinite)
            return total + weight_product(site, program, x_t, dy, dy_format(*formats[2:])), None

        steps = (number.codes, jnp.stack(formats, 1), dy, nonfinite)
        return lax.scan(add, jnp.zeros(_weight_shape(site), jnp.float32), steps)[0]

    return lax.cond(is_uniform, together, step_by_step)


def _weight_program(is_weight_lhs: bool, programs: Programs) -> Program:
    return programs.lhs_gradient if is_weight_lhs else programs.rhs_gradient


def _weight_shape(site: Site) -> tuple[int, ...]:
    return site.programs.forward.jaxpr.in_avals[0 if site.is_weight_lhs else 1].shape


def _joined(site: Site, steps: int) -> tuple[JaxprEqn, tuple[int, ...], Callable, Callable]:
    """The product of all steps at once, as JAX's own batching rule makes it.

    Returns:
      (equation, shape of its X, X of all steps -> its X, dY of all steps -> its dY)
    """
    program = site.programs.forward.jaxpr
    axes = (None, 0) if site.is_weight_lhs else (0, None)
    shapes = [
        jax.ShapeDtypeStruct(aval.shape if axis is None else (steps, *aval.shape), jnp.float32)
        for aval, axis in zip(program.in_avals, axes, strict=True)
    ]
    jaxpr = jax.make_jaxpr(jax.vmap(lambda *x: jaxpr_as_fun(program)(*x)[0], axes))(*shapes).jaxpr
    x_var = jaxpr.invars[1 if site.is_weight_lhs else 0]
    (at,) = (i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name in PRODUCTS)
    eqn = jaxpr.eqns[at]
    joined_x = eqn.invars[1 if site.is_weight_lhs else 0]

    def evaluate(eqns, start, value, end):
        values = {start: value}
        for e in eqns:
            values |= dict(zip(e.outvars, versions.bind(e, [values[v] for v in e.invars]), strict=True))
        return values[end]

    def leave(y):
        return evaluate(jaxpr.eqns[at + 1 :], eqn.outvars[0], y, jaxpr.outvars[0])

    y_shape = jax.ShapeDtypeStruct(versions.aval(eqn.outvars[0]).shape, jnp.float32)
    return (
        eqn,
        versions.aval(joined_x).shape,
        lambda x: evaluate(jaxpr.eqns[:at], x_var, x, joined_x),
        lambda dy: jax.linear_transpose(leave, y_shape)(dy)[0],
    )
