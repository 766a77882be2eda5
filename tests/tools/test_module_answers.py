"""generate --modules: transformers' own classes over streamed weights, from the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from assets import smollm2_metadata, tiny_checkpoint, tiny_model
from tiny_models import tiny_config

from layer_streamer.tools.cli import main

PROMPT = "The capital of France is"
COMMON = ("--prompt", PROMPT, "--modules", "--device", "cpu", "--max-new-tokens", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 32}
    tiny_checkpoint(folder, tiny_model("qwen2", **sizes))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_metadata() / name, folder)
    return folder


def theirs(folder: Path, ids: torch.Tensor, **options: Any) -> str:
    """What transformers answers with the model resident."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        found = plain.generate(ids, max_new_tokens=5, pad_token_id=2, **options)
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("raw", [True, False])
def test_the_answer_is_transformers_own(model: Path, capsys: Any, raw: bool) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": PROMPT}]
    ids = (
        tokenizer(PROMPT, return_tensors="pt").input_ids
        if raw
        else tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    )
    want = theirs(model, ids, do_sample=False)
    capsys.readouterr()
    arguments = [*COMMON, "--temperature", "0", *(["--raw"] if raw else [])]
    assert main(["generate", str(model), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == want.strip()
    assert "model.layers: the last pass" in err


def test_drawn_tokens_are_the_same_for_a_seed(model: Path, capsys: Any) -> None:
    answers = set()
    for _ in range(2):
        drawn = ["--temperature", "1.5", "--top-k", "50", "--seed", "7"]
        assert main(["generate", str(model), *COMMON, *drawn]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--kv", "host"], "--kv: the engine's"),
        (["--prompt", "x", "--presence-penalty", "1"], "--presence-penalty: the engine's"),
        (["--prompts", "questions.jsonl"], "--modules: answers one --prompt"),
        (["--prompt", "x", "--layer-pattern", "a.{i}."], "layer_pattern=: not with a module"),
    ],
)
def test_what_is_the_engines_is_refused_in_one_line(
    model: Path, capsys: Any, arguments: list[str], words: str
) -> None:
    assert main(["generate", str(model), "--modules", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_experts_come_on_demand_where_that_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    config = tiny_config("mixtral")
    config.vocab_size = 49152
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_metadata() / name, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    want = theirs(tmp_path, tokenizer(PROMPT, return_tensors="pt").input_ids, do_sample=False)
    capsys.readouterr()
    demand = ("--experts", "demand", "--expert-slots", "3")
    arguments = [*COMMON, "--raw", "--temperature", "0", *demand]
    assert main(["generate", str(tmp_path), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == want.strip()
    assert "model.layers: of 6 experts, " in err
