"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import t5fx
import t5fx.kernels
import t5fx.patterns

NAMES = ["t5fx"] + [
    module.name
    for package in (t5fx, t5fx.kernels, t5fx.patterns)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
