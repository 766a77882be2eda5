"""No memory is made where, or of the dtype that, somebody else's default says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from test_house import LIBRARY, modules

OF_DEFAULT_DTYPE = {
    "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn",
    "zeros",
}  # fmt: skip
OF_DEFAULT_DEVICE = OF_DEFAULT_DTYPE | {
    "arange", "as_tensor", "asarray", "randint", "randperm", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices",
}  # fmt: skip
LEGACY = {"Tensor", "FloatTensor", "ByteTensor", "LongTensor"}


def left_to_defaults(source: str) -> Iterator[str]:
    """Calls of torch's factories that do not say where, or of which dtype."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        said = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} if name in OF_DEFAULT_DEVICE else set()
        wanted |= {"dtype"} if name in OF_DEFAULT_DTYPE else set()
        if name in LEGACY or not wanted <= said:
            yield f"{node.lineno}: torch.{name}"


def test_every_tensor_that_is_made_says_where_and_of_which_dtype() -> None:
    found = {
        str(path.relative_to(LIBRARY)): list(left_to_defaults(path.read_text()))
        for path in modules(LIBRARY)
    }
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_a_factory_that_leaves_it_to_the_defaults_is_found(tmp_path: Path) -> None:
    source = "torch.empty(3, device=d)\ntorch.arange(3)\ntorch.tensor([1], device='cpu')\n"
    assert list(left_to_defaults(source)) == ["1: torch.empty", "2: torch.arange"]
