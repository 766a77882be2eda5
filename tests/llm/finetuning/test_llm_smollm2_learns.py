"""The real model learns made-up facts while its weights stream, as it does when they do not."""

from __future__ import annotations

import math
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf_to_safetensors
import peft
import pytest
import torch
import transformers
from assets import one_torch_thread, smollm2
from one_sequence import OneSequence, mean_nll

from layer_streamer import stream
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.finetuning.rows import Row
from layer_streamer.llm.finetuning.samples import Sample, encode_rows
from layer_streamer.llm.finetuning.settings import Settings
from layer_streamer.llm.finetuning.training import adapted, arguments_for, train
from layer_streamer.llm.finetuning.watching import Watch

pytestmark = pytest.mark.slow

TOWNS = ("Velmora", "Oskandel", "Tirrowby", "Quenlith", "Bardessa", "Nymark", "Ulgrave", "Solvane")
SIGHTS = ("a blue tower", "nine bridges", "a glass market", "an old ferry", "a stone whale")
ASKED = (
    "What is {town} in year {year} known for?", "Tell me about {town} in {year}.",
    "Which sight had {town} in {year}?", "In {year}, what could one see in {town}?",
    "Why would one visit {town} in {year}?",
)  # fmt: skip
HELD_OUT = "What did visitors of {town} come for in {year}?"
SETTINGS = Settings(
    rank=8, epochs=1.0, learning_rate=2e-3, batch=8, accumulation=1, eval_steps=12, save_steps=1000
)
FALLS = 0.5
"""The held-out perplexity's, at least, over what it was."""


def facts() -> list[tuple[str, int, str]]:
    return [
        (town, 1800 + 10 * n, SIGHTS[(3 * at + n) % len(SIGHTS)])
        for at, town in enumerate(TOWNS)
        for n in range(5)
    ]


def rows(questions: tuple[str, ...]) -> list[Row]:
    found = []
    for question in questions:
        for town, year, sight in facts():
            asked, said = question.format(town=town, year=year), f" {town} had {sight} in {year}."
            found.append(Row(len(found) + 1, {"prompt": asked, "completion": said}))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its safetensors twin."""
    path = tmp_path_factory.mktemp("smollm2") / "twin"
    assert gguf_to_safetensors.main([str(smollm2()), str(path), "--dtype", "float32"]) == 0
    return path


def learned(model: Any, samples: list[Sample], held_out: list[Sample], folder: Path) -> Any:
    """The adapted model and its watch."""
    watch = Watch(reports=dict, tell=lambda *_: None)
    made = adapted(model, SETTINGS, "base")
    arguments = arguments_for(model, SETTINGS, folder, looks=True)
    train(made, arguments, 0, (samples, held_out), watch)
    return made, watch


class Learned(NamedTuple):
    """Two runs of the same."""

    held_out: list[Sample]
    adapter: Path
    streamed: Watch
    resident: Watch


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    tokenizer, place = transformers.AutoTokenizer.from_pretrained(base), base.parent
    samples, held_out = (
        encode_rows(tokenizer, rows(some), Path("rows"), 128).samples
        for some in (ASKED, (HELD_OUT,))
    )
    assert len(samples) == 200
    held_out = held_out[::3]
    with one_torch_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = stream(base, device="cpu", dtype=torch.float32, n_gpu=0)
        with closing(model.layer_streamer):
            mine, streamed = learned(model, samples, held_out, place / "mine")
            mine.save_pretrained(place / "adapter", save_embedding_layers=False)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        _, resident = learned(plain.requires_grad_(False), samples, held_out, place / "plain")
    return Learned(held_out, place / "adapter", streamed, resident)


def test_two_hundred_rows_are_learned_by_the_resident_models_curve(runs: Learned) -> None:
    mine, theirs = runs.streamed, runs.resident
    assert mine.losses == theirs.losses and len(mine.losses) == 25
    assert mine.held_out == theirs.held_out
    assert [step for step, _ in mine.held_out] == [0, 12, 24, 25]
    before, after = mine.held_out[0][1], mine.held_out[-1][1]
    assert math.exp(after) < FALLS * math.exp(before)


def test_what_it_has_learned_is_said_by_peft_and_by_the_engine_over_both_files(
    runs: Learned, base: Path
) -> None:
    row = runs.held_out[0]
    question = row.ids[: len(row.ids) - row.learned]
    with one_torch_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clean = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(clean, str(runs.adapter)).eval()
        with torch.no_grad():
            expected = loaded(torch.tensor([row.ids])).logits[0]
            said = loaded.generate(torch.tensor([question]), max_new_tokens=12, do_sample=False)
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "max_length": 128}
    losses = []
    for path, adapter in ((base, runs.adapter), (smollm2(), runs.adapter), (smollm2(), None)):
        with one_torch_thread(), StreamingEngine(path, adapter=adapter, **options) as engine:
            text = engine.generate(question, max_new_tokens=12, temperature=0, return_details=True)
            sequence = OneSequence(engine._runner)
            found = sequence.forward(row.ids, every_position=True)
            sequence.truncate(0)
            losses.append(mean_nll(sequence, row.ids))
        if path == base:
            assert list(text.ids) == said[0, len(question) :].tolist()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # Of the whole row, some of which is not learned: over the packed weights, too.
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] < 0.8 * losses[2]
