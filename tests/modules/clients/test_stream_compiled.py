"""torch.compile of the blocks of streamed models, as docs/modules.md says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from tiny_models import tiny_class, tiny_model
from torch._dynamo import utils

from layer_streamer import stream
from layer_streamer.modules.blocks import find_stacks

IDS = torch.tensor([[9, 17, 33, 12]])
SLOTS: list[dict[str, Any]] = [{"n_gpu": 1}, {"n_gpu": 2, "n_cpu": 0}, {"device_budget": "auto"}]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    fresh_counters()
    yield
    fresh_counters()


def fresh_counters() -> None:
    torch._dynamo.reset()
    utils.counters.clear()


def compile_blocks(model: Any, **options: Any) -> int:
    """Compile each block's forward; the number of blocks."""
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    for block in blocks:
        block.module.forward = torch.compile(block.module.forward, backend="eager", **options)
    return len(blocks)


def both(folder: Path, name: str, **options: Any) -> tuple[Any, Any]:
    with quiet():
        tiny_model(name).save_pretrained(folder)
        return loaded(tiny_class(name), folder).eval(), stream(folder, device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param("llama", options, marks=pytest.mark.slow) for options in SLOTS),
        ("mixtral", SLOTS[1]),
        ("gpt2", SLOTS[0]),
    ],
)
def test_blocks_that_are_alike_are_one_graph_in_every_slot(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    plain, model = both(tmp_path, name, **options)
    assert compile_blocks(model, fullgraph=True) == 3
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(4):
            ids = (IDS + shift) % 100
            got = model(ids, use_cache=False).logits
            assert torch.equal(got, plain(ids, use_cache=False).logits)
    assert utils.counters["stats"]["unique_graphs"] == 1
    model.layer_streamer.close()


@pytest.mark.slow
def test_generate_makes_no_more_graphs_than_of_a_resident_model(tmp_path: Path) -> None:
    plain, model = both(tmp_path, "llama", n_gpu=1)
    graphs, tokens = list[int](), list[torch.Tensor]()
    for some in (plain, model):
        compile_blocks(some)
        with quiet():
            tokens.append(some.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0))
        graphs.append(utils.counters["stats"]["unique_graphs"])
        fresh_counters()
    assert torch.equal(*tokens)
    assert graphs[0] == graphs[1]
    model.layer_streamer.close()


@pytest.mark.slow
def test_graphs_of_a_diffusion_transformer_are_those_of_a_resident_one(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tiny_diffusers import run_diffuser, tiny_diffuser

    name = "FluxTransformer2DModel"
    plain: Any = tiny_diffuser(name)
    plain.save_pretrained(tmp_path)
    model: Any = stream(tmp_path, device="cpu", n_gpu=1)
    graphs, answers = [], []
    for some in (plain, model):
        compile_blocks(some)
        first = run_diffuser(name, some)
        graphs.append(utils.counters["stats"]["unique_graphs"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            answers += [first, run_diffuser(name, some)]
        fresh_counters()
    # Double and single blocks; the first single one is given a tensor with other strides.
    assert graphs == [3, 3]
    assert all(torch.allclose(some, answers[0], rtol=0, atol=1e-6) for some in answers)
    model.layer_streamer.close()
