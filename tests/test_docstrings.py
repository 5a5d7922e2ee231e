"""The worked examples in the docstrings of pure functions."""

import doctest
import importlib
import inspect

import pytest


MODULES = [
    "groups",
    "outcome",
    "treatments.dead_groups",
    "treatments.prefix",
    "treatments.sequence",
    "treatments.without_judge",
]


def functions():
    for name in MODULES:
        module = importlib.import_module(f"trl_sgpo.{name}")
        for function in vars(module).values():
            if (
                inspect.isfunction(function)
                and function.__module__ == module.__name__
                and ">>>" in (function.__doc__ or "")
            ):
                yield pytest.param(module, function, id=function.__name__)


@pytest.mark.parametrize(("module", "function"), functions())
def test_worked_example(module, function):
    source = function.__doc__.replace("```python", "").replace("```", "")  # doctest would take it for output
    test = doctest.DocTestParser().get_doctest(source, vars(module).copy(), function.__name__, None, None)
    assert doctest.DocTestRunner().run(test).failed == 0
