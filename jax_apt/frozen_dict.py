"""A frozen model as a plain dictionary of arrays, for any checkpoint library, and back.

format_version  int32 ()         of this dictionary
layout          uint8 (bytes,)   JSON: what is fixed of its layers and weights
weights         nested by the parameters' paths: arrays, or {"codes", "bits", "exponent"}; a weight in
                several formats, or used in float too, has "format_0", ... and perhaps "value"
formats         {"0": int32, ..} formats of the layers' operands, in the layout's order
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_apt.fixed_point import Fixed
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
from jax_apt.state_dict import FORMAT_VERSION, as_bytes, as_tuples, check_version, from_bytes


def frozen_to_state_dict(frozen: Frozen) -> dict[str, Any]:
    """The frozen model as nested dictionaries of arrays, to be saved.

    Raises:
      TypeError: `frozen` is no Frozen.
    """
    if not isinstance(frozen, Frozen):
        raise TypeError(f"frozen_to_state_dict takes what freeze returned, got {type(frozen).__name__}")
    weights: dict[str, Any] = {}
    leaves = [leaf for leaf in frozen_leaves(frozen.variables)[0] if is_array(leaf) or is_frozen(leaf)]
    for info, leaf in zip(frozen.layout.weights, leaves, strict=True):
        *parents, last = info.path.split("/")
        place = weights
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _to_plain(leaf)
    return {
        "format_version": np.array(FORMAT_VERSION, np.int32),
        "layout": as_bytes(layout_to_json(frozen.layout)),
        "weights": weights,
        "formats": {str(i): frozen.formats[x.name] for i, x in enumerate(frozen.layout.layers)},
    }


def frozen_from_state_dict(variables: Any, saved: Mapping[str, Any]) -> Frozen:
    """The frozen model that was saved.

    Args:
      variables: parameters of the function, arrays or `jax.ShapeDtypeStruct`, for their structure alone.
      saved: what `frozen_to_state_dict` returned, as the checkpoint library gives it back.

    Raises:
      TypeError: `saved` is no dictionary.
      ValueError: `saved` is no frozen model, is damaged or of a version that cannot be read; or its
        parameters are not those of `variables`, and the message names the difference.
    """
    check_version(saved, {"weights", "formats"}, "frozen model", "freeze()")
    layout = layout_from_json(from_bytes(saved["layout"]))
    paths, tree = jax.tree_util.tree_flatten_with_path(variables)
    names = [leaf_name(path) for path, leaf in paths if is_array(leaf)]
    known = [weight.path for weight in layout.weights]
    if names != known:
        difference = sorted(set(names) ^ set(known)) or names
        raise ValueError(f"the frozen model has other parameters than `variables`: {', '.join(difference)}")
    weights = iter(layout.weights)
    leaves = [_restored(saved["weights"], next(weights)) if is_array(x) else x for _, x in paths]
    formats = {x.name: jnp.asarray(saved["formats"][str(i)]) for i, x in enumerate(layout.layers)}
    return Frozen(jax.tree.unflatten(tree, leaves), formats, layout)


def _to_plain(leaf) -> Any:
    if isinstance(leaf, Fixed):
        return leaf._asdict()
    if not isinstance(leaf, SharedWeight):
        return leaf
    plain: dict[str, Any] = {f"format_{i}": number._asdict() for i, number in enumerate(leaf.numbers)}
    return plain | ({} if leaf.value is None else {"value": leaf.value})


def _restored(saved: Mapping[str, Any], info: FrozenWeight) -> Any:
    plain: Any = saved
    for part in info.path.split("/"):
        plain = plain[part]
    plain = jax.tree.map(jnp.asarray, plain)
    if not info.is_frozen:
        return plain
    if "codes" in plain:
        return Fixed(**plain)
    count = sum(key.startswith("format_") for key in plain)
    return SharedWeight(tuple(Fixed(**plain[f"format_{i}"]) for i in range(count)), plain.get("value"))


def layout_to_json(layout: FrozenLayout) -> Any:
    """As lists, which `json` writes."""
    return [layout.layers, layout.weights]


def layout_from_json(value: Any) -> FrozenLayout:
    layers, weights = as_tuples(value)
    return FrozenLayout(tuple(FrozenLayer(*x) for x in layers), tuple(FrozenWeight(*x) for x in weights))
