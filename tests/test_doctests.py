"""The examples in the docstrings of the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import jax_apt

MODULES = [module.name for module in pkgutil.walk_packages(jax_apt.__path__, "jax_apt.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [e for name in MODULES for e in finder.find(importlib.import_module(name)) if e.examples]
    assert len(found) >= 5
