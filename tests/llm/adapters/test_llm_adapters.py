"""Adapters beside streamed models: the logits of peft, whatever the model is stored as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import ALL, ATTENTION, adapted, edit_adapter
from assets import relative_error, tiny_checkpoint
from fake_device import near_device
from gguf_models import write_gguf
from one_sequence import OneSequence
from packed_models import write_packed
from zoo import IDS, reference, stepwise, zoo_model

from layer_streamer.llm.engine import StreamingEngine

TOLERANCE = 1e-5
VISIBLE = 100 * TOLERANCE
OPTIONS = {"device": "cpu", "dtype": torch.float32, "max_length": 128}
SLOW = ("mistral", "llama-biases", "mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe")


@contextmanager
def opened(path: Path, adapter: Path | None, **options: Any) -> Iterator[StreamingEngine]:
    with StreamingEngine(path, adapter=adapter, **(OPTIONS | options)) as engine:
        yield engine


def logits(path: Path, adapter: Path | None, **options: Any) -> torch.Tensor:
    """Of a prompt, then of a token at a time."""
    with opened(path, adapter, **options) as engine:
        sequence = OneSequence(engine._runner)
        return stepwise(lambda ids: sequence.forward(ids, every_position=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else [])
        for name in ("llama", "qwen2", "qwen3", "gemma3_text", *SLOW)
    ],
)
def test_an_adapter_beside_streamed_weights_gives_the_logits_of_peft(
    tmp_path: Path, name: str
) -> None:
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path / "base", model)
    experts = "moe" in name or name in ("mixtral", "gpt_oss")
    theirs = adapted(model, tmp_path / "adapter", ATTENTION if experts else ALL)
    expected = reference(theirs)
    assert relative_error(logits(path, tmp_path / "adapter", n_gpu=0), expected) <= TOLERANCE
    assert relative_error(reference(model), expected) > VISIBLE


def test_layers_that_are_computed_in_host_memory_have_the_adapter_there(tmp_path: Path) -> None:
    """In float32, whatever the device computes in: no further off than where all are streamed."""
    model = zoo_model("qwen2")
    path = tiny_checkpoint(tmp_path / "base", model)
    expected = reference(adapted(model, tmp_path / "adapter"))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "n_gpu": 0}
    with near_device():
        ways = [logits(path, tmp_path / "adapter", host_layers=n, **options) for n in (None, 2)]
    streamed, there = (relative_error(found, expected) for found in ways)
    assert there <= 1.2 * streamed < relative_error(reference(model), expected) / 4


def test_ranks_and_alphas_of_their_own_and_rank_stabilised_scales_are_those_of_peft(
    tmp_path: Path,
) -> None:
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path / "base", model)
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 2}}
    theirs = adapted(model, tmp_path / "adapter", use_rslora=True, **patterns)
    expected = reference(theirs)
    assert relative_error(logits(path, tmp_path / "adapter"), expected) <= TOLERANCE


def test_beside_a_gguf_file_whose_heads_are_permuted_an_adapter_is_permuted_too(
    tmp_path: Path,
) -> None:
    model = zoo_model("llama")
    write_gguf(tmp_path / "model.gguf", model)
    expected = reference(adapted(model, tmp_path / "adapter"))
    found = logits(tmp_path / "model.gguf", tmp_path / "adapter")
    assert relative_error(found, expected) <= TOLERANCE


def test_beside_packed_weights_an_adapter_is_added_to_the_unpacked_products(
    tmp_path: Path,
) -> None:
    model = zoo_model("qwen2")
    path = write_packed(tmp_path / "base", model, "ct4-g32")  # the model has what is unpacked
    expected = reference(adapted(model, tmp_path / "adapter"))
    assert relative_error(logits(path, tmp_path / "adapter"), expected) <= TOLERANCE


def test_with_reproducible_an_adapters_tokens_are_alike_alone_and_in_a_batch(
    tmp_path: Path,
) -> None:
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path / "base", model)
    expected = reference(adapted(model, tmp_path / "adapter"))
    options = {"reproducible": True, "max_batch": 4, "kv_tokens": 1024}
    with opened(path, tmp_path / "adapter", **options) as engine:
        rows = engine._runner.kv.rows
        some = [(rows.add(len(ids)), ids) for ids in (IDS[:21], IDS[:9], IDS[:50])]
        together = engine._runner.forward(some)[2]
        alone = engine._runner.forward([(rows.add(50), IDS[:50])])[0]
    assert torch.equal(together, alone)
    assert relative_error(alone, expected[49]) <= TOLERANCE


def test_an_adapter_of_zeros_changes_no_bit(tmp_path: Path) -> None:
    model = zoo_model("qwen3")
    path = tiny_checkpoint(tmp_path / "base", model)
    adapted(model, tmp_path / "adapter")
    edit_adapter(tmp_path / "adapter", lambda t: [x.zero_() for n, x in t.items() if "_B." in n])
    assert torch.equal(logits(path, tmp_path / "adapter"), logits(path, None))


def test_a_draft_by_the_models_own_weights_has_the_adapter_and_changes_no_token(
    tmp_path: Path,
) -> None:
    model = zoo_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    path = tiny_checkpoint(tmp_path / "base", model)
    adapted(model, tmp_path / "adapter")
    found = []
    for draft in (None, "self"):
        options = {"dtype": torch.bfloat16, "reproducible": True, "draft": draft}
        with opened(path, tmp_path / "adapter", **options) as engine:
            asked = {"max_new_tokens": 12, "temperature": 0, "return_details": True}
            found.append(engine.generate(IDS[:20], **asked))
    assert found[0].ids == found[1].ids and found[1].drafted > 0


def test_the_memory_plan_has_room_for_the_adapter(tmp_path: Path) -> None:
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path / "base", model)
    adapted(model, tmp_path / "adapter", r=8)
    planned = []
    for adapter in (None, tmp_path / "adapter"):
        with opened(path, adapter) as engine:
            planned.append(engine.plan.device_nbytes)
            adapters = engine.model.names.adapter
    assert adapters is not None
    assert planned[1] - planned[0] == 4 * adapters.numel


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [False, True])
def test_on_a_gpu_passes_that_are_captured_add_the_adapter_too(
    tmp_path: Path, streams: bool
) -> None:
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path / "base", model)
    expected = reference(adapted(model, tmp_path / "adapter"))
    options: dict[str, Any] = {"device": "cuda", "device_budget": "1GiB"}
    if streams:
        options |= {"kv": "host", "n_gpu": 0}
        with opened(path, tmp_path / "adapter", **options) as engine:  # the least, nothing to spare
            options["device_budget"] = engine.plan.device_nbytes
    with opened(path, tmp_path / "adapter", **options) as engine:
        assert (set(engine.streamer.plan.tiers) != {"device"}) == streams
        sequence = OneSequence(engine._runner)
        found = stepwise(lambda ids: sequence.forward(ids)[-1:])
        decoder = engine._runner.decoder
        assert decoder is not None and decoder.passes > 0
    assert relative_error(found.cpu(), expected[49:]) <= TOLERANCE
