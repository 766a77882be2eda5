"""The program's default device and dtype change nothing of what a streamer hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import odd_checkpoint
from support import Witness, open_checkpoint
from torch_defaults import other_defaults


@pytest.mark.parametrize(
    "options", [{"n_gpu": 0}, {"read_mode": "mapped"}, {"device_budget": "1GiB"}]
)
def test_every_tensor_is_where_and_what_it_would_be(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tensors = odd_checkpoint(tmp_path)
    with other_defaults(), open_checkpoint(None, tmp_path, tail=["embed"], **options) as streamer:
        for _, weights in streamer.sweep():
            assert all(tensor.device.type == "cpu" for tensor in weights.values())
        for found in (streamer.load_static("embed"), streamer.host_tensor("embed")):
            assert found.device.type == "cpu" and torch.equal(found, tensors["embed"])
        assert streamer.last_pass is not None
    with open_checkpoint(None, tmp_path, **options) as streamer, other_defaults():
        witness = Witness(None, tensors)
        streamer.run_pass(None, witness)
        witness.check()
