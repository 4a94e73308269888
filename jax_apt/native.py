"""Products on the CPU's integer instructions: any product as one of the three of a plain convolution.

A `dot_general` or `conv_general_dilated` is brought to the layout that `jax_apt.xla_ops` knows: channels
last, three spatial dimensions, no dilation of the input. Each of its three tensors then plays a role, x, w
or y, and which product is asked for follows from the role of its result:

    y from x and w: forward        x from y and w: input gradient        w from x and y: filter gradient

A transposed convolution (dilated input, stride 1) is the input gradient of an ordinary one, so there the
input plays y and the result x. Codes are held in limb planes: an array with a leading axis of bytes.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jax_apt import xla_ops
from jax_apt.fixed_point import Fixed
from jax_apt.xla_ops.partitioning import partitioned

TENSORS = ("lhs", "rhs", "out")

_KIND: dict[str, xla_ops.Kind] = {"y": "forward", "x": "input_gradient", "w": "filter_gradient"}
_OPERANDS = {"y": "xw", "x": "yw", "w": "xy"}


class Role(NamedTuple):
    """What one tensor of a product is to the convolution, and how it is laid out there."""

    name: str  # "x", "w" or "y"
    enter: Callable[[Array], Array]  # to the layout of `Geometry.shapes()`
    leave: Callable[[Array], Array]  # back


class NativeForm(NamedTuple):
    geometry: xla_ops.Geometry
    roles: dict[str, Role]  # by TENSORS
    dims: dict[str, tuple[str, ...]]  # by TENSORS: names of dimensions; see `xla_ops.partitioning`
    whole: frozenset[str]  # dimensions that devices never share
    part: Callable[[Mapping[str, int]], "NativeForm"]  # one device's, where names are split in so many


def as_native(eqn: JaxprEqn, lhs_shape, rhs_shape) -> NativeForm | None:
    """The product as the custom call knows it; None if it has no such form.

    That is a convolution with batch groups, or with both a stride and a dilated input.
    """
    if eqn.primitive.name == "dot_general":
        return _dot(eqn.params["dimension_numbers"], tuple(lhs_shape), tuple(rhs_shape))
    params = eqn.params
    is_transposed = any(d != 1 for d in params["lhs_dilation"])
    if params["batch_group_count"] != 1:
        return None
    if is_transposed and any(s != 1 for s in params["window_strides"]):
        return None
    return _conv(params, tuple(lhs_shape), tuple(rhs_shape), is_transposed)


def run_native(form: NativeForm, target: str, operands: dict[str, tuple[Fixed, Array]]) -> Array:
    """float32 tensor `target` from the other two, given by name as numbers in limb planes.

    Beside each number stands how many of its values were NaN or infinite; what they contribute to is NaN.

    On sharded operands each device multiplies its own part. Where the dimension that is summed over is
    sharded, the partial results are exact, each rounded once, and added in float32.
    """
    role = form.roles[target]
    names = {form.roles[name].name: name for name in operands}
    lhs, rhs = (names[x] for x in _OPERANDS[role.name])
    (a, a_nonfinite), (b, b_nonfinite) = operands[lhs], operands[rhs]
    run = partitioned(
        partial(_run_part, form, target, lhs, rhs),
        (("limbA", *form.dims[lhs]), ("limbB", *form.dims[rhs]), *[()] * 6),
        (form.dims[target],),
        form.whole | {"limbA", "limbB"},
    )
    formats = a.bits, a.exponent, b.bits, b.exponent
    (out,) = run(a.codes, b.codes, *formats, a_nonfinite, b_nonfinite)
    return out


def can_quantize_gradient(form: NativeForm, target: str) -> bool:
    """Whether `run_weight_gradient` has the product whose result is this tensor."""
    return form.roles[target].name == "w" and form.geometry.is_matrices()


def run_weight_gradient(
    form: NativeForm, target: str, x: tuple[Fixed, Array], dy: Array, dy_format: Array, seed: int | None
) -> Array:
    """`run_native` of planes of X and a float32 dY, which is quantized where the kernel lays it out.

    Args:
      form: of the product; not sharded.
      target: the weight, among TENSORS.
      x: the number in limb planes, and how many of its values were NaN or infinite.
      dy: float32.
      dy_format: int32 (4,): bits, exponent, a number that is not read, and the training step.
      seed: of random rounding; None: to nearest.
    """
    (source,) = (name for name in TENSORS if form.roles[name].name == "x")
    number, nonfinite = x
    planes = jax.vmap(form.roles[source].enter)(number.codes)
    out = xla_ops.weight_gradient(
        form.geometry,
        planes,
        (number.bits, number.exponent),
        form.roles["out"].enter(dy),
        dy_format,
        nonfinite=nonfinite,
        seed=seed,
    )
    return form.roles[target].leave(out)


def _run_part(form: NativeForm, target: str, lhs: str, rhs: str, parts, a, b, *scalars) -> tuple[Array]:
    form = form.part(parts) if parts else form
    role = form.roles[target]
    enter_a, enter_b = (jax.vmap(form.roles[name].enter) for name in (lhs, rhs))
    kind = _KIND[role.name]
    out = xla_ops.product(
        kind, form.geometry, enter_a(a), enter_b(b), scalars[:4], nonfinite=(scalars[4], scalars[5])
    )
    return (role.leave(out),)


# Limb planes


def zero_planes(number: Fixed) -> Array:
    """uint8 (limbs,): the bytes of the code 0."""
    limbs_in_use = (number.bits + 7) // 8
    top = jnp.arange(number.codes.shape[0]) == limbs_in_use - 1
    return jnp.where(top, jnp.uint8(128), jnp.uint8(0))


# Forms


def _dot(dimension_numbers, lhs_shape, rhs_shape) -> NativeForm:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = [d for d in range(len(lhs_shape)) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(len(rhs_shape)) if d not in (*rhs_contract, *rhs_batch)]
    out_shape = [lhs_shape[d] for d in (*lhs_batch, *lhs_free)] + [rhs_shape[d] for d in rhs_free]

    def size(shape, dims):
        return math.prod(shape[d] for d in dims)

    one = (1, 1, 1)
    rows = (1, 1, size(lhs_shape, lhs_free))
    geometry = xla_ops.Geometry(
        matrices=size(lhs_shape, lhs_batch),
        batch=1,
        inputs=rows,
        outputs=rows,
        window=one,
        stride=one,
        pad=(0, 0, 0),
        dilation=one,
        groups=1,
        in_channels=size(lhs_shape, lhs_contract),
        out_channels=size(rhs_shape, rhs_free),
    )
    orders = {
        "x": ("lhs", (*lhs_batch, *lhs_free, *lhs_contract), lhs_shape),
        "w": ("rhs", (*rhs_batch, *rhs_contract, *rhs_free), rhs_shape),
        "y": ("out", tuple(range(len(out_shape))), tuple(out_shape)),
    }
    shapes = geometry.shapes()
    roles = {
        tensor: Role(name, *_rearrangement(order, shape, shapes[name]))
        for name, (tensor, order, shape) in orders.items()
    }
    dims = _dot_dims(dimension_numbers, lhs_free, rhs_free)

    def part(parts):
        shapes = (_part_of(lhs_shape, dims["lhs"], parts), _part_of(rhs_shape, dims["rhs"], parts))
        return _dot(dimension_numbers, *shapes)

    return NativeForm(geometry, roles, dims, frozenset(), part)


def _dot_dims(dimension_numbers, lhs_free, rhs_free) -> dict[str, tuple[str, ...]]:
    """Names of dimensions: b batch, k contracted, m and n free."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers

    def named(*kinds):
        return {d: f"{letter}{i}" for letter, dims in kinds for i, d in enumerate(dims)}

    lhs = named(("b", lhs_batch), ("k", lhs_contract), ("m", lhs_free))
    rhs = named(("b", rhs_batch), ("k", rhs_contract), ("n", rhs_free))
    out = [lhs[d] for d in (*lhs_batch, *lhs_free)] + [rhs[d] for d in rhs_free]
    return {
        "lhs": tuple(lhs[d] for d in range(len(lhs))),
        "rhs": tuple(rhs[d] for d in range(len(rhs))),
        "out": tuple(out),
    }


