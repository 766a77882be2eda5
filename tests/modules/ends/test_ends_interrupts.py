"""An interrupt at every line of tables and heads, and of the passes under them: the next forwards
are exact, on this thread or another."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupter import Interrupt, Interrupter
from safetensors.torch import save_file
from support import HANG_SECONDS, in_thread
from torch import nn

from layer_streamer import stream

BELOW = ("transport", "planning", "machine", "devices", "checkpoint")
"""Wings in which an interrupt is tried by the tests of passes."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_forwards_after_an_interrupt_anywhere_are_exact(
    tmp_path: Path, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python swallows, and says, what is raised while it finalizes a generator.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    torch.manual_seed(0)
    plain = Net()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        net: Any = Net()
    stacks = ["blocks.{i}."]
    stream(net, tmp_path, stacks=stacks, device="cpu", embeddings="host", head="stream")
    ids = [torch.tensor([[3, 0]]), torch.arange(50).repeat(2)]
    with torch.no_grad():
        want = [plain(some) for some in ids]

    def agree() -> None:
        with torch.no_grad():
            for some, expected in zip(ids, want, strict=True):
                assert torch.allclose(net(some), expected, rtol=0, atol=1e-5)

    number, fired = 0, True
    while fired:
        guard = threading.Timer(HANG_SECONDS, net.layer_streamer.close)
        guard.start()
        try:
            with Interrupter(number, "line", BELOW) as interrupter, torch.no_grad():
                net(ids[0])
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        if number // stride % 3 == 2:
            assert in_thread(agree) is None
        agree()
        guard.cancel()
        guard.join()
        fired, number = interrupter.fired, number + stride
    assert number > 400, "it was interrupted in earnest"
    net.layer_streamer.close()
