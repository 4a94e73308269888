"""Custom calls on sharded arrays: each device works on its own part, and no operand is gathered.

A call names the dimensions of its operands and results. Those of one name are split together; one that
results lack is summed over, so where it is split the devices' partial results are added (an all-reduce of
float32). XLA hears of it through JAX's `custom_partitioning`: a rule that Shardy propagates shardings by, and
the program of one device.

With a single device, or inside a `shard_map` over the whole mesh, the call stands alone as if this file
did not exist.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Dims = tuple[str, ...]  # names of the dimensions of one array; letters and digits


def partitioned(
    call: Callable, operands: tuple[Dims, ...], results: tuple[Dims, ...], whole: frozenset[str]
) -> Callable:
    """A custom call that XLA may split over devices.

    Args:
      call: `call(parts, *operands)` returns the tuple of results of one device. `parts` maps a name to
        the number of devices that it is split over; names that are not split may be missing.
      operands, results: names of the dimensions of each array. A result is a sum over the names that it
        lacks.
      whole: names that are never split; what is sharded along them is gathered.

    Returns:
      A function of the operands. Under `vmap` the new dimension can be split as well.
    """
    if not may_be_split():
        return partial(call, {})
    split = custom_partitioning(lambda *args: call({}, *args))
    split.def_partition(
        partial(_partition, call, operands, results, whole),
        sharding_rule=_sharding_rule(operands, results, whole),
    )
    run = custom_vmap(split)

    @run.def_vmap
    def with_new_dimension(size, is_batched, *args):
        name = f"vmap{sum(d.startswith('vmap') for d in operands[0])}"
        batched = partitioned(
            lambda parts, *args: jax.vmap(partial(call, parts))(*args),
            tuple((name, *dims) for dims in operands),
            tuple((name, *dims) for dims in results),
            whole,
        )
        full = [
            x if is_new else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_new in zip(args, is_batched, strict=True)
        ]
        return batched(*full), (True,) * len(results)

    return run


def may_be_split() -> bool:
    """Whether a partitioner will see the call: not with one device, nor where every axis is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    is_manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() > 1 and not is_manual


def _sharding_rule(operands, results, whole) -> SdyShardingRule:
    """What Shardy propagates by: dimensions of one name are sharded alike."""
    names = dict.fromkeys(d for dims in (*operands, *results) for d in dims)
    kept = {d for dims in results for d in dims}
    return SdyShardingRule(
        tuple(ArrayMapping(*dims) for dims in operands),
        tuple(ArrayMapping(*dims) for dims in results),
        reduction_factors=tuple(d for d in names if d not in kept and d not in whole),
        need_replication_factors=tuple(d for d in names if d in whole),
    )


def _partition(call, operands, results, whole, mesh, operand_infos, result_infos):
    """The program of one device, and the shardings that it takes and gives; called by XLA's partitioner."""
    arrays = list(zip(operands, operand_infos, strict=True))
    arrays.sort(key=lambda array: -math.prod(array[1].shape))  # the largest stays where it is
    arrays += zip(results, result_infos, strict=True)
    mesh = _named_mesh(mesh, operand_infos)
    axes = _mesh_axes(arrays, whole, mesh)
    parts = {name: _size(mesh, along) for name, along in axes.items()}

    def sharding(dims: Dims) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axes.get(d) for d in dims)))

    def program(*args):
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):  # types of one device's parts say no sharding
            return tuple(
                _summed(out, tuple(a for d, along in axes.items() if d not in dims for a in along))
                for out, dims in zip(call(parts, *args), results, strict=True)
            )

    return mesh, program, tuple(map(sharding, results)), tuple(map(sharding, operands))


def _mesh_axes(arrays, whole, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """Mesh axes that each name is split over: what the first array says, where it divides evenly."""
    axes: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for dims, info in arrays:
        spec = info.sharding.spec if isinstance(info.sharding, NamedSharding) else ()
        for name, size, entry in zip(dims, info.shape, spec, strict=False):
            along = (entry,) if isinstance(entry, str) else tuple(entry or ())
            along = tuple(a for a in along if mesh.shape[a] > 1)
            if name in whole or name in axes or not along or used & set(along):
                continue
            if size % _size(mesh, along) == 0:
                axes[name] = along
                used |= set(along)
    return axes


def _summed(x, axes: tuple[str, ...]):
    return lax.psum(x, axes) if axes else x


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _automatic(mesh: Mesh) -> AbstractMesh:
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _named_mesh(mesh: Mesh, infos) -> Mesh:
    """The mesh; where JAX knows none, all devices of the program in one row, and nothing is split."""
    if not mesh.empty:
        return mesh
    devices = {d for info in infos if info.sharding is not None for d in info.sharding.device_set}
    return Mesh(np.array(sorted(devices, key=lambda d: d.id)), ("devices",))