def _part_of(shape, dims: tuple[str, ...], parts: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size // parts.get(name, 1) for size, name in zip(shape, dims, strict=True))


def matrix_form(lhs_shape, rhs_shape) -> NativeForm:
    """A batch of plain products: (B, M, K) x (B, K, N)."""
    return _dot((((2,), (1,)), ((0,), (0,))), lhs_shape, rhs_shape)


def _rearrangement(order, shape, canonical) -> tuple[Callable, Callable]:
    """A transposition followed by a reshape from `shape`, and its inverse."""
    middle = tuple(shape[d] for d in order)
    inverse = tuple(order.index(d) for d in range(len(order)))
    return (
        lambda x: x.transpose(order).reshape(canonical),
        lambda x: x.reshape(middle).transpose(inverse),
    )


def _conv(params, lhs_shape, rhs_shape, is_transposed: bool) -> NativeForm:
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    geometry = _conv_geometry(params, lhs_shape, rhs_shape, is_transposed)
    lhs_order = (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    out_order = (out_spec[0], *out_spec[2:], out_spec[1])
    rhs_order = (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    shapes = geometry.shapes()
    out_shape = _out_shape(out_spec, geometry.batch, params, lhs_shape, rhs_shape)
    x, y = ("y", "x") if is_transposed else ("x", "y")
    enter_w, leave_w = _rearrangement(rhs_order, rhs_shape, shapes["w"])
    if is_transposed:
        spatial = len(lhs_spec) - 2
        enter_w, leave_w = _swapped_filter(rhs_order, rhs_shape, spatial, geometry.groups, shapes["w"])
    roles = {
        "lhs": Role(x, *_rearrangement(lhs_order, lhs_shape, shapes[x])),
        "rhs": Role("w", enter_w, leave_w),
        "out": Role(y, *_rearrangement(out_order, out_shape, shapes[y])),
    }
    dims = _conv_dims(params["dimension_numbers"])
    whole = {d for names in dims.values() for d in names if d[0] in "iwo"}
    whole |= {"c", "f"} if geometry.groups > 1 else set()

    def part(parts):
        shapes = (_part_of(lhs_shape, dims["lhs"], parts), _part_of(rhs_shape, dims["rhs"], parts))
        return _conv(params, *shapes, is_transposed)

    return NativeForm(geometry, roles, dims, frozenset(whole), part)


def _conv_geometry(params, lhs_shape, rhs_shape, is_transposed: bool) -> xla_ops.Geometry:
    lhs_spec, rhs_spec, _ = params["dimension_numbers"]
    inputs, window = (
        _three(tuple(shape[d] for d in spec[2:]), 1)
        for shape, spec in ((lhs_shape, lhs_spec), (rhs_shape, rhs_spec))
    )
    pads = _three(tuple(low for low, _ in params["padding"]), 0)
    dilation = _three(params["rhs_dilation"], 1)
    channels, features = lhs_shape[lhs_spec[1]], rhs_shape[rhs_spec[0]]
    outputs = _three(_conv_outputs(params, lhs_shape, rhs_shape), 1)
    if is_transposed:
        # Output o meets input i where o + t * dilation - pad = i * stride. With t' = window - 1 - t that
        # reads o + pad' - t' * dilation = i * stride: the input gradient of a convolution from o to i.
        pads = _three([(k - 1) * d - p for k, d, p in zip(window, dilation, pads, strict=True)], 0)
        inputs, outputs = outputs, inputs
        channels, features = features, channels
    return xla_ops.Geometry(
        matrices=1,
        batch=lhs_shape[lhs_spec[0]],
        inputs=inputs,
        outputs=outputs,
        window=window,
        stride=_three(params["lhs_dilation" if is_transposed else "window_strides"], 1),
        pad=pads,
        dilation=dilation,
        groups=params["feature_group_count"],
        in_channels=channels,
        out_channels=features,
    )


def _conv_dims(dimension_numbers) -> dict[str, tuple[str, ...]]:
    """Names of dimensions: n batch, c channels, f features; i, w and o space, which stays whole."""

    def named(spec, first, second, letter):
        names = {spec[0]: first, spec[1]: second} | {d: f"{letter}{i}" for i, d in enumerate(spec[2:])}
        return tuple(names[d] for d in range(len(spec)))

    lhs_spec, rhs_spec, out_spec = dimension_numbers
    return {
        "lhs": named(lhs_spec, "n", "c", "i"),
        "rhs": named(rhs_spec, "f", "c", "w"),
        "out": named(out_spec, "n", "f", "o"),
    }


def _three(values, fill: int) -> tuple[int, int, int]:
    """Values of up to three spatial dimensions, filled up in front."""
    first, second, third = (fill,) * (3 - len(values)) + tuple(values)
    return first, second, third


def _conv_outputs(params, lhs_shape, rhs_shape) -> tuple[int, ...]:
    lhs_spec, rhs_spec, _ = params["dimension_numbers"]
    outputs = []
    for d, (low, high) in enumerate(params["padding"]):
        size, taps = lhs_shape[lhs_spec[2 + d]], rhs_shape[rhs_spec[2 + d]]
        length = max((size - 1) * params["lhs_dilation"][d] + 1, 0) + low + high
        reach = (taps - 1) * params["rhs_dilation"][d] + 1
        outputs.append(max((length - reach) // params["window_strides"][d] + 1, 0))
    return tuple(outputs)


def _out_shape(out_spec, batch, params, lhs_shape, rhs_shape) -> tuple[int, ...]:
    features = rhs_shape[params["dimension_numbers"].rhs_spec[0]]
    values = (batch, features, *_conv_outputs(params, lhs_shape, rhs_shape))
    shape = [0] * len(values)
    for dim, value in zip(out_spec, values, strict=True):
        shape[dim] = value
    return tuple(shape)


def _swapped_filter(order, shape, spatial: int, groups: int, canonical):
    """Reverses the taps and swaps inner channels and features, group by group; and the way back."""
    window = tuple(shape[d] for d in order[:spatial])
    inner, features = shape[order[spatial]], shape[order[spatial + 1]]
    split = (*window, inner, groups, features // groups)
    swap = (*range(spatial), spatial + 2, spatial + 1, spatial)
    taps = tuple(range(spatial))
    inverse = tuple(order.index(d) for d in range(len(order)))

    def enter(w: Array) -> Array:
        w = jnp.flip(w.transpose(order), taps)
        return w.reshape(split).transpose(swap).reshape(canonical)

    def leave(w: Array) -> Array:
        swapped = tuple(split[d] for d in swap)
        w = w.reshape(swapped).transpose(swap).reshape(*window, inner, features)
        return jnp.flip(w, taps).transpose(inverse)

    return enter, leave
