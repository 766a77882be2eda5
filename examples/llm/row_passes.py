"""A pass over several rows, of which each fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layer_streamer import StreamerError

from .drafts.tree import NOTHING
from .errors import NotFiniteError, one_line_errors, without_frames
from .kv.moves import Move
from .kv.rows import Row
from .passes.runner import Runner
from .passes.second_look import why_not_finite
from .request import Request
from .text.following import Followed, follow

OnLayer = Callable[[int], object]


class RowPasses:
    """Passes over a runner's rows.

    What a row raises is its own; what the streamer raises, or ``on_layer``, is raised. Thread
    rules: one thread.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def choose(
        self, requests: Sequence[Request], on_layer: OnLayer | None = None
    ) -> list[Followed]:
        """Append each request's tokens to its row, those of its draft as well; what follows in
        each: tokens, or an error in the place of the last.

        A pass that fails is done again over either half, down to the row that it fails for: torch
        does not say for whose tokens there was no memory.
        """
        before = {request: request.row.length for request in requests if request.row is not None}
        half = len(requests) // 2
        if half == 0 or self._fit(requests):
            heard = None if on_layer is None else Heard(on_layer)
            try:
                drafts = [request.draft for request in requests]
                logits = self._runner.forward(entries(requests), drafts=drafts, on_layer=heard)
            except Exception as error:
                if isinstance(error, StreamerError) or (heard and error is heard.error):
                    raise
                failed = without_frames(error)
            else:
                with one_line_errors("the pass cannot be ended"):  # of the device, of all rows
                    found = follow(logits, [request.sampler for request in requests], drafts)
                    self._runner.kv.move(moves(requests, found))
                return self._explained(requests, found, before)
            self._take_back(before)
            if half == 0 and requests[0].draft:
                requests[0].draft = NOTHING  # it may have been that for which there was no room
                return self.choose(requests, on_layer)
            if half == 0:
                return [[failed]]
        return self.choose(requests[:half]) + self.choose(requests[half:])

    def _fit(self, requests: Sequence[Request]) -> bool:
        """True if one pass has room for all of their tokens."""
        return sum(request.behind for request in requests) <= self._runner.most_tokens

    def _explained(
        self, requests: Sequence[Request], found: list[Followed], before: dict[Request, int]
    ) -> list[Followed]:
        """What follows, with an error where nothing does."""
        bad = {i: requests[i] for i, tokens in enumerate(found) if not tokens}
        self._take_back({request: before[request] for request in bad.values()})
        for request in bad.values():
            request.draft = NOTHING
        for (i, request), why in zip(bad.items(), self._why(list(bad.values())), strict=True):
            count = len(request.new_ids)
            what = f"after {count} new tokens" if count else "over the prompt"
            error = NotFiniteError(
                f"pass {request.passes + 1} of the row, {what}: the logits are not finite "
                f"numbers; {why}"
            )
            found[i] = [error]
        return found

    def _why(self, requests: Sequence[Request]) -> list[str]:
        """Where each row's numbers ceased to be finite, found by a second look."""
        half = len(requests) // 2
        if half and not self._fit(requests):
            return self._why(requests[:half]) + self._why(requests[half:])
        if not requests:
            return []
        try:
            found = why_not_finite(self._runner, entries(requests))
        except StreamerError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            return [f"a second look failed: {text}"] * len(requests)
        return [f"the first output that is not finite is {why}" for why in found]

    def _take_back(self, before: dict[Request, int]) -> None:
        """Rows to their lengths before a pass that brought them nothing."""
        for request, length in before.items():
            if request.row is not None:
                self._runner.kv.rows.truncate(request.row, length)


class Heard:
    """An ``on_layer``, and what it has raised."""

    def __init__(self, on_layer: OnLayer) -> None:
        self._on_layer = on_layer
        self.error: Exception | None = None

    def __call__(self, layer_idx: int) -> None:
        try:
            self._on_layer(layer_idx)
        except Exception as error:
            self.error = error
            raise


def entries(requests: Sequence[Request]) -> list[tuple[Row, Sequence[int]]]:
    """What a pass appends to their rows."""
    return [(request.row, request.pending) for request in requests if request.row is not None]


def moves(requests: Sequence[Request], found: Sequence[Followed]) -> list[Move]:
    """What a pass has computed of the tokens that follow, to where it is after a pass without a
    draft: behind the row's tokens, one after the other."""
    asked = []
    for request, tokens in zip(requests, found, strict=True):
        if request.row is not None and not request.draft.is_chain:
            first = request.row.length - len(request.draft)
            nodes = request.draft.path([token for token in tokens if isinstance(token, int)])
            there = sum(i == node for i, node in enumerate(nodes))  # those in place come first
            if nodes[there:]:
                origins = tuple(first + node for node in nodes[there:])
                asked.append(Move(request.row, first + there, origins))
    return asked
