"""Presets: each does to a layer what its name says."""

import jax
import pytest

import jax_apt as apt


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


ALL = ("fwd", "dx", "dw")
EXPECTED = {
    "published": (((8,), (8,), (8, 16, 24)), ALL, "nearest"),
    "uniform_int8": (((8,),) * 3, ALL, "nearest"),
    "uniform_int16": (((16,),) * 3, ALL, "nearest"),
    "forward_only": (((8,), (8,), (8, 16, 24)), ("fwd",), "stochastic"),
    "stochastic_gradients": (((8,),) * 3, ALL, "stochastic"),
    "float_weight_gradient": (((8,),) * 3, ("fwd", "dx"), "nearest"),
}


def test_a_preset_sets_widths_products_and_rounding():
    w, x = normal(0, 7, 5), normal(1, 4, 7)
    assert set(apt.PRESETS) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        (layer,) = apt.apt_quantize(lambda w, x: x @ w, apt.PRESETS[name]).init(w, x).layout.layers
        assert (layer.widths, layer.gemms, layer.rounding) == expected, name


@pytest.mark.parametrize("names", [("a.b", "m", "z"), ("only",)])
def test_ends_in_float(names):
    """Names are taken as they are, not as patterns: `a.b` must not leave `aXb` in float."""

    def fn(p, x):
        for name in names:
            x = x @ p[name]
        return x

    p, x = {n: normal(i, 3, 3) for i, n in enumerate(names)}, normal(3, 2, 3)
    rules = apt.ends_in_float(fn, p, x)
    layout = apt.apt_quantize(fn, rules).init(p, x).layout
    assert layout.names() == names[1:-1]
    assert [left.name for left in layout.left_in_float] == list(dict.fromkeys((names[0], names[-1])))
    assert not rules[0].hits("aXb", "dot_general", None)
