"""What one salt's texts have said is drafted for no other."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import drafts_always, make_engine

from layer_streamer.llm.drafts.lookup import MOST_SALTS, Lookup
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.scheduling.events import Events

TEXTS = st.integers(1, 5).flatmap(lambda high: st.lists(st.integers(0, high), max_size=40))


def end_text(lookup: Lookup, salts: dict[int, bytes], key: int, ids: Sequence[int]) -> None:
    """A row of the salt that is known for its key, to its end."""
    lookup.propose(key, ids, 1)
    salts.pop(key, None)  # whoever drafts forgets first
    lookup.forget(key)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([b"", b"a", b"b"]), TEXTS), max_size=8), TEXTS)
def test_each_salt_is_drafted_for_as_if_there_were_no_other(
    texts: list[tuple[bytes, list[int]]], ids: list[int]
) -> None:
    salts: dict[int, bytes] = {}
    shared = Lookup(salts=salts)
    alone = {salt: Lookup() for salt in (b"", b"a", b"b")}
    for key, (salt, text) in enumerate(texts):
        salts[key] = salt
        end_text(shared, salts, key, text)
        end_text(alone[salt], {}, key, text)
    for key, salt in enumerate(alone, 100):
        salts[key] = salt
        assert shared.propose(key, ids, 12) == alone[salt].propose(key, ids, 12)


def test_all_salts_together_have_the_room_that_one_has() -> None:
    salts: dict[int, bytes] = {}
    lookup = Lookup(pool_tokens=10, salts=salts)
    for key, salt in enumerate([b"a", b"b", b"a"]):
        salts[key] = salt
        end_text(lookup, salts, key, [key, 1, 2, 3])
    salts |= {7: b"a", 8: b"b"}
    assert lookup.propose(7, [0, 1, 2], 1) == [3], "its second text is there"
    assert lookup.propose(7, [0, 1], 1) == [], "the first has left"
    assert lookup.propose(8, [1, 1], 1) == [2], "the other's is there"


def test_however_many_salts_there_are_memory_is_bounded() -> None:
    salts: dict[int, bytes] = {}
    lookup, draw = Lookup(pool_tokens=4096, salts=salts), random.Random(0)

    def fill(count: int) -> None:
        for key in range(count):
            salts[key] = str(key).encode()
            end_text(lookup, salts, key, [draw.randrange(2**31) for _ in range(3)])

    tracemalloc.start()
    try:
        fill(3 * MOST_SALTS // 2)
        assert tracemalloc.get_traced_memory()[0] < 1024 * MOST_SALTS
    finally:
        tracemalloc.stop()
    assert len(lookup._pools) <= MOST_SALTS


def test_a_text_of_another_salt_is_drafted_for_as_by_a_new_engine(tmp_path: Path) -> None:
    path = byte_model(tmp_path)

    def drafted(engine: StreamingEngine, salt: bytes) -> int:
        (request,) = engine.requests([list(b"abcdefgh")], max_new_tokens=30, temperature=0.0)
        request.salt, events = salt, Events()
        engine.scheduler.submit(request, events)
        while request.finish_reason is None:
            engine.scheduler.step()
        return sum(some.agreed for some in request.drafts.values())

    with make_engine(path, lookup=True, max_length=128) as engine:
        drafts_always(engine)
        found = [drafted(engine, salt) for salt in (b"a", b"b", b"a", b"b")]
    assert found[0] == found[1] < found[2] == found[3]
