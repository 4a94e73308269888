"""Rules of published variants of low-bit training, to pass to `apt_quantize`.

published               Zhang et al., arXiv 1911.00361, to the letter: gradients rounded to nearest
uniform_int8            8 bits everywhere, rounded to nearest
uniform_int16           16 bits everywhere, rounded to nearest
forward_only            the forward product alone; gradients are float32's
stochastic_gradients    8 bits, gradients rounded stochastically
float_weight_gradient   8 bits, rounded to nearest, the weight gradient in float: SwitchBack's choice,
                        Wortsman et al., arXiv 2304.13013, with one scale per tensor
"""

import re
from collections.abc import Callable

from jax_apt.config import Rule
from jax_apt.transform import apt_quantize

PRESETS: dict[str, tuple[Rule, ...]] = {
    "published": (Rule(rounding="nearest"),),
    "uniform_int8": (Rule(acts=8, weights=8, grads=8, rounding="nearest"),),
    "uniform_int16": (Rule(acts=16, weights=16, grads=16, rounding="nearest"),),
    "forward_only": (Rule(gemms=("fwd",)),),
    "stochastic_gradients": (Rule(grads=8, rounding="stochastic"),),
    "float_weight_gradient": (Rule(grads=8, gemms=("fwd", "dx"), rounding="nearest"),),
}


def ends_in_float(fn: Callable, variables, *args, **kwargs) -> tuple[Rule, ...]:
    """Rules that leave the first and the last layer of a function in float, in the order of its program.

    Args:
      fn, variables, *args, **kwargs: as `apt_quantize` and `init` take them.

    >>> import jax.numpy as jnp
    >>> params, x = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, jnp.ones((1, 2))
    >>> [rule.match for rule in ends_in_float(lambda p, x: x @ p["a"] @ p["b"], params, x)]
    ['^a$', '^b$']
    """
    names = apt_quantize(fn, backend="xla").init(variables, *args, **kwargs).layout.names()
    ends = dict.fromkeys((*names[:1], *names[-1:]))
    return tuple(Rule(f"^{re.escape(name)}$", quantize=False) for name in ends)
