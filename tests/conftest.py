"""Strict settings for every test: no dtype or rank is promoted in silence.

Tracer-leak checks switch off JAX's caches of traces, so they are a fixture that cheap tests ask for.
"""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """For whole trainings, here and in child processes: compiled once and without costly optimizations."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    settings = {  # here, and JAX's default
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (folder, None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()  # else the process keeps what it chose at its first compilation
        yield
    for name, (_, default) in settings.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()
