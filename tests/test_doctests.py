"""The examples in the docstrings of the installed package."""

import doctest
import importlib
import pathlib

import pytest

import jax_apt

ROOT = pathlib.Path(jax_apt.__file__).parent
MODULES = sorted(
    ".".join(("jax_apt", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [e for name in MODULES for e in finder.find(importlib.import_module(name)) if e.examples]
    assert len(found) >= 5
