"""The engine's thread, and orders on their way through it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_served import ScriptedServed, working

from layer_streamer.llm.serving.api_error import ApiError
from layer_streamer.llm.serving.asking.order import Order
from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.metrics import Metrics
from layer_streamer.llm.serving.working.engine_thread import Report
from layer_streamer.llm.serving.working.mailbox import Mailbox
from layer_streamer.llm.serving.working.pieces import Account, Piece
from layer_streamer.llm.serving.working.wait_estimate import WaitEstimate
from layer_streamer.llm.serving.working.worker import Answer, Worker

Check = Callable[[Worker], Awaitable[None]]


def run(engine: Any, check: Check, limits: Limits | None = None) -> None:
    """A check with a worker whose engine is open, within a time that no machine needs."""

    async def main() -> None:
        async with asyncio.timeout(60), working(engine, limits or Limits()) as worker:
            await check(worker)

    asyncio.run(main())


async def text_of(answer: Answer) -> str:
    """All that comes, of one text."""
    found = ""
    while not answer.mailbox.ended:
        for _, piece in await answer.mailbox.take():
            if piece.error is not None:
                raise piece.error
            found += piece.text
    return found


async def until(condition: Callable[[], Any]) -> None:
    """Wait, within the time of the whole."""
    while not condition():
        await asyncio.sleep(0.001)


def test_texts_of_many_clients_come_whole_and_each_to_its_own() -> None:
    async def check(worker: Worker) -> None:
        async def one(number: int) -> None:
            text = " ".join(str(number * k) for k in range(1, 2 + number % 5))
            answer = await worker.answer(Order([text]))
            assert await text_of(answer) == text + " "
            worker.leave(answer)

        await asyncio.gather(*map(one, range(50)))
        await until(lambda: worker.load.rows + worker.load.waiting == 0)

    engine = ScriptedServed(rows=4)
    run(engine, check)
    assert engine.closed.is_set() and not engine.cancelled
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


def test_a_client_that_leaves_frees_its_row_before_the_next_pass() -> None:
    engine = ScriptedServed(rows=1, gate=True)

    async def check(worker: Worker) -> None:
        gone, other = await worker.answer(Order(["a b c"])), await worker.answer(Order(["d"]))
        await until(lambda: engine.running and engine.waiting)
        worker.leave(gone)
        worker.leave(gone)
        await until(lambda: list(engine.running) == [(other, 0)])
        assert engine.passes is not None
        engine.passes.release(5)
        assert await text_of(other) == "d "
        assert engine.cancelled == [(gone, 0)]

    run(engine, check)


def test_what_a_reader_does_not_fetch_waits_as_one_piece_and_stalls_nobody() -> None:
    engine = ScriptedServed(rows=2)

    async def check(worker: Worker) -> None:
        slow = await worker.answer(Order(["w " * 200]))
        for number in range(20):
            assert await text_of(await worker.answer(Order([str(number)]))) == f"{number} "
        await until(lambda: not slow.mailbox.open)
        ((_, piece),) = await slow.mailbox.take()
        assert piece.text.count("w ") == 200 and piece.tokens == len(piece.scored) == 201

    run(engine, check)


def test_a_queue_that_is_full_says_when_to_come_back() -> None:
    engine = ScriptedServed(rows=1, gate=True)

    async def check(worker: Worker) -> None:
        held = [await worker.answer(Order(["a b"])) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            await worker.answer(Order(["late"]))
        assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
        assert len(engine.orders) == 3, "it was tokenised first"
        await until(lambda: worker.load.waiting + worker.load.rows == 3)
        worker.leave(held[1])
        await until(lambda: worker.load.waiting + worker.load.rows == 2)
        await worker.answer(Order(["now"]))
        with pytest.raises(ApiError):
            await worker.answer(Order(["late"]))

    run(engine, check, Limits(max_waiting=2))


def test_the_queue_counts_what_arrives_at_once() -> None:
    engine = ScriptedServed(rows=1, gate=True)

    async def check(worker: Worker) -> None:
        orders = [worker.answer(Order(["a"], n=2)) for _ in range(20)]
        found = await asyncio.gather(*orders, return_exceptions=True)
        accepted = [one for one in found if isinstance(one, Answer)]
        refused = [one for one in found if isinstance(one, ApiError) and one.status == 429]
        assert (len(accepted), len(refused)) == (2, 18)

    run(engine, check, Limits(max_waiting=4))


def test_more_texts_than_ever_fit_are_refused_for_good() -> None:
    async def check(worker: Worker) -> None:
        with pytest.raises(ApiError) as caught:
            await worker.answer(Order(["a"], n=7))
        assert caught.value.status == 400 and caught.value.param == "n"
        await worker.answer(Order(["a"], n=6))

    run(ScriptedServed(rows=2), check, Limits(max_waiting=4))


def test_an_order_that_is_refused_leaves_no_trace_in_the_queue() -> None:
    engine = ScriptedServed(rows=1, gate=True, length=20)

    async def check(worker: Worker) -> None:
        for text, code in [("REFUSE", "invalid_value"), ("x" * 30, "context_length_exceeded")] * 5:
            with pytest.raises(ApiError) as caught:
                await worker.answer(Order([text]))
            assert (caught.value.status, caught.value.code) == (400, code)
        await worker.answer(Order(["a"]))
        await worker.answer(Order(["b"]))

    run(engine, check, Limits(max_waiting=1))


def test_an_error_of_one_text_is_its_own() -> None:
    async def check(worker: Worker) -> None:
        bad, good = await worker.answer(Order(["a RAISE b"])), await worker.answer(Order(["c d e"]))
        with pytest.raises(ValueError, match="cannot go on"):
            await text_of(bad)
        assert await text_of(good) == "c d e "
        assert worker.status == "ready"

    run(ScriptedServed(), check)


def test_an_engine_that_breaks_ends_every_text_and_the_worker() -> None:
    async def check(worker: Worker) -> None:
        texts = [await worker.answer(Order([text])) for text in ("a b c d", "a BREAK")]
        await until(lambda: len(engine.running) == 2)
        assert engine.passes is not None
        engine.passes.release(9)
        for answer in texts:
            with pytest.raises(ApiError) as caught:
                await text_of(answer)
            assert caught.value.status == 500
        await worker.ended.wait()
        assert isinstance(worker.error, RuntimeError)
        with pytest.raises(ApiError) as refused:
            await worker.answer(Order(["more"]))
        assert refused.value.status == 503

    engine = ScriptedServed(gate=True)
    run(engine, check)
    assert engine.closed.is_set()


def test_who_is_called_off_as_a_piece_comes_does_not_wait_for_the_next() -> None:
    async def main() -> None:
        for yields in range(6):
            mailbox = Mailbox(1)
            taking = asyncio.ensure_future(mailbox.take(60))
            await asyncio.sleep(0)
            mailbox.put(0, Piece("a"))
            for _ in range(yields):
                await asyncio.sleep(0)
            if taking.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await taking

    asyncio.run(main())


def test_while_the_model_opens_there_is_no_engine() -> None:
    opens = threading.Event()
    engine = ScriptedServed()

    def open_engine() -> ScriptedServed:
        assert opens.wait(60)
        return engine

    async def main() -> None:
        worker = Worker(open_engine, Limits(), Metrics())
        worker.start()
        with pytest.raises(ApiError) as caught:
            await worker.answer(Order(["a"]))
        assert caught.value.status == 503 and caught.value.code == "loading"
        opens.set()
        await until(lambda: worker.status == "ready")
        assert await text_of(await worker.answer(Order(["a"]))) == "a "
        worker.close()

    asyncio.run(main())


def test_an_engine_that_cannot_be_opened_is_the_end_and_says_why() -> None:
    def open_engine() -> Any:
        raise ValueError("no such model")

    async def check(worker: Worker) -> None:
        await worker.ended.wait()
        assert worker.status == "ended" and str(worker.error) == "no such model"

    run(open_engine, check)


def test_draining_takes_no_more_and_lets_texts_end() -> None:
    engine = ScriptedServed(gate=True)

    async def check(worker: Worker) -> None:
        answer = await worker.answer(Order(["a b"]))
        draining = asyncio.ensure_future(worker.drain(60))
        await until(lambda: worker.status == "draining")
        with pytest.raises(ApiError) as caught:
            await worker.answer(Order(["more"]))
        assert caught.value.status == 503
        assert engine.passes is not None
        engine.passes.release(9)
        assert await text_of(answer) == "a b "
        worker.leave(answer)
        await draining
        assert not engine.cancelled

    run(engine, check)


def test_draining_ends_what_takes_too_long() -> None:
    engine = ScriptedServed(gate=True)

    async def check(worker: Worker) -> None:
        answer = await worker.answer(Order(["a b"]))
        await worker.drain(0.01)
        with pytest.raises(ApiError) as caught:
            await text_of(answer)
        assert caught.value.status == 503
        await until(lambda: engine.cancelled == [(answer, 0)])

    run(engine, check)


def test_a_worker_whose_loop_is_gone_still_closes_its_engine() -> None:
    engine = ScriptedServed(gate=True)

    async def main() -> Worker:
        worker = Worker(lambda: engine, Limits(), Metrics())
        worker.start()
        await until(lambda: worker.status == "ready")
        await worker.answer(Order(["a b"]))
        return worker

    worker = asyncio.run(main())
    worker.close()
    worker.close()
    assert engine.closed.is_set()


@pytest.mark.parametrize(
    ("seconds", "passes", "rows", "expected"),
    [(2.0, 30, 3, 20), (0.001, 10, 1, 1), (100.0, 1000, 1, 600), (3.0, 1, 0, 3)],
)
def test_when_to_come_back_goes_by_measured_passes(
    seconds: float, passes: int, rows: int, expected: int
) -> None:
    pace = WaitEstimate()
    assert pace.retry_after(rows) == 1
    pace.hear_pass(seconds)
    pace.hear_text(passes)
    assert pace.retry_after(rows) == expected


def ends(worker: Worker) -> dict[str, float]:
    """Texts by what ended them, as they are counted."""
    lines = worker._hear.text().decode().splitlines()  # type: ignore[attr-defined]
    found = [
        line.rpartition(" ") for line in lines if line.startswith("layer_streamer_texts_total")
    ]
    return {name.split('"')[1]: float(value) for name, _, value in found if float(value)}


def test_a_text_that_ends_when_it_has_been_left_is_counted_once() -> None:
    async def check(worker: Worker) -> None:
        answer = await worker.answer(Order(["a b"]))
        worker.leave(answer)
        last = Piece("a", 1, [], "stop", Account(1, 1))
        worker._hear_report(Report(events=[((answer, 0), last)]))
        assert ends(worker) == {"cancelled": 1}

    run(ScriptedServed(gate=True), check)


def test_texts_that_the_end_of_the_server_cuts_off_are_counted() -> None:
    async def check(worker: Worker) -> None:
        answer = await worker.answer(Order(["a b"], n=2))
        await worker.drain(0)
        worker.leave(answer)
        assert ends(worker) == {"error": 2}

    run(ScriptedServed(gate=True), check)
