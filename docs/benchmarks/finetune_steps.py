"""Steps of LoRA of one row of random tokens, for ``measure_finetune.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from watch import HostMemory

STEPS = 2
"""In a row, timed."""


def settings_of(steps: int | None = None) -> Any:
    """The command's own, a batch of one row a step."""
    from layer_streamer.llm.finetuning.settings import Settings

    return Settings(accumulation=1, steps=steps, save_steps=1000)


def batch_of(model: Any, tokens: int) -> dict[str, torch.Tensor]:
    """One row of random tokens."""
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(10, min(model.config.vocab_size, 30_000), (1, tokens), generator=made)
    return {"input_ids": ids.to(model.device), "labels": ids.to(model.device)}


class Steps:
    """Steps of AdamW over a model's adapters, of one batch each."""

    def __init__(self, model: Any, tokens: int, between: Callable[[], object]) -> None:
        """``between``: called between the forward and the backward of :meth:`looked_at`."""
        from layer_streamer.llm.finetuning.training import adapted, token_loss

        self.batch, self._loss, self._between = batch_of(model, tokens), token_loss, between
        self.model = adapted(model, settings_of(), "base").train()
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.losses: list[float] = []

    def step(self, between: Callable[[], object] = lambda: None) -> None:
        """Forward, backward, and the optimizer's step."""
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = self.model(input_ids=self.batch["input_ids"]).logits
        loss = self._loss(logits, self.batch["labels"])
        del logits
        between()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())

    def looked_at(self) -> None:
        """A step with a look between its ways."""
        self.step(self._between)

    def halves(self) -> list[float]:
        """Seconds of a step's forward, and of the rest of it, with a wait in between."""
        marks = [time.perf_counter()]

        def mark() -> None:
            wait()
            marks.append(time.perf_counter())

        wait()
        marks[0] = time.perf_counter()
        self.step(mark)
        mark()
        return [marks[1] - marks[0], marks[2] - marks[1]]

    def turns(self, count: int, limit: Callable[[], float], host: HostMemory) -> dict[str, Any]:
        """Seconds a step of each turn, of the limit beside it, and of a step's two ways."""
        times: dict[str, Any] = {"seconds": [], "limit": [], "halves": []}
        host.rest()
        for _ in range(count):
            times["limit"].append(limit())
            times["halves"].append(self.halves())
            begin = time.perf_counter()
            for _ in range(STEPS):
                self.step()
            wait()
            times["seconds"].append((time.perf_counter() - begin) / STEPS)
            host.look()
        return times | {"losses": self.losses, "trained": self.trained}


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
