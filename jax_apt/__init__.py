"""Adaptive Precision Training for JAX: train any apply function in low-bit fixed point.

Source: Zhang et al., arXiv 1911.00361.
"""

from jax_apt import checkpoint_policies
from jax_apt.config import Adaptive, Backend, Config, Rule
from jax_apt.exporting import load_native, native_export_checks
from jax_apt.fixed_point import Fixed, dequantize, exponent_for, quantize, quantize_to
from jax_apt.freeze import apply_frozen, freeze
from jax_apt.frozen import Frozen, SharedWeight
from jax_apt.frozen_dict import frozen_from_state_dict, frozen_to_state_dict
from jax_apt.ops import CODES_NAME
from jax_apt.presets import PRESETS, ends_in_float
from jax_apt.qem import measure_error
from jax_apt.qpa import TensorPrecision, update_interval
from jax_apt.report import Report
from jax_apt.state import AptState
from jax_apt.state_dict import from_state_dict, to_state_dict
from jax_apt.training import value_and_grad
from jax_apt.transform import AptFunction, apt_quantize

__version__ = "0.1.0"

__all__ = [
    "CODES_NAME",
    "PRESETS",
    "Adaptive",
    "AptFunction",
    "AptState",
    "Backend",
    "Config",
    "Fixed",
    "Frozen",
    "Report",
    "Rule",
    "SharedWeight",
    "TensorPrecision",
    "apply_frozen",
    "apt_quantize",
    "checkpoint_policies",
    "dequantize",
    "ends_in_float",
    "exponent_for",
    "freeze",
    "from_state_dict",
    "frozen_from_state_dict",
    "frozen_to_state_dict",
    "load_native",
    "measure_error",
    "native_export_checks",
    "quantize",
    "quantize_to",
    "to_state_dict",
    "update_interval",
    "value_and_grad",
]
