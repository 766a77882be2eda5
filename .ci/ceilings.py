"""Checks the ceilings on the length of files and functions, and on the number of parameters.

A parameter ceiling is lifted by "noqa: PLR0913" on the line of the def, with its reason; overloads
only repeat what such a def has.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = {"layer_streamer": 300, "tuner": 300, "examples": 300, ".ci": 300, "tests": 400}
LINKS = (("layer_streamer", "tuner"), ("layer_streamer", "llm"))
"""To folders that are looked at where they lie."""
FUNCTION_LINES = 50
PARAMETERS = 6


def violations(root: Path) -> Iterator[str]:
    """One line for each ceiling that a file below ``root`` breaks."""
    for folder, ceiling in FILE_LINES.items():
        for path in sorted((root / folder).rglob("*.py")):
            if path.relative_to(root).parts[:2] in LINKS:
                continue
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines()
            place = path.relative_to(root)
            if len(lines) > ceiling:
                yield f"{place}: {len(lines)} lines, the ceiling is {ceiling}"
            for node in ast.walk(ast.parse(text, str(path))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    counted = folder != "tests" and "PLR0913" not in lines[node.lineno - 1]
                    for fault in _faults(node, count_parameters=counted):
                        yield f"{place}:{node.lineno}: {node.name}() {fault}"


def _faults(
    node: ast.FunctionDef | ast.AsyncFunctionDef, *, count_parameters: bool
) -> Iterator[str]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > FUNCTION_LINES:
        yield f"has {length} lines, the ceiling is {FUNCTION_LINES}"
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if names and names[0] in ("self", "cls"):
        del names[0]
    repeats = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
    if count_parameters and not repeats and len(names) > PARAMETERS:
        yield f"has {len(names)} parameters, the ceiling is {PARAMETERS}"


def main() -> int:
    """Exit code 1 if there are violations, which go to stdout."""
    found = list(violations(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
