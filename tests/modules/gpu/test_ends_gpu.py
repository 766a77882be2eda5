"""Rows of tables and heads on a real GPU: copies that nobody waits for are right all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import quiet

from layer_streamer import stream

pytestmark = pytest.mark.gpu


def opened(folder: Path, *, tied: bool, **options: Any) -> tuple[Any, Any]:
    """A model of 40 MB of table and as much of head, resident on the GPU and streamed."""
    config = transformers.LlamaConfig(
        vocab_size=40_003, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    with quiet():
        plain = transformers.LlamaForCausalLM(config).eval()
        plain.save_pretrained(folder)
        model = stream(folder, device="cuda", embeddings="host", head="stream", **options)
    return plain.cuda(), model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"n_cpu_pinned": 2}, {"read_mode": "direct"}])
def test_answers_are_those_of_the_resident_model(
    tmp_path: Path, tied: bool, options: dict[str, Any]
) -> None:
    plain, model = opened(tmp_path, tied=tied, device_budget="1GiB", **options)
    ids = torch.randint(0, 40_003, (2, 100), device="cuda")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-4)
        some = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        with quiet():
            assert torch.equal(model.generate(ids, **some), plain.generate(ids, **some))
    model.layer_streamer.close()


def test_rows_that_are_looked_up_without_a_wait_between_are_exact(tmp_path: Path) -> None:
    plain, model = opened(tmp_path, tied=False)
    asked = torch.randint(0, 40_003, (400, 1, 3))
    embed, table = model.get_input_embeddings(), plain.get_input_embeddings().weight
    busy = torch.ones(4096, 4096, device="cuda")
    with torch.no_grad():
        found = []
        for ids in asked:
            busy = torch.mm(busy, busy).clamp_(-1, 1)  # the copies come late
            found.append(embed(ids))
    assert all(torch.equal(got, table[ids]) for got, ids in zip(found, asked.cuda(), strict=True))
    model.layer_streamer.close()
