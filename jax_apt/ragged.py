"""Ragged products as ordinary ones: every group's rows masked out of the operand, groups summed or stacked.

    out[m] = sum over g, k of [m in group g] * lhs[m, k] * rhs[g, k, n]        ragged rows
    out[g] = sum over k of [k in group g] * lhs[m, k] * rhs[k, n]              ragged depth

It is how JAX itself computes `ragged_dot_general` without a kernel of its own, and takes as many copies of
the ragged operand as there are groups. Rows of no group are zero.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jax_apt import _jax_versions as versions


def ragged_program(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """(lhs, rhs, group_sizes) -> out by one `dot_general`; None for a form that has none here."""
    form = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = form.dot_dimension_numbers
    (dim,) = form.lhs_ragged_dimensions
    avals = [versions.aval(v) for v in eqn.invars]
    is_plain = len(avals) == 3 and avals[2].ndim == 1 and eqn.params["group_offset"] is None
    if not is_plain or dim in batch[0] or (dim in contracting[0] and batch[0]):
        return None

    def program(lhs: Array, rhs: Array, sizes: Array) -> Array:
        masked = _one_copy_per_group(lhs, sizes, dim)
        depth = ([d + 1 for d in contracting[0]], list(contracting[1]))
        if dim not in contracting[0]:
            depth = ([0, *depth[0]], [*form.rhs_group_dimensions, *depth[1]])
        dims = (depth, ([d + 1 for d in batch[0]], batch[1]))
        return lax.dot_general(
            masked,
            rhs,
            dims,
            precision=eqn.params["precision"],
            preferred_element_type=versions.aval(eqn.outvars[0]).dtype,
        )

    return jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))


def _one_copy_per_group(x: Array, sizes: Array, dim: int) -> Array:
    """(groups, *x.shape): in each copy the slices along `dim` that belong to its group, else zeros."""
    ends = jnp.cumsum(sizes)[:, None]
    place = jnp.arange(x.shape[dim], dtype=ends.dtype)[None]
    is_member = (place < ends) & (place >= ends - sizes[:, None])
    shape = [1] * (x.ndim + 1)
    shape[0], shape[dim + 1] = is_member.shape
    return jnp.where(is_member.reshape(shape), x[None], jnp.zeros((), x.dtype))
