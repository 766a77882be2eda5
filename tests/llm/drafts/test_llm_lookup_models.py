"""Lookup in texts of real and of tiny models: the same text, in fewer passes where it repeats."""

from __future__ import annotations

import faulthandler
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import one_torch_thread, tiny_checkpoint, tiny_model
from fetch_model import kept
from paths import ROOT
from small_engine import drafts_always

from layer_streamer.llm.engine import StreamingEngine

EDIT = """Rename `pts` to `points` and say in the docstring that an empty list gives None. Return \
only the code.

def centre(pts):
    \"\"\"The mean of points.\"\"\"
    if not pts:
        return None
    x = sum(p[0] for p in pts) / len(pts)
    y = sum(p[1] for p in pts) / len(pts)
    return x, y
"""


def test_a_tiny_models_text_is_that_of_transformers_own_lookup(tmp_path: Path) -> None:
    model = tiny_model("qwen2", seed=5)
    path = tiny_checkpoint(tmp_path, model)
    prompt = [3, 9, 4, 7, 5, 3, 9, 4, 7, 5, 3, 9]
    with torch.no_grad():
        whole: Any = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None,
            pad_token_id=0, prompt_lookup_num_tokens=8,
        )  # fmt: skip
    with StreamingEngine(path, device="cpu", max_length=64, lookup=True) as engine:
        drafts_always(engine)
        engine._stop_ids = frozenset()
        done = engine.generate(prompt, max_new_tokens=40, temperature=0.0, return_details=True)
        again = engine.generate(prompt, max_new_tokens=40, temperature=0.0, return_details=True)
    assert list(done.ids) == whole[0, len(prompt) :].tolist()
    assert again.ids == done.ids
    assert again.passes < done.passes, "the text was there before: it is in the pool"


@pytest.mark.slow
def test_an_edit_of_code_by_a_real_model_takes_a_third_of_the_passes_or_fewer() -> None:
    path = kept("qwen2.5-coder-0.5b")
    if path is None:
        pytest.skip("not here: examples/make/fetch_model.py qwen2.5-coder-0.5b")
    faulthandler.cancel_dump_traceback_later()  # passes over a real model take minutes
    found = []
    for lookup in (False, True):
        with (
            one_torch_thread(),
            StreamingEngine(path, device="cpu", max_length=320, lookup=lookup) as engine,
        ):
            found.append(
                engine.generate(
                    [{"role": "user", "content": EDIT}],
                    max_new_tokens=96,
                    temperature=0.0,
                    return_details=True,
                )
            )
    plain, looked = found
    assert looked.ids == plain.ids
    assert len(looked.ids) >= 3 * looked.passes


@pytest.mark.slow
def test_a_small_real_model_gives_the_tokens_a_pass_that_its_agreement_says() -> None:
    """Of the places where the draft of 0.5B alone was found to agree (docs/benchmarks)."""
    paths = [kept(f"qwen2.5-coder-{size}") for size in ("1.5b", "0.5b")]
    if None in paths:
        pytest.skip("not here: examples/make/fetch_model.py qwen2.5-coder-1.5b, and -0.5b")
    faulthandler.cancel_dump_traceback_later()
    text = json.loads((ROOT / "docs/benchmarks/drafts.json").read_text())["texts"]["sql"]
    chain, agrees = 8, text["draft-0.5b_agrees"]
    with (
        one_torch_thread(),
        StreamingEngine(paths[0], device="cpu", max_length=320, draft=paths[1]) as engine,
    ):
        drafts_always(engine)
        source: Any = engine.scheduler.drafting._sources["draft"]  # type: ignore[union-attr]
        propose = source.propose
        source.propose = lambda key, ids, most: propose(key, ids, min(most, chain))
        done = engine.generate(
            [{"role": "user", "content": text["prompt"]}],
            max_new_tokens=len(text["ids"]),
            temperature=0.0,
            return_details=True,
        )
    assert list(done.ids) == text["ids"]
    passes, at = 1, 1  # the prompt's pass gives the first token
    while at < len(agrees):
        run = len(agrees[at:].partition("0")[0])
        at += min(run, chain) + 1
        passes += 1
    assert done.passes <= passes / 0.9
