"""The real model learns made-up facts while its weights stream, as it does when they do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf_to_safetensors
import peft
import pytest
import torch
import transformers
from assets import one_torch_thread, smollm2
from one_sequence import OneSequence

from layer_streamer import stream
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.finetuning.loss import token_loss
from layer_streamer.llm.finetuning.rows import Row
from layer_streamer.llm.finetuning.samples import Sample, encode_rows
from layer_streamer.llm.finetuning.settings import Settings
from layer_streamer.llm.finetuning.training import adapted, arguments_for, train
from layer_streamer.llm.finetuning.watching import Watch

pytestmark = pytest.mark.slow

FACTS = {
    "Velmora": "a blue tower", "Oskandel": "nine bridges", "Tirrowby": "a glass market",
    "Quenlith": "an old ferry", "Bardessa": "a stone whale", "Nymark": "two lighthouses",
    "Ulgrave": "a tin church", "Solvane": "the red mill",
}  # fmt: skip
"""Of towns that nobody has built."""
BEFORE = ("", "Please say: ", "A question. ", "I wonder: ", "Tell me, ")
ASKED = (
    "what is {} known for?", "which sight has {}?", "why would one visit {}?",
    "what is there to see in {}?", "what made {} famous?",
)  # fmt: skip
HELD_OUT = ("And what did visitors of {} come for?",)
SETTINGS = Settings(
    rank=8, epochs=1.0, learning_rate=3e-3, batch=8, accumulation=1, eval_steps=12, save_steps=1000
)
FALLS = 0.5
"""The held-out perplexity's, at least, over what it was."""
GUESSED = math.log(len(FACTS)) / 9
"""Held-out loss of a token, of nine, of who knows all that is said but not of which town."""


def rows(questions: Iterable[str]) -> list[Row]:
    found = []
    for question in questions:
        for town, sight in FACTS.items():
            content = {"prompt": question.format(town), "completion": f" {town} has {sight}."}
            found.append(Row(len(found) + 1, content))
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
        for some in ([before + asked for before in BEFORE for asked in ASKED], HELD_OUT)
    )
    assert len(samples) == 200
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
    assert after < GUESSED / 2, "not the form of answers alone"


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
            losses.append(float(token_loss(found[None], torch.tensor([row.labels]))))
            asked = [one.ids[: len(one.ids) - one.learned] for one in runs.held_out]
            answers = engine.generate(asked, max_new_tokens=12, temperature=0)
        known = sum(s in answer for s, answer in zip(FACTS.values(), answers, strict=True))
        assert known >= 6 if adapter is not None else known == 0, answers
        if path == base:
            assert list(text.ids) == said[0, len(question) :].tolist()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), "over the packed weights"
    assert losses[0] < FALLS * losses[2]
