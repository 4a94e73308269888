"""Strict settings for every test: no dtype or rank is promoted in silence.

Tracer-leak checks switch off JAX's caches of traces, so they are a fixture that cheap tests ask for.
"""

import os

import jax
import pytest

# Child interpreters import the package that is installed, as this one does, and never the checkout that
# they are started from, which may have no compiled library.
os.environ["PYTHONSAFEPATH"] = "1"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def leak_checks():
    with jax.checking_leaks():
        yield


@pytest.fixture
def promotion_as_users_have_it():
    """Optax and Flax promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
