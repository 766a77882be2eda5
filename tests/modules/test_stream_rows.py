"""Rows of embeddings from host memory: the same answers, and no table on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from test_stream import ADDRESSES
from tiny_models import TYPES, run, tiny_class, tiny_model
from torch import nn

from layer_streamer import ConfigError, StreamerError, stream

UNTIED = ("llama", "qwen3_moe", "gpt_neox", "gemma3_text", "bart", "bert", "qwen3_vl")
"""Some of them scale what they look up, some have a table for places as well."""


def untie(folder: Path, name: str) -> Any:
    """A tiny model whose head has weights of its own, saved; what transformers loads of it."""
    with quiet():
        model: Any = tiny_model(name)
        model.save_pretrained(folder)
        return loaded(tiny_class(name), folder).eval()


def stream_it(name: str, folder: Path, **options: Any) -> Any:
    with quiet():
        return stream(folder, cls=tiny_class(name), device="cpu", embeddings="host", **options)


@pytest.mark.parametrize("name", [name for name in UNTIED if name in TYPES])
def test_answers_are_those_of_the_resident_model(tmp_path: Path, name: str) -> None:
    plain = untie(tmp_path, name)
    model = stream_it(name, tmp_path)
    want = run(name, plain)
    for _ in range(2):
        got = run(name, model)
        for key, tensor in want.items():
            assert torch.allclose(got[key], tensor, rtol=0, atol=ADDRESSES), key
    model.layer_streamer.close()


def test_a_table_takes_no_memory_and_no_part_of_the_budget(tmp_path: Path) -> None:
    plain = untie(tmp_path, "llama")
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    whole = stream(tmp_path, device="cpu")
    model = stream_it("llama", tmp_path)
    table = plain.model.embed_tokens.weight
    less = whole.layer_streamer.plan.outside_nbytes - model.layer_streamer.plan.outside_nbytes
    assert less == table.numel() * table.element_size()
    assert model.device == plain.device
    assert model.get_input_embeddings().weight.shape == table.shape
    for some in (whole, model):
        some.layer_streamer.close()


def test_a_table_that_is_used_outside_of_its_lookup_is_named(tmp_path: Path) -> None:
    untie(tmp_path, "llama")
    model = stream_it("llama", tmp_path)
    run("llama", model)
    with pytest.raises(StreamerError, match=r"model\.embed_tokens\.weight is used"):
        model.get_input_embeddings().weight + 1
    model.layer_streamer.close()


def test_a_token_that_has_no_row_is_an_error_and_the_next_lookup_is_right(tmp_path: Path) -> None:
    plain = untie(tmp_path, "llama")
    model = stream_it("llama", tmp_path)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert torch.equal(run("llama", model)["logits"], run("llama", plain)["logits"])
    model.layer_streamer.close()


@pytest.mark.parametrize("ids", [[], [[]], [3], [[3, 3, 1], [0, 10, 3]]])
def test_any_shape_of_ids_is_looked_up(tmp_path: Path, ids: list[Any]) -> None:
    from safetensors.torch import save_file

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8, padding_idx=10)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.embed(input=ids)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(1)
    plain = Net().eval()
    save_file(dict(plain.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        net = Net()
    stream(net, tmp_path, stacks=["blocks.{i}."], device="cpu", embeddings="host")
    asked = torch.tensor(ids, dtype=torch.int64)
    assert torch.allclose(net(asked), plain(asked), rtol=0, atol=ADDRESSES)


def test_another_word_for_where_they_are_is_refused(tmp_path: Path) -> None:
    untie(tmp_path, "llama")
    with pytest.raises(ConfigError, match="embeddings='disk': must be one of"):
        stream(tmp_path, device="cpu", embeddings="disk")  # type: ignore[call-overload]
