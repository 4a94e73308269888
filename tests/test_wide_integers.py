"""64-bit integers in pairs of words against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import float32_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_apt.wide_integers import Wide, add, to_float32, widen

INT64 = st.integers(-(2**63), 2**63 - 1)


def pack(values):
    words = np.array([v % 2**64 for v in values], np.uint64)
    return Wide(jnp.asarray((words >> np.uint64(32)).astype(np.uint32)), jnp.asarray(words.astype(np.uint32)))


def unpack(x):
    values = [int(h) << 32 | int(low) for h, low in zip(np.asarray(x.high), np.asarray(x.low), strict=True)]
    return [v - 2**64 if v >= 2**63 else v for v in values]


def ties_and_extremes():
    edges = [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -(2**31), 2**32, 2**32 - 1]
    for bits in (25, 26, 31, 32, 33, 40, 56, 62):
        base = (1 << bits) + (1 << (bits - 23))
        half = 1 << (bits - 24)
        edges += [base + half + d for d in (-1, 0, 1)] + [(1 << bits) + half + d for d in (-1, 0, 1)]
    return edges + [-e for e in edges if e != -(2**63)]


def test_ties_and_extremes_round_once():
    values = ties_and_extremes()
    assert np.array_equal(jax.jit(to_float32)(pack(values)), float32_oracle(values))


@given(values=st.lists(INT64, min_size=1, max_size=1))
@settings(max_examples=200, deadline=None)
def test_any_value_rounds_once(values):
    assert np.array_equal(to_float32(pack(values)), float32_oracle(values))


@given(pair=st.tuples(INT64, INT64))
@settings(max_examples=100, deadline=None)
def test_addition_is_modulo_two_to_the_64(pair):
    total = (pair[0] + pair[1] + 2**63) % 2**64 - 2**63
    assert unpack(add(pack([pair[0]]), pack([pair[1]]))) == [total]


def test_widening_with_every_shift():
    values = np.array([0, 1, -1, 5, -7, 2**31 - 1, -(2**31)], np.int32)
    for shift in (0, 1, 8, 24, 31, 32, 33, 40, 63):
        expected = [(int(v) * 2**shift + 2**63) % 2**64 - 2**63 for v in values]
        assert unpack(widen(jnp.asarray(values), shift)) == expected, shift
