"""The command finetune: an adapter that peft and the engine load, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from assets import relative_error, tiny_checkpoint, tiny_model
from one_sequence import OneSequence
from packed_models import write_packed
from tokenizers_made import byte_level
from zoo import reference, stepwise, zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.finetuning import training
from layer_streamer.tools import cli

pytest.importorskip("accelerate")

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
    for n in range(8)
]
QUICK = ("--steps", 3, "--accumulation", 2, "--learning-rate", 0.01, "--rank", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with a tokenizer, and rows."""
    place = tmp_path_factory.mktemp("place")
    tiny_checkpoint(place / "model", tiny_model("llama"))
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "model")
    write(place / "rows.jsonl", *ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(place)
        yield place


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> int:
    """The exit code, on the CPU, every pass over layers that stream."""
    options = ["--device", "cpu", "--n-cpu-pinned", "0", "--n-cpu", "0"]
    if "--device-budget" not in arguments:
        options += ["--n-gpu", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli.main(["finetune", *options, *map(str, arguments)])


def refused(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1, err
    return str(lines[0])


def test_what_it_makes_is_loaded_by_peft_and_by_generate_and_is_the_same_again(
    place: Path, capsys: Any
) -> None:
    options = (*QUICK, "--hold-out", 0.25, "--eval-steps", 2)
    assert run("model", "rows.jsonl", "out", *options) == 0
    out, err = capsys.readouterr()
    assert out == "out\n"
    for said in (
        "8 rows, ",
        "3 steps, ",
        " s each, bound by ",
        "loss of what is held out: ",
        "at most ",
    ):
        assert said in err
    assert not (place / "out.partial").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
        theirs = peft.PeftModel.from_pretrained(base, str(place / "out")).eval()
    ids = list(range(5, 45))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    with StreamingEngine(place / "model", device="cpu", adapter=place / "out") as engine:
        found = engine.generate(ids, max_new_tokens=1, temperature=0, return_details=True)
    assert list(found.ids) == expected[-1:]
    said = [str(a) for a in ("model", "--prompt", "1?", "--device", "cpu", "--max-new-tokens", 4)]
    assert cli.main(["generate", *said, "--adapter", "out"]) == 0
    assert run("model", "rows.jsonl", "again", *options) == 0
    assert (place / "again" / "adapter_model.safetensors").read_bytes() == (
        place / "out" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_run_that_was_ended_goes_on_and_leaves_what_one_that_was_not_does(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*QUICK, "--save-steps", 1, "--dropout", 0.1)
    assert run("model", "rows.jsonl", "whole", *options) == 0
    steps = training.Watch.on_step_begin

    def interrupted(self: Any, args: Any, state: Any, control: Any, **some: Any) -> None:
        steps(self, args, state, control, **some)
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Watch, "on_step_begin", interrupted)
        assert run("model", "rows.jsonl", "ended", *options) == 130
    assert "ended.partial is kept: the same command goes on" in capsys.readouterr().err
    assert not (place / "ended").exists()
    said = refused(capsys, "model", "rows.jsonl", "ended", *options, "--seed", 4)
    assert "ended.partial: left by a run with other seed: --restart" in said
    assert run("model", "rows.jsonl", "ended", *options) == 0
    assert "going on from checkpoint-2" in capsys.readouterr().err
    made = [(place / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "ended")]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: must be an object with "),
        ({"other": 1}, 'line 2: must have one of "messages"'),
        ({"text": "a", "prompt": "b"}, 'line 2: must have one of "messages"'),
        ({"text": 3}, 'line 2: "text" must be a string'),
        ({"text": ""}, 'line 2: "text" is empty'),
        ({"prompt": "a"}, 'line 2: "completion" must be a string'),
        ({"messages": []}, 'line 2: "messages" must be a list of objects'),
        ({"messages": ["a"]}, 'line 2: message 1 must be an object with a "role"'),
        ({"messages": [{"role": "user"}]}, 'line 2: message 1 must have "content"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: has no message of the assist"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_nothing_is_made(
    place: Path, tmp_path: Path, capsys: Any, row: Any, message: str
) -> None:
    data = write(tmp_path / "data.jsonl", ROWS[0], row)
    assert f"{data}, {message}" in refused(capsys, "model", data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", 0), "--rank 0: full fine-tuning is refused: the weights of the model stream"),
        (("--learning-rate", 0), "--learning-rate 0.0: must be above 0"),
        (("--dropout", 1), "--dropout 1.0: must be from 0 to below 1"),
        (("--hold-out", 0.99), "--hold-out 0.99: of 8 rows none is left to learn"),
        (("--hold-out", 2), "--hold-out 2.0: must be between 0 and 1"),
        (("--eval", "no.jsonl"), "no.jsonl: No such file"),
        (("--length", 2), "nothing of it can be learned within 2 tokens a row"),
        (("--device", "cuda:3"), "--device cuda:3: cuda or cpu"),
        (("--target-modules", "no_proj"), "Target modules {'no_proj'} not found"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    place: Path, tmp_path: Path, capsys: Any, arguments: Any, message: str
) -> None:
    said = refused(capsys, "model", "rows.jsonl", tmp_path / "out", *arguments)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_there_and_a_package_that_is_not_are_one_line(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    assert "out: exists" in refused(capsys, "model", "rows.jsonl", tmp_path / "out")
    said = refused(capsys, "rows.jsonl", "rows.jsonl", tmp_path / "made")
    assert "rows.jsonl: no directory of transformers': has no config.json" in said
    said = refused(capsys, "model", "rows.jsonl", tmp_path / "no" / "out")
    assert "no: no such directory" in said
    monkeypatch.setitem(sys.modules, "peft", None)
    said = refused(capsys, "model", "rows.jsonl", tmp_path / "made")
    assert "peft is not installed (pip install 'layer-streamer[finetune]')" in said


def test_a_device_without_memory_for_a_step_is_one_line_and_leaves_nothing(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "loss_of", full)
    said = refused(capsys, "model", "rows.jsonl", tmp_path / "out", *QUICK)
    assert "out of device memory in a step: lower --length, --batch" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_it_learns_within_a_budget(
    place: Path, tmp_path: Path, capsys: Any, dtype: str
) -> None:
    options = ("--device", "cuda", "--dtype", dtype, "--device-budget", "500KiB")
    options = (*options, *QUICK, "--steps", 30, "--hold-out", 0.25)
    assert run("model", "rows.jsonl", tmp_path / "out", *options) == 0
    err = capsys.readouterr().err
    first, last = (
        float(found) for found in re.findall(r"loss ([\d.]+) at first, ([\d.]+)", err)[0]
    )
    assert last < first and " of device memory, " in err
    with StreamingEngine(place / "model", device="cuda", adapter=tmp_path / "out") as engine:
        assert engine.generate(list(range(5, 25)), max_new_tokens=2, return_details=True).ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3_moe", "qwen2_moe", "gpt_oss", "mixtral", "gemma3_text"]
)
def test_over_packed_weights_and_mixtures_the_engine_answers_as_peft_does(
    tmp_path: Path, capsys: Any, name: str
) -> None:
    model, base = zoo_model(name), tmp_path / "base"
    base.mkdir()
    if name == "qwen2":
        write_packed(base, model, "ct4-g32")  # the model has what is unpacked
    else:
        tiny_checkpoint(base, model)
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    data = write(tmp_path / "rows.jsonl", *ROWS)
    code, err = run(base, data, tmp_path / "out", *QUICK), capsys.readouterr().err
    if "this transformers unpacks whole models only" in err:
        pytest.skip(err)
    assert code == 0, err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    expected = reference(theirs.base_model.model)
    options: dict[str, Any] = {"device": "cpu", "max_length": 128, "adapter": tmp_path / "out"}
    with StreamingEngine(base, **options) as engine:
        sequence = OneSequence(engine._runner)
        found = stepwise(lambda ids: sequence.forward(ids, every_position=True))
    assert relative_error(found, expected) <= 1e-5
