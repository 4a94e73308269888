"""`jax.export` of quantized functions: states and frozen models as arguments, and the native backend.

An exported program that takes or returns a precision state or a frozen model stores its tree beside the
code, so their static halves are written as JSON. Importing this module registers them.
"""

import json

from jax import export

from jax_apt import xla_ops
from jax_apt.fixed_point import Fixed
from jax_apt.frozen import Frozen, SharedWeight
from jax_apt.frozen_dict import layout_from_json, layout_to_json
from jax_apt.qpa import TensorPrecision
from jax_apt.state import AptState, Layer, Layout, LeftInFloat, Replaced
from jax_apt.state_dict import as_tuples


def native_export_checks() -> tuple[export.DisabledSafetyCheck, ...]:
    """What `jax.export.export(..., disabled_checks=...)` must be told to export the native backend.

    JAX refuses custom calls because it knows nothing of their stability. Such a program runs only on a CPU,
    in a process where the same version of jax_apt has been imported and `load_native` was called; the
    portable backend has none of these conditions.
    """
    return tuple(export.DisabledSafetyCheck.custom_call(name) for name in xla_ops._TARGETS)


def load_native() -> None:
    """Registers the custom calls, for an exported program that holds some.

    Raises:
      RuntimeError: they cannot run here; the message says why.
    """
    if not xla_ops.is_available():
        raise RuntimeError(f"the native backend cannot run here: {xla_ops.unavailable_reason()}")


def _layout_from_json(value) -> Layout:
    layers, left, unused, replaced = as_tuples(value)
    return Layout(
        tuple(Layer(*x) for x in layers),
        tuple(LeftInFloat(*x) for x in left),
        unused,
        tuple(Replaced(*x) for x in replaced),
    )


def _layout_to_json(layout: Layout):
    return [layout.layers, layout.left_in_float, layout.unused_rules, layout.replaced]


def _register(kind, to_json, from_json) -> None:
    """A dataclass whose only static field is its layout."""
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jax_apt.{kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(to_json(static[0])).encode(),
        deserialize_auxdata=lambda text: (from_json(json.loads(text)),),
    )


for _kind in (Fixed, SharedWeight, TensorPrecision):
    export.register_namedtuple_serialization(_kind, serialized_name=f"jax_apt.{_kind.__name__}")
_register(AptState, _layout_to_json, _layout_from_json)
_register(Frozen, layout_to_json, layout_from_json)
