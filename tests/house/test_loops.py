"""In CPython 3.13 (3.13.0 to 3.13.5 were looked at) what is raised at the condition of a `while`,
as a Ctrl-C may be, is outside of the `try` or `with` that the loop stands in: no `finally` runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_house import LIBRARY, modules

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def conditions_in_a_try(node: ast.AST, *, inside: bool = False) -> Iterator[int]:
    """Lines of loops with a condition that stand in a `try` or `with` of their own function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.While) and inside and not isinstance(child.test, ast.Constant):
            yield child.lineno
        here = inside or isinstance(child, ast.Try | ast.With)
        yield from conditions_in_a_try(child, inside=here and not isinstance(child, SCOPES))


def test_no_loop_with_a_condition_stands_in_a_try_or_with() -> None:
    found = {
        str(path.relative_to(LIBRARY)): list(conditions_in_a_try(ast.parse(path.read_text())))
        for path in modules(LIBRARY)
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("while a:\n  pass", []),
        ("try:\n  while a:\n    pass\nfinally:\n  b()", [2]),
        ("with a:\n  while True:\n    b()", []),
        ("with a:\n  for b in c:\n    while b:\n      d()", [3]),
        ("with a:\n  def f():\n    while b:\n      d()", []),
    ],
)
def test_such_a_loop_would_be_found(source: str, lines: list[int]) -> None:
    assert list(conditions_in_a_try(ast.parse(source))) == lines
