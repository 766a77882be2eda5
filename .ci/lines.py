"""Prints lines of code by group: no blank lines, comments or docstrings (of attributes neither).

    .ci/lines.py [FOLDER [OLDER]]

OLDER: a checkout of another commit, beside which the lines of FOLDER (default: here) are shown. A
commit before modules moved into wings has the same groups under other names.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

FORMATS = {
    "foreign", "formats", "ggml_types", "gguf", "gguf_values", "header", "json_file",
    "json_members", "locate", "safetensors", "shards",
}  # fmt: skip
"""Modules of checkpoint/ that know how bytes are laid out in files; the others are the core's."""
FOLDERS = {
    "layer_streamer/formats": "formats",
    "layer_streamer/doctor": "tools",
    "layer_streamer/measuring": "tools",
    "layer_streamer/tools": "tools",
    "layer_streamer/modules": "modules",
    "layer_streamer": "core",
    "tuner": "tuner",
    "examples/llm": "engine",
    "examples": "scripts",
}
"""The group of what lies below a folder; the first that it lies below."""
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def count_lines(text: str) -> int:
    """Lines of code of a module."""
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def group_of(path: Path) -> str | None:
    """The group of a module, by its path from the top level; None: it is in none."""
    if path.parent.as_posix() == "layer_streamer/checkpoint":
        return "formats" if path.stem in FORMATS else "core"
    parents = {parent.as_posix() for parent in path.parents}
    return next((group for folder, group in FOLDERS.items() if folder in parents), None)


def count_groups(root: Path) -> Counter[str]:
    """Lines of code below a checkout, by group. Links are not followed: tuner is one of two."""
    lines = Counter[str]()
    for folder in {folder.partition("/")[0] for folder in FOLDERS}:
        for path in (root / folder).rglob("*.py"):
            group = group_of(path.relative_to(root))
            if group is not None:
                lines[group] += count_lines(path.read_text(encoding="utf-8"))
    return lines


def main() -> int:
    """Print the table."""
    tables = [count_groups(Path(folder)) for folder in sys.argv[1:] or ["."]]
    for group in dict.fromkeys(FOLDERS.values()):
        print(f"{group:<8}", *(f"{table[group]:>7,}" for table in tables))
    print(f"{'all':<8}", *(f"{table.total():>7,}" for table in tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
