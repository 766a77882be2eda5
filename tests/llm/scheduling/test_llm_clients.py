"""Several calls under way on one engine: each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights
from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import PROMPTS, drafts_always, make_engine, message

from layer_streamer import StreamerError
from layer_streamer.llm.drafts.drafting import MOST_DRAFTED
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import NotFiniteError, RowsError

LENGTHS = (5, 520, 40, 600, 300, 1)
LONG = [[(7 * i + i * i * k) % 250 for k in range(n)] for i, n in enumerate(LENGTHS, 1)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20, "seed": 3}
LIMITS: dict[str, Any] = {"max_length": 1024, "kv_tokens": 4096, "max_batch": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path, **LIMITS) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path, reproducible=True, lookup=True, **LIMITS) as engine:
        yield drafts_always(engine)


def alone(engine: StreamingEngine, prompts: Any = PROMPTS) -> list[str]:
    return [engine.generate(ids, **OPTIONS) for ids in prompts]


@pytest.fixture(scope="module")
def long_alone(exact: StreamingEngine) -> list[str]:
    return alone(exact, LONG)


def rows_of(engine: StreamingEngine) -> int:
    return len(list(engine._runner.kv.rows))


def parts_of(engine: StreamingEngine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens the rows of each pass get, from now on."""
    forward, parts = engine._runner.forward, list[list[int]]()

    def spy(entries: Any, **options: Any) -> torch.Tensor:
        parts.append([len(ids) for _, ids in entries])
        return forward(entries, **options)

    monkeypatch.setattr(engine._runner, "forward", spy)
    return parts


