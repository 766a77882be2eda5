"""The house: who may import whom, and what README and docs say against what there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from assets import tiny_checkpoint, tiny_model

import layer_streamer
from layer_streamer.config import RING_CHUNKS, Settings

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "layer_streamer"
ORDER = [
    "errors",
    "manifest",
    "inspect",
    "formats",
    "budget",
    "knapsack",
    "residency",
    "layout",
    "placement",
    "config",
    "plan",
    "planner",
    "stats",
    "machine",
    "limits",
    "libc",
    "hostmem",
    "tasks",
    "device",
    "cudart",
    "accelerator",
    "clock",
    "memory",
    "direct",
    "files",
    "pieces",
    "worker",
    "pool",
    "schedule",
    "batches",
    "mapped",
    "residents",
    "reader",
    "target",
    "copier",
    "ring",
    "lane",
    "progress",
    "pipeline",
    "caller",
    "turn",
    "statics",
    "assembly",
    "preview",
    "tree",
    "sweep",
    "streamer",
    "tools",
]
FOLDERS = ("formats", "tools")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(path: Path) -> Iterator[str]:
    """Names of the library's modules that a file of the library imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            # Inside formats/ or tools/, one dot is the folder itself.
            folder = path.parent.name
            inside = folder in FOLDERS and node.level == 1
            yield folder if inside else (node.module or "").split(".")[0]


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    path = LIBRARY / f"{module}.py"
    files = [path] if path.exists() else sorted((LIBRARY / module).glob("*.py"))
    for file in files:
        for name in set(imported(file)):
            assert name in ORDER[: ORDER.index(module) + (module in FOLDERS)], f"{file}: {name}"


def test_every_module_of_the_library_has_its_place_in_the_order() -> None:
    modules = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__", "__main__"}
    assert modules | set(FOLDERS) == set(ORDER)


def test_design_md_lists_the_modules_in_the_order_of_their_dependencies() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    listed = re.findall(r"^  ([a-z]+(?:, [a-z]+)*)  ", text, re.MULTILINE)
    assert [name for line in listed for name in line.split(", ")] == ORDER


def test_only_the_packages_own_init_imports_the_tuner() -> None:
    for path in sorted(LIBRARY.rglob("*.py")):
        if path.parent.name != "tuner" and path != LIBRARY / "__init__.py":
            assert "tuner" not in set(imported(path)), path


def test_inside_the_tuner_imports_are_relative() -> None:
    # So that "import tuner" in the repository's root fails at once, and makes no second class.
    # A child that is started by its path is the exception: it imports when it has a sys.path.
    for path in sorted((ROOT / "tuner").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("layer_streamer"), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("layer_streamer") for name in node.names), path


def test_examples_use_the_public_surface_only() -> None:
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("layer_streamer.") for name in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layer_str"):
                assert node.module == "layer_streamer", path
                assert {name.name for name in node.names} <= set(layer_streamer.__all__), path


def readme_code() -> list[str]:
    """The Python of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_shows_the_shortest_program_for_a_language_model() -> None:
    program = (ROOT / "examples" / "qwen.py").read_text()
    assert readme_code()[1] in program


def test_the_readmes_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "path" / "to" / "model", tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code, _ = readme_code()
    exec(compile(code, "README.md", "exec"), {})
    assert "bound by" in capsys.readouterr().out


def test_the_readmes_table_has_every_option_and_its_default() -> None:
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    table = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(table) >= {field.name for field in fields(Settings)}
    defaults = Settings()
    assert table["n_gpu"] == str(defaults.num_device)
    for name in ("device_budget", "host_budget", "reserve_bytes", "read_mode"):
        assert table[name] == str(getattr(defaults, name))
    assert defaults.through_ring
    assert table["n_cpu_pinned"] == table["n_cpu"] == "None"
    assert table["read_threads"] == str(defaults.num_readers)
    chunks = sorted({defaults.chunk_nbytes, *RING_CHUNKS.values()})
    assert table["read_chunk"] == " or ".join(str(chunk >> 20) for chunk in chunks) + " MiB"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target
