"""Answers a file of requests, as many lines at a time as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import StreamingEngine
from ..request import Request
from ..scheduling.client import Client
from ..serving.api_error import ApiError
from ..serving.asking.refusals import refusal_of
from ..serving.asking.tooling import fitted
from ..serving.replying.answering import error_of
from ..serving.streamed import StreamedEngine
from .asked import Asked, Manner, asked_of, id_of, read
from .lines import lines_of
from .reply import Reply, refusal, reply_to
from .results import Results, digest


@dataclass(slots=True)
class Counts:
    """What a job has done by now."""

    answered: int = 0
    """Lines, of which some may be refused."""
    refused: int = 0
    tokens: int = 0
    """Of texts, those that have not ended as well."""
    rows: int = 0
    """Texts that are being made at present."""


@dataclass(slots=True, eq=False)
class _Text:
    """One that is being made."""

    reply: Reply
    index: int
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0


class BatchJob:
    """Each line is answered once, with options of its own, in the order in which texts end. Lines
    are read as rows come free; what is held of those before is an id's digest.

    Thread rules: that of the engine's passes.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        source: Path,
        results: Results,
        manner: Manner,
        hear: Callable[[Counts], object] = lambda counts: None,
    ) -> None:
        """``hear`` is called whenever there is something to tell. ValueError for options that make
        no sense whatever a line says."""
        engine.requests((), **manner.options)
        self._scheduler, self._served = engine.scheduler, StreamedEngine(engine, manner.model)
        self._source, self._results, self._manner = source, results, manner
        self._hear, self.counts = hear, Counts()
        self._texts: dict[Request, _Text] = {}
        self._ids: set[bytes] = set()

    def run(self) -> None:
        """Answer every line that has no answer yet.

        Raises what ends all texts, such as an error of the disk: what is answered by then stays,
        and another job goes on from there. ValueError if the results are those of another file.
        """
        with closing(Client(self._scheduler, self._requests()).events()) as events:
            for request, piece in events:
                self._take(request, piece)

    def _take(self, request: Request, piece: str) -> None:
        text = self._texts[request]
        self.counts.rows += not text.pieces
        text.pieces.append(piece)
        self.counts.tokens += len(request.new_ids) - text.tokens
        text.tokens = len(request.new_ids)
        if request.finish_reason is not None:
            del self._texts[request]
            self.counts.rows -= 1
            text.reply.put(text.index, self._served.piece(request, "".join(text.pieces)))
            if not text.reply.open:
                self._write(text.reply.record())
        self._hear(self.counts)

    def _requests(self) -> Iterator[Request]:
        """Of lines that can be answered; all others are, meanwhile."""
        for number, content in lines_of(self._source):
            try:
                found: Any = read(content)
            except ApiError as error:
                found = error
            custom_id = id_of(found)
            repeated = self._is_repeated(custom_id)
            if not self._manner.shard.has(number):
                continue
            if number in self._results:
                self._results.check(number, custom_id)
                continue
            asked = None
            try:
                if isinstance(found, ApiError):
                    raise found
                if repeated:
                    raise ApiError(400, "custom_id: an earlier line has it", param="custom_id")
                asked = self._asked(number, found)
                requests = self._prepare(number, custom_id, asked)
            except Exception as error:  # of this line: the others go on
                order = None if asked is None else asked.order
                told = refusal_of(error, order) or error_of(error)
                self._write(refusal(number, custom_id, told))
                self._hear(self.counts)
                continue
            yield from requests

    def _is_repeated(self, custom_id: str | None) -> bool:
        """True: a line before had this id. Asked of every line, whoever's it is, so that all agree
        on which is the first."""
        if custom_id is None:
            return False
        key, before = digest(custom_id), len(self._ids)
        self._ids.add(key)
        return len(self._ids) == before

    def _asked(self, number: int, found: Any) -> Asked:
        asked = asked_of(found, number, self._manner)
        if asked.is_chat:
            asked.order = fitted(asked.order, self._served.facts.template)
        return asked

    def _prepare(self, number: int, custom_id: str | None, asked: Asked) -> list[Request]:
        facts, ready = self._served.facts, self._served.prepare(asked.order)
        envelope, writer = reply_to(asked, ready, facts.name, facts.template)
        opened = set(range(len(ready)))
        reply = Reply(number, custom_id, envelope, writer, asked.order.n, opened)
        requests: list[Request] = [one.request for one in ready]
        self._texts |= {request: _Text(reply, index) for index, request in enumerate(requests)}
        return requests

    def _write(self, record: dict[str, Any]) -> None:
        self._results.write(record)
        self.counts.answered += 1
        self.counts.refused += record["response"]["status_code"] != 200
