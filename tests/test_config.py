"""What a user chooses: defaults, and errors that name the bad value and the allowed ones."""

import dataclasses
import math

import numpy as np
import pytest

from jax_apt import Adaptive, Config, Rule
from jax_apt.config import BACKENDS, candidates, check_backend, check_bits


def test_defaults_are_the_published_ones():
    config = Config()
    assert (config.alpha, config.beta, config.gamma, config.delta) == (0.04, 0.1, 2.0, 100.0)
    assert (config.threshold, config.mode, config.measure) == (0.03, "grow", "mean_magnitude")
    assert (Rule().acts, Rule().weights, Rule().grads.widths) == (8, 8, (8, 16, 24))


def test_config_is_frozen_hashable_and_keyword_only():
    assert hash(Config()) == hash(Config()) and Config() == Config(alpha=0.04)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().alpha = 1.0
    with pytest.raises(TypeError):
        Config(0.04)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, bad) for name in ("alpha", "initial_fraction") for bad in (-0.01, 1.01, math.nan)],
        *[(n, bad) for n in ("beta", "gamma", "delta", "threshold") for bad in (-1.0, math.nan, math.inf)],
        *[("alpha", bad) for bad in ("0.1", None, True)],
        *[("steps_per_epoch", bad) for bad in (0, -1, 1.5, True, "10")],
        ("mode", "shrink"),
        ("measure", "mean"),
    ],
)
def test_a_bad_constant_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .*{value!r}"):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("fraction", "epoch", "steps"), [(0, 10, 0), (0.1, 10, 1), (0.1, 11, 2), (0.01, 50, 1), (1, 7, 7)]
)
def test_initial_steps_round_up(fraction, epoch, steps):
    assert Config(initial_fraction=fraction, steps_per_epoch=epoch).initial_steps == steps


@pytest.mark.parametrize("bits", [1, 25, 0, -8, 8.0, "8", True, None])
def test_bad_widths_are_named(bits):
    for make in (check_bits, Adaptive, candidates, lambda bits: Rule(grads=bits)):
        with pytest.raises(ValueError, match=f"in 2..24, got {bits!r}"):
            make(bits)


def test_numpy_integers_are_integers():
    assert Rule(acts=np.int64(12)) == Rule(acts=12)
    assert candidates(np.int32(12)) == (12,) and Adaptive(np.int64(8)).widths == (8,)
    assert type(Config(steps_per_epoch=np.int64(10)).steps_per_epoch) is int


def test_quantize_is_a_truth_value():
    with pytest.raises(ValueError, match="quantize must be True or False, got 'no'"):
        Rule("head", quantize="no")


def test_widths_ascend():
    assert Adaptive(2, 24).widths == (2, 24)
    for widths in ((16, 8), (8, 8)):
        with pytest.raises(ValueError, match="ascend without repetition"):
            Adaptive(*widths)
    with pytest.raises(ValueError, match="at least one"):
        Adaptive()


def test_candidates_of_fixed_and_adaptive_widths():
    assert candidates(12) == (12,)
    assert candidates(Adaptive(4, 12)) == (4, 12)


def test_backends():
    for backend in BACKENDS:
        check_backend(backend)
        assert Rule(backend=backend).backend == backend
    with pytest.raises(ValueError, match="backend must be one of auto, native, xla, emulate; got 'gpu'"):
        Rule(backend="gpu")


def test_rules_search_the_name():
    assert Rule("Conv_1").hits("block/Conv_1/dot", "dot_general", None)
    assert not Rule("^Conv").hits("block/Conv_1", "dot_general", None)
    assert Rule().hits("", "dot_general", None) and Rule().hits("anything", "dot_general", (3,))


@pytest.mark.parametrize("match", ["(", 3, None, b"Conv"])
def test_a_bad_expression_is_named(match):
    with pytest.raises(ValueError, match="is no regular expression"):
        Rule(match)
