"""Names of modules that are not transformers' own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from recipes import differences, made_all, write
from torch import nn

from layer_streamer import CheckpointError
from layer_streamer.modules.naming.names import name_tensors


class Net(nn.Module):
    """Blocks with a norm that has statistics, a head that is the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


def net(tied: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tied)


def net_on_meta(tied: bool = False) -> Net:
    with torch.device("meta"):
        return Net(tied)


def test_names_are_equal(tmp_path: Path) -> None:
    names = name_tensors(net_on_meta(), write(tmp_path, net().state_dict()))
    assert (names.missing, names.unused, dict(names.tied)) == ((), (), {})
    assert differences(made_all(names), net()) == []
    assert "table" not in names.recipes


def test_a_key_mapping_makes_them_so(tmp_path: Path) -> None:
    odd = {
        f"net.{name.replace('blocks.', 'layer')}": t for name, t in net().state_dict().items()
    }  # fmt: skip
    mapping = {r"^net\.": "", r"^layer(\d+)": r"blocks.\1"}
    names = name_tensors(net_on_meta(), write(tmp_path, odd), key_mapping=mapping)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), net()) == []


@pytest.mark.parametrize("kept", ["head.weight", "embed.weight"])
def test_one_object_under_two_names_is_tied(kept: str, tmp_path: Path) -> None:
    tensors = net(tied=True).state_dict()
    del tensors["head.weight" if kept == "embed.weight" else "embed.weight"]
    names = name_tensors(net_on_meta(tied=True), write(tmp_path, tensors))
    assert [*names.tied.values()] == [kept] and names.missing == ()
    assert differences(made_all(names), net(tied=True)) == []


def test_what_is_missing_and_what_is_left_over_is_listed_in_order(tmp_path: Path) -> None:
    tensors = net().state_dict()
    del tensors["norm.running_mean"], tensors["blocks.1.bias"]
    manifest = write(tmp_path, {**tensors, "y": torch.ones(1), "x": torch.ones(2)})
    names = name_tensors(net_on_meta(), manifest)
    assert names.missing == ("blocks.1.bias", "norm.running_mean")
    assert {*names.unused} == {"x", "y"}


def test_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = {**net().state_dict(), "blocks.2.weight": torch.ones(4, 5)}
    with pytest.raises(CheckpointError, match=r"'blocks\.2\.weight'.*\[4, 4\], got \[4, 5\]"):
        name_tensors(net_on_meta(), write(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int64])
def test_numbers_that_a_cast_would_not_keep_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {**net().state_dict(), "blocks.2.weight": torch.ones(4, 4).to(dtype)}
    with pytest.raises(CheckpointError, match=rf"blocks\.2.*torch\.float32, got {dtype}"):
        name_tensors(net_on_meta(), write(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in net().state_dict().items()}
    names = name_tensors(net_on_meta(), write(tmp_path, stored))
    counted = names.recipes["norm.num_batches_tracked"]
    assert counted.convert is None
    want = net().to(dtype).to(torch.float32)
    assert differences(made_all(names), want) == []


def test_a_plain_module_needs_no_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    names = name_tensors(net_on_meta(), write(tmp_path, net().state_dict()))
    assert len(names.recipes) == len(net().state_dict())


def test_no_module_imports_what_is_an_extra_except_the_one_that_is_imported_late() -> None:
    extra = re.compile(r"^(from|import) (transformers|diffusers|accelerate|peft)\b", re.MULTILINE)
    folder = ROOT / "layer_streamer" / "modules"
    found = {path.name for path in folder.rglob("*.py") if extra.search(path.read_text())}
    assert found == {"packed_integers.py"}
