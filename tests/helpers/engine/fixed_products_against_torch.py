"""Passes whose bits depend on nothing that shares them, by Triton's kernels: run by
test_llm_reproducible.py, in a process of its own.

With TRITON_INTERPRET=1 on the CPU; otherwise compiled, on a GPU.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from triton_runs import FEW
from zoo import IDS, reference, zoo_model

from layer_streamer.llm.kernels import fixed_products
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.token_attention import TokenAttention

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])
NAMES = ["llama-one-kv-head"] if FEW else ["llama", "qwen2-window", "gemma3_text", "mistral"]
TOKENS = 4 if FEW else 26


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """By the kernel, into the middle of a wider matrix whose rest stays as it is."""
    out = torch.full((len(x), len(w) + 8), 7.0, dtype=x.dtype, device=DEVICE)
    fixed_products.launch_tiles(x, w, out[:, 4:-4])
    assert (out[:, :4] == 7).all() and (out[:, -4:] == 7).all()
    return out[:, 4:-4]


@pytest.mark.parametrize("shape", [(1, 1, 8), (65, 70, 40), (3, 130, 300), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_torchs(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, rows, width = shape
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=dice).to(DEVICE, dtype)
    wide = torch.randn(rows, width + 8, generator=dice).to(DEVICE, dtype)
    expected = (x.double() @ wide[:, :width].double().T).to(dtype)
    found = product(x, wide[:, :width])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tokens_product_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    x = torch.randn(150, 100, generator=dice).to(DEVICE, dtype)
    w = torch.randn(70, 100, generator=dice).to(DEVICE, dtype)
    whole = product(x, w)
    for first, end in ((0, 1), (149, 150), (3, 20), (60, 128), (1, 150)):
        assert torch.equal(product(x[first:end].clone(), w), whole[first:end])
    assert torch.equal(product(x.flip(0), w), whole.flip(0))


def logits(path: Path, ids: Sequence[int], cuts: Sequence[int], *, others: int) -> torch.Tensor:
    """After each token of a row that takes so many of them a pass, beside other rows."""
    dice, found, at = random.Random(2), [], 0
    chunking = Chunking(tokens=70, reproducible=True)
    with open_runner(
        path, load_config(path), tokens=1024, max_rows=3, device=str(DEVICE), chunking=chunking
    ) as runner:
        row = runner.kv.rows.add(len(ids))
        beside = [runner.kv.rows.add(100) for _ in range(others)]
        assert row is not None
        for count in cuts:
            own = (row, ids[at : at + count])
            rest = [(b, dice.choices(IDS, k=3)) for b in beside if b is not None and count < 9]
            entries = [*rest[:1], own, *rest[1:]]
            every = runner.forward(entries, every_position=True)
            first = sum(len(part) for _, part in rest[:1])
            found.append(every[first : first + count].clone())
            at += count
    return torch.cat(found).cpu()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_whatever_shares_a_pass_and_near_those_of_transformers(
    tmp_path: Path, name: str
) -> None:
    layers = {"num_hidden_layers": 1} if FEW else {}
    model, ids = zoo_model(name, **layers), IDS[:TOKENS]
    path = tiny_checkpoint(tmp_path, model)
    whole = logits(path, ids, [TOKENS], others=0)
    assert relative_error(whole, reference(model, ids)) <= 1e-5
    for cuts, others in (([TOKENS - 3, 1, 2], 0), ([TOKENS - 3, 3], 1 if FEW else 2)):
        assert torch.equal(logits(path, ids, cuts, others=others), whole)


def test_it_is_by_these_kernels_that_a_device_that_triton_serves_is_served(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("llama"))
    chunking = Chunking(reproducible=True)
    with open_runner(path, load_config(path), device=str(DEVICE), chunking=chunking) as runner:
        taken = runner.attention
        row = runner.kv.rows.add(8)
        assert row is not None
        kinds = []
        runner.attention = lambda chunk: kinds.append(taken(chunk)) or kinds[-1]  # type: ignore
        runner.forward([(row, [3, 4])])
    assert [type(kind) for kind in kinds] == [TokenAttention]
