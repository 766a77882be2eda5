"""README and docs: their links lead somewhere, their code runs, their commands are understood."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapters_made import adapted
from assets import smollm2, smollm2_metadata, tiny_checkpoint, tiny_model
from checkpoints import write_safetensors
from paths import PYTHONPATH, ROOT
from transformers import AutoModelForCausalLM

from layer_streamer.tools.cli import main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Homepage"]
RAW = REPOSITORY.replace("//github", "//raw.githubusercontent")
HERE = (f"{REPOSITORY}/blob/main/", f"{RAW}/main/")
"""What README's links to this repository begin with: it is the package's page elsewhere, too."""
LINK = re.compile(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "benchmarks" / "README.md",
]  # fmt: skip
OFTEN = {"inspect", "plan", "generate", "chat", "doctor"}
"""Commands that are run each time; the others take long, and their arguments are read alone."""


class Snippet(NamedTuple):
    page: str
    line: int
    text: str


def blocks(language: str) -> list[Any]:
    """Code of all pages in that language ("": none is named)."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[2] == language:
                line = text[: match.start()].count("\n") + 1
                name = f"{page.relative_to(ROOT)}:{line}"
                code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
                found.append(pytest.param(Snippet(name, line, code), id=name))
    return found


def tunes(block: Any) -> bool:
    """True if it needs a process and a script of its own."""
    return "tune()" in block.values[0].text


def commands(*begin: str) -> list[Any]:
    """Lines of blocks that are such a command, without comments."""
    found = []
    for block in blocks(""):
        (snippet,) = block.values
        for text in snippet.text.splitlines():
            words = text.removeprefix("$ ").partition("  #")[0].strip()
            if words.startswith(begin) and "," not in words.partition(" --")[0]:
                found.append(pytest.param(words, id=f"{snippet.page} {words}"))
    return found


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # which is of the past, too
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_files_that_a_page_names_by_their_path_are_there(page: Path) -> None:
    named = re.findall(r"\b(?:tests|examples|docs|layer_streamer)/[\w/]+\.py\b", page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for inline, listed in LINK.findall(page.read_text()):
        name, _, anchor = (inline or listed).partition("#")
        if base := next((base for base in HERE if name.startswith(base)), None):
            path = ROOT / name.removeprefix(base)
        elif name.startswith("http"):
            continue
        else:
            path = (page.parent / name) if name else page
        assert path.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, (name, anchor)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 32}
    sizes["max_position_embeddings"] = 1024  # what a tune of the engine takes by default
    tiny_checkpoint(folder, made := tiny_model("qwen2", **sizes))
    adapted(made, folder.parent / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_metadata() / name, folder)
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where the names that the pages use are those of the tiny model."""
    for name in ("path/to/model", "Qwen/Qwen2.5-7B-Instruct", "MODEL", "OUT/.."):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "OUT/..":
            (tmp_path / name).symlink_to(model)
    (tmp_path / "path/to/adapter").symlink_to(model.parent / "adapter")
    (tmp_path / "path/to/mixture").mkdir()
    mixture = {
        f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.rand(8, 32) for e in range(4)
    }
    mixture["model.layers.0.mlp.gate.weight"] = torch.rand(4, 32)
    write_safetensors(tmp_path / "path/to/mixture/model.safetensors", mixture)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2())
    (tmp_path / "TEXT").write_text("Some text to calibrate with. " * 20)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Hi"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    return tmp_path


@pytest.mark.parametrize("snippet", [b for b in blocks("python") if not tunes(b)])
def test_python_on_a_page_runs(snippet: Snippet, place: Path, capsys: Any) -> None:
    names = {
        "path": "path/to/model",
        "x": torch.zeros(1, 32),
        "layer_fn": lambda x, weights, layer_idx: x,
    }
    exec("from layer_streamer import LayerStreamer, LayerStreamerTuner", names)
    # Shorter, and on the processor: that is all that is changed.
    short = re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", snippet.text)
    short = short.replace("10_000", "2")
    exec(compile(short, snippet.page, "exec"), names)


def test_the_engine_on_the_page_for_engines_answers_as_transformers(
    place: Path, capsys: Any
) -> None:
    (code,) = [b.values[0].text for b in blocks("python") if "class Engine:" in b.values[0].text]
    names: dict[str, Any] = {}
    exec(code, names)
    model = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
    ids = torch.tensor([[1, 2, 3]])
    wanted = model.generate(ids, do_sample=False, min_new_tokens=4, max_new_tokens=4)[0, 3:]
    assert names["text"] == wanted.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [b for b in blocks("python") if tunes(b)])
def test_python_that_tunes_runs_as_a_script(snippet: Snippet, place: Path) -> None:
    before = "layer_fn = lambda x, w, i: x\nx = None\n"
    (place / "script.py").write_text(before + snippet.text)
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": PYTHONPATH, "XDG_CACHE_HOME": str(place / "cache"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", commands("layer-streamer ", "python -m layer_streamer "))
def test_a_command_on_a_page_is_one(line: str, place: Path, capsys: Any) -> None:
    line = re.sub(r"\[[^]]*\]", "", line).removeprefix("python -m layer_streamer")
    name, *arguments = shlex.split(line.removeprefix("layer-streamer"))
    if name in OFTEN:
        fast = ["--max-new-tokens", "2"] if name in ("generate", "chat") else []
        device = [] if name in ("inspect",) else ["--device", "cpu"]
        assert main([name, *arguments, *fast, *device]) == 0, capsys.readouterr().err
        return
    assert main([name, *arguments, "--no-such-option"]) == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("line", commands("python examples/", "python docs/"))
def test_a_script_on_a_page_is_there(line: str) -> None:
    assert (ROOT / line.split()[1]).is_file()


@pytest.mark.parametrize("line", commands("make "))
def test_a_target_on_a_page_is_one(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets


@pytest.mark.parametrize("line", commands("pip install "))
def test_an_extra_on_a_page_is_one(line: str) -> None:
    for extra in re.findall(r"\[(\w+)\]", line):
        assert extra in PROJECT["optional-dependencies"]
