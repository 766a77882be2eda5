"""Heads and tables of any shape: rows that do not divide, one chunk or a hundred, any ids."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from layer_streamer import stream
from layer_streamer.modules.ends import head, rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Net(nn.Module):
    """A table, blocks, and a head that may share the table, or have a bias."""

    def __init__(self, vocab: int, width: int, *, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, vocab, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def saved(net: nn.Module, folder: Path) -> None:
    """All of its parameters, each once; they begin at any place of the file."""
    own = {name: p.detach().contiguous() for name, p in net.named_parameters()}
    save_file({"odd": torch.zeros(1, dtype=torch.uint8), **own}, folder / "model.safetensors")


class Case(NamedTuple):
    """One layout, and how it is cut."""

    vocab: int
    width: int
    shape: list[int]
    dtype: torch.dtype
    cast: torch.dtype | None
    chunk: int
    fewest: int
    few: int
    tied: bool
    bias: bool
    seed: int


CASES = st.builds(
    Case,
    vocab=st.integers(1, 130),
    width=st.integers(1, 40),
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    cast=st.sampled_from([None, *DTYPES]),
    chunk=st.integers(1, 4096),
    fewest=st.integers(1, 200),
    few=st.integers(0, 8),
    tied=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=30)
@given(CASES)
def test_any_layout_gives_what_the_resident_module_gives(case: Case) -> None:
    vocab, width, shape, dtype, cast, chunk, fewest, few, tied, bias, seed = case
    torch.manual_seed(seed)
    plain = Net(vocab, width, tied=tied, bias=bias).to(dtype).eval()
    ids = torch.randint(0, vocab, shape)
    with tempfile.TemporaryDirectory() as made, pytest.MonkeyPatch.context() as patched:
        patched.setattr(head, "CHUNK", chunk)
        patched.setattr(head, "FEWEST", fewest)
        patched.setattr(rows, "FEW", few)
        saved(plain, Path(made))
        with torch.device("meta"):
            net = Net(vocab, width, tied=tied, bias=bias).to(cast or dtype)
        stream(net, made, stacks=["blocks.{i}."], device="cpu", embeddings="host", head="stream")
        with torch.no_grad():
            want = plain.to(cast or dtype)(ids)
            for _ in range(2):
                got = net(ids)
                assert got.dtype == want.dtype
                # Kernels differ by last bits of sums, whose terms are larger than they; a wrong row
                # would be another number altogether.
                near = 2e-2 if want.itemsize == 2 else 1e-4
                torch.testing.assert_close(got, want, rtol=near, atol=near)
        plan: Any = net.layer_streamer.plan  # type: ignore[union-attr]
        assert "head" in plan.sequences
        assert set(plan.tables) == {"embed.weight"}
        net.layer_streamer.close()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("few", [0, rows.FEW])
@pytest.mark.parametrize("ids", [[], [[]], [3], [[3, 3, 1], [0, 10, 3]], [[10]]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_exact_whichever_way_they_are_looked_up(
    tmp_path: Path, few: int, ids: list[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "FEW", few)
    torch.manual_seed(1)
    plain = Net(11, 8, tied=False, bias=False)
    saved(plain, tmp_path)
    with torch.device("meta"):
        net = Net(11, 8, tied=False, bias=False)
    stream(net, tmp_path, stacks=["blocks.{i}."], device="cpu", embeddings="host")
    asked = torch.tensor(ids, dtype=dtype)
    got = net.embed(asked)
    assert torch.equal(got, plain.embed(asked))
    with pytest.raises(IndexError):
        net.embed(torch.tensor([11]))
    again = net.embed(asked)
    assert torch.equal(got, again) and (got.numel() == 0 or got.data_ptr() != again.data_ptr())
    net.layer_streamer.close()  # type: ignore[operator, union-attr]


def test_a_matrix_that_anything_else_shares_stays_where_it_is(tmp_path: Path) -> None:
    class Third(Net):
        def __init__(self) -> None:
            super().__init__(11, 8, tied=True, bias=False)
            self.third = nn.Bilinear(8, 8, 11, bias=False)
            self.other = nn.Embedding(5, 8, max_norm=1.0)
            self.blocks[1].weight = self.blocks[0].weight
            self.table = nn.Embedding(8, 8)
            self.table.weight = self.blocks[0].weight
            self.scale = nn.Linear(8, 11, bias=False)
            self.scale.extra = self.embed.weight

    plain = Third()
    saved(plain, tmp_path)
    with torch.device("meta"):
        net = Third()
    stream(net, tmp_path, stacks=["blocks.{i}."], device="cpu", embeddings="host", head="stream")
    plan: Any = net.layer_streamer.plan  # type: ignore[union-attr]
    assert not plan.tables
    assert list(plan.sequences) == ["blocks", "scale"]
    net.layer_streamer.close()  # type: ignore[operator, union-attr]


def test_a_linear_module_whose_weight_its_parent_uses_is_no_head(tmp_path: Path) -> None:
    class Attending(Net):
        def __init__(self) -> None:
            super().__init__(11, 8, tied=False, bias=True)
            self.attention = nn.MultiheadAttention(8, 2)
            self.attention.out_proj.weight = nn.Parameter(torch.ones(300, 8))

    saved(Attending(), tmp_path)
    with torch.device("meta"):
        net = Attending()
    stream(net, tmp_path, stacks=["blocks.{i}."], device="cpu", head="stream")
    plan: Any = net.layer_streamer.plan  # type: ignore[union-attr]
    assert list(plan.sequences) == ["blocks", "head"]
    assert not net.attention.out_proj.weight.is_meta
    net.layer_streamer.close()  # type: ignore[operator, union-attr]
