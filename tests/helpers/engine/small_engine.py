"""What tests of rows that fail, of rows beside them, and of drafts that a test writes share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layer_streamer import StreamerError
from layer_streamer.llm.drafts.drafting import Drafting
from layer_streamer.llm.drafts.tree import Draft
from layer_streamer.llm.engine import StreamingEngine

PROMPTS = [[7, 8, 9], [20, 21], [30] * 12, [40, 41, 42, 43]]
NEW = 24
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 3}
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": SAMPLED,
    "punished": {"temperature": 0.0, "repetition_penalty": 1.3},
    "sampled and punished": SAMPLED | {"repetition_penalty": 1.3, "top_p": 0.9},
}


def make_engine(path: Path, **options: Any) -> StreamingEngine:
    """A small one, on the CPU."""
    return StreamingEngine(
        path, **({"device": "cpu", "max_length": 64, "kv_tokens": 512} | options)
    )


def drafts_always(engine: StreamingEngine) -> StreamingEngine:
    """The engine, which now drafts as far as there is room, whatever that takes: what is measured
    on a busy machine decides nothing."""
    assert engine.scheduler.drafting is not None
    engine.scheduler.drafting._pace = None
    return engine


def message(error: BaseException | None) -> str:
    """An error's one line."""
    assert isinstance(error, ValueError | StreamerError | OSError) and "\n" not in str(error)
    return str(error)


class Script:
    """Drafts by the texts that are known to come, as wrong as asked for."""

    weighs = False

    def __init__(self, texts: Sequence[Sequence[int]], how: Any) -> None:
        self.texts, self.how = [tuple(text) for text in texts], how
        self.rows: set[int] = set()
        self.judged: list[tuple[int, int]] = []

    def propose(self, uid: int, ids: Sequence[int], most: int) -> Draft:
        self.rows.add(uid)
        known = list(ids)
        (text,) = [text for text in self.texts if list(text[: len(known)]) == known]
        found: Draft = self.how(list(text[len(known) :]), most)
        return found

    def accepted(self, uid: int, proposed: int, agreed: int) -> None:
        assert uid in self.rows and 0 <= agreed <= proposed
        self.judged.append((proposed, agreed))

    def forget(self, uid: int) -> None:
        self.rows.discard(uid)


def texts_of(engine: StreamingEngine, **options: Any) -> list[Any]:
    """What comes without drafts, all prompts in one batch."""
    engine.scheduler.drafting = None
    found: list[Any] = engine.generate(
        PROMPTS, return_details=True, **({"max_new_tokens": NEW} | options)
    )
    return found


def drafted(engine: StreamingEngine, plain: Sequence[Any], how: Any, **options: Any) -> Script:
    """The same with drafts; fails unless every row gets the same."""
    texts = [[*prompt, *done.ids] for prompt, done in zip(PROMPTS, plain, strict=True)]
    script = Script(texts, how)
    engine.scheduler.drafting = Drafting({"script": script})
    try:
        found = engine.generate(PROMPTS, return_details=True, **({"max_new_tokens": NEW} | options))
    finally:
        engine.scheduler.drafting = None
    for one, other in zip(found, plain, strict=True):
        same = ("ids", "text", "finish_reason", "prompt_tokens", "error", "logprobs")
        assert [getattr(one, n) for n in same] == [getattr(other, n) for n in same]
        assert one.drafted >= one.agreed >= 0
        assert one.passes + one.agreed == len(one.ids)
    assert not script.rows, "rows that have ended were not left"
    return script
