"""Transformers of diffusers, streamed from their own folders."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import quiet
from test_stream import Net, own_checkpoint
from tiny_diffusers import DIFFUSERS, run_diffuser, tiny_diffuser
from torch import nn

from layer_streamer import ConfigError, stream

TRANSFORMERS = sorted(name for name in DIFFUSERS if name.endswith("Model"))
STACKS = {"FluxTransformer2DModel": 5, "HunyuanVideoTransformer3DModel": 5}
"""Blocks of those with two lists of them, in one sequence."""
ADDRESSES = 1e-6

installed = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_streamed_transformer_gives_what_the_resident_one_does(tmp_path: Path, name: str) -> None:
    with quiet():
        plain: Any = tiny_diffuser(name)
        plain.save_pretrained(tmp_path)
        want = run_diffuser(name, plain)
        model: Any = stream(tmp_path, device="cpu", n_gpu=1)
        assert type(model) is type(plain)
        for _ in range(2):
            assert torch.allclose(run_diffuser(name, model), want, rtol=0, atol=ADDRESSES)
    plans = model.layer_streamer.plan.sequences
    largest = max(len(plan.layers) for plan in plans.values())
    assert largest == STACKS.get(name, 3)
    assert model.layer_streamer.last_pass
    model.layer_streamer.close()


@installed
@pytest.mark.slow
def test_in_half_precision_rotations_and_what_is_kept_stay_as_diffusers_has_them(
    tmp_path: Path,
) -> None:
    name = "WanTransformer3DModel"
    with quiet():
        plain: Any = tiny_diffuser(name)
        plain.save_pretrained(tmp_path)
        plain = type(plain).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        model: Any = stream(tmp_path, device="cpu", dtype=torch.bfloat16)
    for some in ("named_parameters", "named_buffers"):
        dtypes = [{n: t.dtype for n, t in getattr(m, some)()} for m in (plain, model)]
        assert dtypes[0] == dtypes[1]
        assert torch.float32 in dtypes[0].values()
    model.layer_streamer.close()


@installed
@pytest.mark.slow
def test_a_class_that_diffusers_lacks_is_named(tmp_path: Path) -> None:
    own_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ConfigError, match="has no class 'NoSuchModel'"):
        stream(tmp_path)


def test_a_buffer_on_meta_that_no_checkpoint_has_is_named(tmp_path: Path) -> None:
    own_checkpoint(tmp_path)
    with torch.device("meta"):
        net: nn.Module = Net()
        net.register_buffer("places", torch.arange(3), persistent=False)
    with pytest.raises(ConfigError, match="Net: its buffer 'places' is on meta"):
        stream(net, tmp_path, stacks=["blocks.{i}.", "late.{i}."], device="cpu")
