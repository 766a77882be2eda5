"""Every public name says what it is."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import pytest

import layer_streamer
from layer_streamer import llm

PUBLIC = {name: getattr(layer_streamer, name) for name in layer_streamer.__all__}
PUBLIC |= {f"llm.{name}": getattr(llm, name) for name in llm.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def members(node: ast.ClassDef) -> Iterator[tuple[str, str | None]]:
    """Public methods, properties and fields of a class, with what is said of each."""
    for this, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(this, ast.FunctionDef) and not this.name.startswith("_"):
            yield this.name, ast.get_docstring(this)
        if isinstance(this, ast.AnnAssign) and isinstance(this.target, ast.Name):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield this.target.id, after.value.value if said else None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_fields_of_a_public_class_have_docstrings(name: str) -> None:
    (node,) = ast.parse(inspect.getsource(CLASSES[name])).body
    assert isinstance(node, ast.ClassDef)
    assert [member for member, said in members(node) if not said] == []


@pytest.mark.parametrize("name", ["LayerStreamer", "LayerStreamerTuner", "llm.StreamingEngine"])
def test_what_may_be_called_from_threads_says_from_which(name: str) -> None:
    assert "Thread rules:" in (PUBLIC[name].__doc__ or "")
