"""What answers on the command line are like."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model

from layer_streamer.tools import cli

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", 1]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
OPTIONS = ["--raw", "--prompt", "x", "--device", "cpu"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


def main(path: Path, *arguments: object) -> int:
    return cli.main(["generate", str(path), *map(str, arguments)])


def test_an_answer_is_as_the_option_says(path: Path, tmp_path: Path, capfd: Any) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "é" [0-9]{2}\n', encoding="utf-8")
    found = []
    for option in (("--schema", schema), ("--regex", "[xy]{4}"), ("--grammar", grammar)):
        assert main(path, *OPTIONS, *option) == 0
        found.append(capfd.readouterr().out)
    assert json.loads(found[0])["a"] in ("b", 1)
    assert re.fullmatch("[xy]{4}", found[1]) and re.fullmatch("é[0-9]{2}", found[2])


def test_each_answer_to_a_file_is_as_the_option_says(path: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"a"\n"bc"\n')
    options = ["--prompts", prompts, "--output", output, "--raw", "--device", "cpu"]
    assert main(path, *options, "--regex", "[xy]{4}") == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(texts) == 2 and all(re.fullmatch("[xy]{4}", text) for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "("], "regex: '(', character 1: unclosed group"),
        (["--regex", "a", "--grammar", "{here}"], "not allowed with argument"),
        (["--schema", "/nowhere/schema.json"], "/nowhere/schema.json"),
        (["--schema", "{here}"], "schema: it is no JSON"),
        (["--regex", "a", "--modules"], "--regex: the engine's, which --modules does without"),
    ],
)
def test_what_is_wrong_is_one_line(
    options: list[str], message: str, path: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "here").write_text("[")
    options = [option.format(here=tmp_path / "here") for option in options]
    assert main(path, *OPTIONS, *options) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
