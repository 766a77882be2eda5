"""lm-evaluation-harness on a task of this folder alone: a streamed model's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from byte_model import byte_model, byte_tokenizer
from recipes import quiet

from layer_streamer import stream

pytestmark = pytest.mark.slow

QUESTIONS = [
    ("one two", [" three", " four", " 5"], 0),
    ("the sky is", [" blue", " green and loud"], 1),
    ("x = (1 +", [" 2)", "]"], 0),
    ("Hello, ", ["world", "w\u00f6rld!", " "], 2),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{text}}}}"
output_type: {kind}
"""
CHOOSING = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
ANSWERING = """
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""
TASKS = {
    "choosing": ("multiple_choice", CHOOSING),
    "rolling": ("loglikelihood_rolling", ROLLING),
    "answering": ("generate_until", ANSWERING),
}


def write_tasks(folder: Path) -> None:
    file = folder / "questions.jsonl"
    lines = [dict(zip(("text", "choices", "answer"), row, strict=True)) for row in QUESTIONS]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, (kind, more) in TASKS.items():
        text = TASK.format(name=name, file=file, kind=kind) + more
        (folder / f"{name}.yaml").write_text(text)


def evaluate(model: Any, folder: Path) -> dict[str, Any]:
    """What the harness says of each task, and of each question of it."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    client = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=128)
    found = lm_eval.simple_evaluate(
        model=client,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    said = {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in found["samples"].items()
    }
    return {"results": found["results"], "said": said}


def test_a_streamed_models_numbers_are_those_of_the_resident_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    with quiet():
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        model_folder, tasks = tmp_path / "model", tmp_path / "tasks"
        tasks.mkdir()
        write_tasks(tasks)
        byte_model(model_folder)
        plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
        model: Any = stream(model_folder, device="cpu", n_gpu=1)
        want = evaluate(plain, tasks)
        got = evaluate(model, tasks)
    assert set(got["results"]) == set(TASKS)
    assert got == want
    assert model.layer_streamer.last_pass
    model.layer_streamer.close()
