"""One peer, opened: what it is asked, how it is timed, what comes out."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Protocol

LEAST = 3
"""Tokens of a turn that are measured however long they take."""


class SkipError(Exception):
    """This peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Asked:
    """What every peer is asked alike."""

    checkpoint: Path
    """A folder as transformers writes it, or a GGUF file."""
    gguf: Path | None
    """The same weights for those that read GGUF."""
    work: Path
    """A folder for copies that a peer makes."""
    device: str
    device_nbytes: int | None
    """Of the device, for all that a process puts there; None: no limit."""
    prompt: int
    tokens: int
    turns: int
    seconds: float
    """After so long no further turn begins, and a turn ends after LEAST tokens."""
    threads: int
    share: float = 1.0
    """Of what the limit leaves: less is asked where a peer took too much before."""
    gpu_layers: int | None = None
    llama_bench: str | None = None

    @property
    def folder(self) -> Path:
        """The checkpoint, of those that read safetensors. SkipError if it is a GGUF file."""
        if self.checkpoint.is_file():
            raise SkipError("reads no GGUF")
        return self.checkpoint

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    def need_cuda(self) -> None:
        """SkipError without a GPU."""
        if not self.cuda:
            raise SkipError("needs a GPU")

    def prompt_ids(self, turn: int) -> list[int]:
        """Another prompt for each turn, so that none is answered from what was kept of the last."""
        return random.Random(turn).choices(range(10, 250), k=self.prompt)


class Session(Protocol):
    """A model that answers one row, greedily."""

    def prompt(self, ids: list[int]) -> int:
        """Forget the last row, take these ids, and give the first token."""

    def step(self, token: int) -> int:
        """The token that follows this one."""


def timed(session: Session, asked: Asked) -> dict[str, Any]:
    """Turns of a prompt and tokens after it. Figures are those of the last turn; of its tokens the
    first is left out, which follows a pass of another kind."""
    begin, turns = time.perf_counter(), []

    def late() -> bool:
        return time.perf_counter() - begin > asked.seconds

    for turn in range(asked.turns):
        stamps, ids = [time.perf_counter()], []
        token = session.prompt(asked.prompt_ids(turn))
        while True:
            stamps.append(time.perf_counter())
            ids.append(token)
            if len(ids) > asked.tokens or (len(ids) > LEAST and late()):
                break
            token = session.step(token)
        seconds = [after - before for before, after in pairwise(stamps)]
        turns.append({"first_token": seconds[0], "steps": seconds[1:], "ids": ids})
        if late():
            break
    steps = turns[-1]["steps"][1:]
    return {
        "first_token": turns[-1]["first_token"],
        "seconds_per_pass": median(steps),
        "tokens_per_second": 1 / fmean(steps),
        "turns": turns,
    }
