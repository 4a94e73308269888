"""The precision state as a plain dictionary of arrays, for any checkpoint library, and back by layer name.

    format_version  int32 ()            of this dictionary
    layers          uint8 (bytes,)      JSON: name, primitive, stack, weight shape and widths of every layer
    step            int32 ()            training steps taken
    precision       {field: (rows, ..)} `TensorPrecision`, rows as in `Layout.rows()`

The layers travel as an array because checkpoint libraries keep arrays, and not all of them keep text.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_apt.qpa import TensorPrecision
from jax_apt.state import AptState, Layer, Layout, check_state

FORMAT_VERSION = 1

_IDENTITY = ("name", "primitive", "stack", "weight_shape", "widths")  # of a layer, as it is saved


def to_state_dict(state: AptState) -> dict[str, Any]:
    """The state as nested dictionaries of arrays, to be saved.

    Args:
      state: a precision state; taps are left out.

    Returns:
      `format_version`, `layers`, `step` and `precision`; see the module. It may be called under `jax.jit`.

    Raises:
      TypeError: `state` is no AptState.
    """
    check_state(state, "to_state_dict(state)")
    return {
        "format_version": np.array(FORMAT_VERSION, np.int32),
        "layers": as_bytes([_identity(layer) for layer in state.layout.layers]),
        "step": state.step,
        **({"precision": state.precision._asdict()} if state.layout.layers else {}),
    }


def from_state_dict(
    target: AptState,
    saved: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    partial: bool = False,
) -> AptState:
    """The saved precision of every layer of `target`, found by name.

    Args:
      target: a state of the function that will use it, as `init` makes it.
      saved: what `to_state_dict` returned, as the checkpoint library gives it back.
      rename: names of saved layers and what they are called now; "encoder" also stands for every layer
        under "encoder/".
      partial: whether layers may differ. Those that are not in `saved`, or differ there, keep what they
        have in `target`; a warning names them, and the saved ones that were not used.

    Returns:
      A state of `target`'s layers, at the saved step.

    Raises:
      TypeError: `target` is no AptState, or `saved` is no dictionary.
      ValueError: `saved` is no precision state, is damaged, or was written by a version of jax_apt that
        this one cannot read; it belongs to another function or other rules (every layer that differs is
        named); or a name in `rename` is not a saved layer's.

    Warns:
      UserWarning: `partial`, and something was not restored or not used.
    """
    check_state(target, "from_state_dict(target, saved)")
    source = _renamed(_read(saved), dict(rename or {}))
    known = {layer.name: layer for layer in target.layout.layers}
    fresh = {
        name: why for name, layer in known.items() if (why := _difference(layer, source.layers.get(name)))
    }
    unused = [name for name in source.layers if name not in known]
    if fresh or unused:
        _say(fresh, unused, known, partial)
    precision = {field: np.array(value) for field, value in target.precision._asdict().items()}
    for layer, rows in target.layout.rows():
        if layer.name not in fresh:
            for field, value in precision.items():
                _copy(source.rows[layer.name][field], value[rows])
    return AptState(
        step=jnp.array(source.step, jnp.int32),
        precision=TensorPrecision(**{field: jnp.array(value) for field, value in precision.items()}),
        layout=target.layout,
    )


def _copy(source: np.ndarray, into: np.ndarray) -> None:
    """Rows of one layer; the tables of widths may have room for more candidates than this layer has."""
    if source.ndim == 1:
        into[...] = source
    else:
        most = min(source.shape[1], into.shape[1])
        into[:, :most] = source[:, :most]


def _say(fresh: dict[str, str], unused: list[str], known, partial: bool) -> None:
    """Raises or warns of every layer that was not restored and every saved one that was not used."""
    differences = [f"{name}: {why}" for name, why in fresh.items()]
    differences += [f"{name}: saved, but no layer of the function" for name in unused]
    text = "; ".join(differences)
    if not partial or (known and len(fresh) == len(known)):
        raise ValueError(
            f"the saved precision state belongs to another function or other rules. {text}. "
            "Layers that were renamed: rename={'old': 'new'}; to start those that differ afresh: partial=True"
            + (" (but here no layer is the same)" if partial else "")
        )
    warnings.warn(f"not everything was restored. {text}", stacklevel=3)


def _difference(layer: Layer, saved: dict[str, Any] | None) -> str:
    """What keeps a layer from taking the saved precision; "" if nothing does."""
    if saved is None:
        return "not in the saved state"
    own = _identity(layer)
    return ", ".join(
        f"{what} is {own[what]} in the function and {saved[what]} in the saved state"
        for what in _IDENTITY[1:]
        if own[what] != saved[what]
    )


# Reading


@dataclass(frozen=True)
class _Saved:
    step: int
    layers: dict[str, dict[str, Any]]  # name -> identity
    rows: dict[str, dict[str, np.ndarray]]  # name -> field of TensorPrecision -> its rows


def _as_layer(identity: dict[str, Any]) -> Layer:
    known = {name: as_tuples(value) for name, value in identity.items()}
    return Layer(**known, backend="", reason="", rule=None)


def _read(saved: Mapping[str, Any]) -> _Saved:
    check_version(saved, {"step", "precision"}, "precision state", "init()")
    layers = from_bytes(saved["layers"])
    layout = Layout(tuple(_as_layer(layer) for layer in layers))
    fields = saved.get("precision", {}) if layers else {}
    if layers and set(fields) != set(TensorPrecision._fields):
        raise ValueError(
            f"the saved state is damaged: its precision has the fields {', '.join(sorted(fields))}"
        )
    arrays = {field: np.asarray(value) for field, value in fields.items()}
    count = len(layout.candidates())
    for field, value in arrays.items():
        if len(value) != count:
            raise ValueError(f"the saved state is damaged: {field} has {len(value)} rows, its layers {count}")
    rows = {layer.name: {f: v[rows] for f, v in arrays.items()} for layer, rows in layout.rows()}
    return _Saved(int(np.asarray(saved["step"])), {layer["name"]: layer for layer in layers}, rows)


def check_version(saved: Any, older: set[str], what: str, instead: str) -> None:
    """Raises unless `saved` is of a format that this version reads.

    `older` are keys by which a `what` without a version is known, `instead` is what to use then.
    """
    if isinstance(saved, AptState):
        raise TypeError(
            "saved must be what to_state_dict returned, got an AptState, which needs no restoring"
        )
    if not isinstance(saved, Mapping):
        raise TypeError(f"saved must be a dictionary, as to_state_dict makes it; got {type(saved).__name__}")
    if "format_version" not in saved:
        if older <= set(saved):
            raise ValueError(
                f"the saved {what} has no format_version: it was saved as it is, without the names of its "
                f"layers, by an early jax_apt or without to_state_dict; start with {instead}"
            )
        raise ValueError(f"no saved {what}: it has the keys {', '.join(map(str, saved)) or '(none)'}")
    version = int(np.asarray(saved["format_version"]))
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the saved {what} has format {version}, and this jax_apt reads formats up to {FORMAT_VERSION}: "
            "update jax_apt"
        )
    if version < 1:
        raise ValueError(f"the saved {what} is damaged: its format_version is {version}")


def _renamed(source: _Saved, rename: dict[str, str]) -> _Saved:
    names = {name: _new_name(name, rename) for name in source.layers}
    for old in rename:
        if not any(_is_under(name, old) for name in names):
            raise ValueError(f"rename: {old!r} is no saved layer; there are {', '.join(names) or 'none'}")
    if len(set(names.values())) != len(names):
        twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
        raise ValueError(f"rename: several saved layers would be called {', '.join(twice)}")
    return _Saved(
        source.step,
        {new: source.layers[old] | {"name": new} for old, new in names.items()},
        {new: source.rows[old] for old, new in names.items()},
    )


def _new_name(name: str, rename: dict[str, str]) -> str:
    """By the longest entry that is the name or the beginning of its path."""
    old = max((old for old in rename if _is_under(name, old)), key=len, default=None)
    return name if old is None else rename[old] + name[len(old) :]


def _is_under(name: str, parent: str) -> bool:
    return name == parent or name.startswith((f"{parent}/", f"{parent}#"))


# Text as an array


def _identity(layer: Layer) -> dict[str, Any]:
    """What must be the same for a layer to take a saved precision, as JSON gives it back."""
    return json.loads(json.dumps({what: getattr(layer, what) for what in _IDENTITY}))


def as_bytes(value: Any) -> np.ndarray:
    """JSON as uint8 (bytes,)."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def from_bytes(array: Any) -> Any:
    """What `as_bytes` was given."""
    try:
        return json.loads(np.asarray(array).astype(np.uint8).tobytes())
    except ValueError as error:
        raise ValueError(f"the saved state is damaged: its layers are no JSON ({error})") from None


def as_tuples(value: Any) -> Any:
    """Lists of lists as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