def test_a_prompt_that_is_taken_in_parts_gives_the_same_bits(
    exact: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_parts(exact, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_does_wherever_its_keys_are(
    path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, dtype: torch.dtype
) -> None:
    with make_engine(path, reproducible=True, kv=kv, dtype=dtype, **LIMITS) as engine:
        check_parts(engine, monkeypatch)


def check_parts(exact: StreamingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a row that decodes, long prompts are taken in parts, and give what they give alone."""
    expected = [exact.generate(ids, **OPTIONS, return_details=True) for ids in LONG]
    talk = exact.generate([9, 9], stream=True, **OPTIONS | {"max_new_tokens": 400})
    next(talk)
    parts = parts_of(exact, monkeypatch)
    for ids, single in zip(LONG, expected, strict=True):
        parts.clear()
        exact.scheduler.places.forget()  # or all but its end would be there
        found = exact.generate(ids, **OPTIONS, return_details=True)
        assert (found.ids, found.text) == (single.ids, single.text)
        taken = [n for rows in parts for n in rows if n > 1 + MOST_DRAFTED]
        assert len(ids) <= 256 or max(taken) < len(ids), "it was taken as a whole"
        assert len(list(exact.scheduler.running)) == 1, "beside one that decodes"
    talk.close()
    assert rows_of(exact) == 0


@settings(deadline=None, max_examples=6)
@given(st.data())
def test_whoever_joins_and_leaves_every_text_is_the_one_alone(
    exact: StreamingEngine, long_alone: list[str], data: st.DataObject
) -> None:
    clients: list[tuple[int, Iterator[str], list[str]]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["new", "ask", "ask", "ask", "leave"]))
        if what == "new":
            i = data.draw(st.integers(0, len(LONG) - 1))
            clients.append((i, exact.generate(LONG[i], stream=True, **OPTIONS), []))
        elif clients:
            at = data.draw(st.integers(0, len(clients) - 1))
            if what == "leave":
                clients.pop(at)[1].close()  # type: ignore[attr-defined]
            else:
                clients[at][2].append(next(clients[at][1], ""))
    for i, stream, pieces in clients:
        assert "".join([*pieces, *stream]) == long_alone[i]
    assert rows_of(exact) == 0 and not exact.scheduler.waiting


def test_two_streams_that_are_asked_in_turn_go_through_the_same_passes(
    shared: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(shared, PROMPTS[:2])
    one, other = (shared.generate(ids, stream=True, **OPTIONS) for ids in PROMPTS[:2])
    parts, found = parts_of(shared, monkeypatch), ["", ""]
    for _ in range(OPTIONS["max_new_tokens"]):
        found[0] += next(one, "")
        found[1] += next(other, "")
    found[0] += "".join(one)
    found[1] += "".join(other)
    assert found == expected and len(parts) < 2 * OPTIONS["max_new_tokens"]


def test_a_stream_that_is_closed_leaves_the_other_alone(shared: StreamingEngine) -> None:
    expected = alone(shared)[2]
    left = shared.generate(PROMPTS, stream=True, **OPTIONS)
    other = shared.generate(PROMPTS[2], stream=True, **OPTIONS)
    next(left)
    piece = next(other)
    left.close()
    assert rows_of(shared) == 1
    assert piece + "".join(other) == expected
    assert rows_of(shared) == 0


def test_prompts_are_taken_while_their_own_call_is_asked(shared: StreamingEngine) -> None:
    taken = []

    def prompts() -> Iterator[list[int]]:
        for i in range(60):
            taken.append(i)
            yield [i]

    many = shared.events(prompts(), **OPTIONS)
    next(many)
    assert len(taken) == 5, "four rows, and one that waits"
    other = shared.generate([1, 2, 3], **OPTIONS | {"max_new_tokens": 40})
    assert len(taken) == 5 and other == shared.generate(
        [1, 2, 3], **OPTIONS | {"max_new_tokens": 40}
    )
    assert {request.index for request, _ in many} == set(range(60))


def test_what_waits_for_one_client_is_one_event_of_each_request(shared: StreamingEngine) -> None:
    expected = alone(shared, PROMPTS[:1])[0]
    stream = shared.events(PROMPTS[:1], **OPTIONS)
    request, first = next(stream)
    shared.generate([1, 2, 3], **OPTIONS | {"max_new_tokens": 40})
    ((again, rest),) = list(stream)
    assert again is request and request.finish_reason == "length" and first + rest == expected


def test_prompts_may_come_from_another_call(shared: StreamingEngine) -> None:
    details = OPTIONS | {"return_details": True}
    first = [done.ids for done in shared.generate(PROMPTS, **details)]
    expected = [done.ids for done in shared.generate(first, **details)]
    source = (done.ids for done in shared.completions(PROMPTS, **OPTIONS))
    assert [done.ids for done in shared.completions(source, **OPTIONS)] == expected


def test_a_full_queue_holds_prompts_back(shared: StreamingEngine) -> None:
    expected = alone(shared)
    before, shared.scheduler.max_waiting = shared.scheduler.max_waiting, 1
    try:
        streams = [shared.generate(PROMPTS * 2, stream=True, **OPTIONS | {"seed": 3}) for _ in "ab"]
        found = [dict.fromkeys(range(8), "") for _ in streams]
        for pieces, stream in zip(found, streams, strict=True):
            row, piece = next(stream)
            pieces[row] += piece
        for pieces, stream in zip(found, streams, strict=True):
            for row, piece in stream:
                pieces[row] += piece
    finally:
        shared.scheduler.max_waiting = before
    assert found[0] == found[1] and found[0][0] == expected[0]


def test_a_row_that_fails_is_its_own_calls_alone(
    shared: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(shared, PROMPTS[:1])[0]
    good = shared.generate(PROMPTS[0], stream=True, **OPTIONS)
    piece = next(good)
    forward = shared._runner.forward

    def wrong(entries: Any, **options: Any) -> torch.Tensor:
        if any(row.length == 0 for row, _ in entries):
            raise RuntimeError("no memory")
        return forward(entries, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shared._runner, "forward", wrong)
        with pytest.raises(RowsError, match="no memory"):
            shared.generate(PROMPTS[1:], **OPTIONS)
    assert piece + "".join(good) == expected


def test_what_the_streamer_raises_ends_every_call_and_the_next_one_is_right(
    shared: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(shared, PROMPTS[:1])[0]
    options = OPTIONS | {"max_new_tokens": 40}
    streams = [shared.generate(p, stream=True, **options) for p in (PROMPTS[:2], PROMPTS)]
    for stream in streams:
        next(stream)
    assert len(shared.scheduler.running) == 4 and len(shared.scheduler.waiting) == 1

    def broken(*_: Any, **__: Any) -> Any:
        raise StreamerError("the file changed")

    with monkeypatch.context() as patch:
        patch.setattr(shared._runner, "forward", broken)
        with pytest.raises(StreamerError, match="the file changed"):
            list(streams[0])
    assert rows_of(shared) == 0 and not shared.scheduler.waiting
    for stream in streams[1:]:
        with pytest.raises(StreamerError, match="the file changed"):
            list(stream)
    assert shared.generate(PROMPTS[0], **OPTIONS) == expected


class OwnError(Exception):
    """A caller's."""


def raising(error: type[BaseException]) -> Callable[[int], None]:
    def on_layer(layer_idx: int) -> None:
        if layer_idx == 1:
            raise error

    return on_layer


@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt, StreamerError])
@pytest.mark.parametrize("draws", [True, False])
def test_what_a_call_raises_into_a_pass_costs_another_nothing(
    exact: StreamingEngine, error: type[BaseException], draws: bool
) -> None:
    options = OPTIONS | ({} if draws else {"temperature": 0}) | {"max_new_tokens": 80}
    expected = exact.generate(PROMPTS[2], **options)
    good = exact.generate(PROMPTS[2], stream=True, **options)
    pieces = [next(good)]
    for _ in range(3):
        with pytest.raises(error):
            list(exact.events([PROMPTS[0]], on_layer=raising(error), **options))
        assert rows_of(exact) == 1
        pieces.append(next(good))
    assert "".join([*pieces, *good]) == expected
    assert rows_of(exact) == 0


def test_what_a_call_raises_into_a_pass_that_another_asked_for_is_its_own(
    shared: StreamingEngine,
) -> None:
    expected = alone(shared, PROMPTS[:1])[0]
    full = shared.generate(PROMPTS, stream=True, **OPTIONS)
    next(full)
    waits = shared.events([PROMPTS[1]], on_layer=raising(OwnError), **OPTIONS)
    heard: list[int] = []
    hears = shared.events([PROMPTS[1]], on_layer=heard.append, **OPTIONS)
    full_text = [piece for row, piece in full if row == 0]
    assert rows_of(shared) == 0 and full_text
    with pytest.raises(OwnError):
        list(waits)
    list(hears)
    assert heard == [0, 1, 2] and shared.generate(PROMPTS[0], **OPTIONS) == expected


def test_the_layers_that_a_call_hears_of_are_those_of_its_own_first_pass(
    shared: StreamingEngine,
) -> None:
    heard = {"a": list[int](), "b": list[int]()}
    a = shared.events(PROMPTS[:3], on_layer=heard["a"].append, **OPTIONS)
    next(a)
    assert heard == {"a": [0, 1, 2], "b": []}
    list(shared.events(PROMPTS, on_layer=heard["b"].append, **OPTIONS))
    list(a)
    assert heard == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_a_kept_row_beside_other_calls_gives_the_same_text(shared: StreamingEngine) -> None:
    first, second = [5, 6, 7, 8] * 5, [5, 6, 7, 8] * 4 + [30, 31]
    expected = alone(shared, (first, second))
    other = shared.generate(PROMPTS[2], stream=True, **OPTIONS | {"max_new_tokens": 200})
    next(other)
    keep = OPTIONS | {"reuse_prefix": True}
    assert shared.generate(first, **keep) == expected[0]
    kept = shared.scheduler.places.kept.row
    assert kept is not None and kept.length >= len(first)
    both = [shared.generate(ids, stream=True, **keep) for ids in (second, first)]
    pieces = [next(stream) for stream in both]
    assert ["".join([piece, *stream]) for piece, stream in zip(pieces, both, strict=True)] == [
        expected[1], expected[0],
    ]  # fmt: skip
    assert shared.scheduler.places.kept.row is not None and rows_of(shared) == 2
    kept = shared.scheduler.places.kept.row
    with pytest.raises(OwnError):
        list(shared.events([second], on_layer=raising(OwnError), **keep))
    assert (
        kept is shared.scheduler.places.kept.row and shared.generate(first, **keep) == expected[0]
    )
    assert shared.generate(first) and shared.scheduler.places.kept.row is None
    other.close()
    assert rows_of(shared) == 0


def test_a_part_that_is_no_numbers_is_told_of_as_if_the_prompt_was_taken_whole(
    path: Path, tmp_path: Path
) -> None:
    spoiled = byte_model(tmp_path, max_position_embeddings=1024)
    edit_weights(
        spoiled, lambda tensors: tensors["model.embed_tokens.weight"][200].fill_(torch.nan)
    )
    prompt = [200, *range(150)] * 4
    with make_engine(spoiled, **LIMITS) as engine:
        with pytest.raises(NotFiniteError) as whole:
            engine.generate(prompt, **OPTIONS)
        assert "the embedding" in message(whole.value)
        talk = engine.generate([1, 2], stream=True, max_new_tokens=40, temperature=1.0, seed=0)
        text = [next(talk), next(talk), next(talk)]
        with pytest.raises(NotFiniteError, match="over the prompt") as parts:
            engine.generate(prompt, **OPTIONS)
        assert "the embedding" in message(parts.value)
        assert "pass 1 of" not in message(parts.value)
        assert all([*text, *talk])
