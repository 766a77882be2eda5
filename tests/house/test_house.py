"""The house: who may import whom, and what README and docs say against what there is."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT

import layer_streamer
from layer_streamer.planning.options import OPTIONS, markdown_table
from layer_streamer.planning.settings import RING_CHUNKS, Settings

LIBRARY = ROOT / "layer_streamer"
WINGS = (
    "errors", "progress", "machine", "checkpoint", "planning", "experts", "devices", "transport",
    "passes", "assembly", "preview", "streamer", "modules", "measuring", "doctor", "tuner", "llm",
    "tools",
)  # fmt: skip
"""Folders and files of the library. Each imports only what stands before it; tuner and llm, which
stand side by side, know nothing of each other."""
MOST_MODULES = 20
"""In one folder."""


def modules(folder: Path) -> list[Path]:
    """Its Python files, those behind links (tuner, llm) included."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder, followlinks=True)
                  for name in names if name.endswith(".py"))  # fmt: skip


def module_of(path: Path) -> list[str]:
    """``["layer_streamer", "planning", "plan"]``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Full names of what a module of the library imports of the library: modules, names in them."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += (f"{module}.{name.name}" for name in node.names)
        if isinstance(node, ast.Import):
            found += (name.name for name in node.names)
    return tuple(found)


def wing_of(name: str) -> str | None:
    """The wing of a module, or of a name in it; None outside of all wings."""
    root, *rest = name.split(".")
    return rest[0] if root == "layer_streamer" and rest and rest[0] in WINGS else None


@pytest.mark.parametrize("wing", WINGS)
def test_no_wing_imports_upward(wing: str) -> None:
    below = {*WINGS[: WINGS.index(wing) + 1]} - ({"tuner"} if wing == "llm" else set())
    place = LIBRARY / wing
    for path in modules(place) if place.is_dir() else [place.with_suffix(".py")]:
        for name in imported(path):
            assert wing_of(name) is None or wing_of(name) in below, f"{path}: {name}"


def test_every_module_of_the_library_has_its_wing() -> None:
    wings = {module_of(path)[1] for path in modules(LIBRARY) if len(module_of(path)) > 1}
    assert wings == {*WINGS, "__main__"}


def test_no_folder_holds_more_than_a_person_can_look_through() -> None:
    folders = Counter(path.parent for path in [*modules(LIBRARY), *modules(ROOT / "tests")])
    assert {f: count for f, count in folders.items() if count > MOST_MODULES + 1} == {}


def test_every_folder_says_in_one_sentence_what_is_known_there() -> None:
    for folder in {path.parent for path in modules(LIBRARY)}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and text.splitlines()[0].endswith((".", ":")), folder


def test_the_picture_of_the_house_has_every_module_of_every_wing() -> None:
    """docs/pictures/draw_house.py draws it."""
    drawn = set(re.findall(r"[a-z_0-9]+", (ROOT / "docs" / "pictures" / "house.svg").read_text()))
    for wing in set(WINGS) - {"errors", "progress"}:
        place = LIBRARY / wing
        rooms = {path.stem for path in place.glob("*.py")} - {"__init__"}
        rooms |= {path.parent.name for path in place.glob("*/__init__.py")}
        assert {wing} | rooms <= drawn, wing


def test_inside_the_tuner_imports_are_relative() -> None:
    # So that "import tuner" in the repository's root fails at once, and makes no second class.
    # A child that is started by its path is the exception: it imports when it has a sys.path.
    for path in sorted((ROOT / "tuner").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("layer_streamer"), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("layer_streamer") for name in node.names), path


def test_the_engine_uses_the_public_surface_only() -> None:
    public = {f"layer_streamer.{name}" for name in (*layer_streamer.__all__, "__version__")}
    for path in modules(LIBRARY / "llm"):
        for name in imported(path):
            if name.startswith("layer_streamer") and not name.startswith("layer_streamer.llm."):
                assert name in public, f"{path}: {name}"


def test_nothing_imports_the_engine_by_a_name_that_belongs_to_another_package() -> None:
    folders = ("layer_streamer", "examples", "tests", "docs", ".ci")
    for path in [path for folder in folders for path in modules(ROOT / folder)]:
        for name in imported(path):
            assert name.split(".")[0] != "llm", path


def readme_code() -> list[str]:
    """The Python of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_shows_the_shortest_program_for_a_language_model() -> None:
    program = (ROOT / "examples" / "qwen.py").read_text()
    assert readme_code()[2] in program


def test_the_readmes_table_of_options_is_the_one_in_code() -> None:
    assert f"\n{markdown_table()}\n" in (ROOT / "README.md").read_text()


def test_defaults_in_the_table_are_those_of_the_settings() -> None:
    table = {name: option.words for name, option in OPTIONS.items()}
    defaults = Settings()
    assert table["n_gpu"] == str(defaults.num_device)
    assert table["reserve_bytes"] == str(defaults.reserves(1)[0])
    assert table["read_mode"] == defaults.read_mode
    for name in ("n_cpu_pinned", "n_cpu", "batch_gpu", "device_budget", "host_budget"):
        assert table[name] == str(OPTIONS[name].default) == "None"
    assert table["read_threads"] == str(defaults.num_readers)
    chunks = sorted({defaults.chunk_nbytes, *RING_CHUNKS.values()})
    assert table["read_chunk"] == " or ".join(str(chunk >> 20) for chunk in chunks) + " MiB"


def test_where_it_cannot_run_the_import_says_so_in_one_line() -> None:
    program = "import ntpath, os, sys, typing; os.name = 'nt'; import layer_streamer"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].startswith("ImportError: layer-streamer runs on Linux")


def test_every_test_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
