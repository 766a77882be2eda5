"""A pass over several rows, of which each fails alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layer_streamer import StreamerError

from ..errors import NotFiniteError, one_line_errors, without_frames
from ..kv.moves import Move
from ..kv.rows import Row
from ..passes.runner import Runner
from ..passes.second_look import why_not_finite
from ..request import Request
from ..text.following import Followed, follow


class RowPasses:
    """Passes over a runner's rows.

    What a row raises is its own; what the streamer raises, or an ``on_layer``, is raised. Thread
    rules: one thread.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.chosen = False
        """True: samplers have begun to draw what follows, which cannot be done again; whoever asks
        sets it to False."""

    def choose(
        self, requests: Sequence[Request], heard: Heard | None = None
    ) -> list[Followed | None]:
        """Append each request's part to its row, its draft as well; what follows in each: tokens,
        or an error in the place of the last. None: only a part of its prompt is there by now.

        A pass that fails is done again over either half, down to the row that it fails for: torch
        does not say for whose tokens there was no memory.
        """
        before = {request: request.row.length for request in requests if request.row is not None}
        complete = [request.completes for request in requests]
        half = len(requests) // 2
        try:
            drafts = [request.draft for request in requests]
            logits = self._runner.forward(entries(requests), drafts=drafts, on_layer=heard)
        except Exception as error:
            if isinstance(error, StreamerError) or (heard and error is heard.error):
                raise
            failed = without_frames(error)
        else:
            self.chosen = True
            ending = [request for request, ends in zip(requests, complete, strict=True) if ends]
            found = iter(self._follow(ending, logits_of(logits, requests, complete), before))
            return [next(found) if ends else None for ends in complete]
        self._take_back(before)
        if half == 0 and requests[0].draft:
            requests[0].drop_draft()  # it may have been that for which there was no room
            return self.choose(requests, heard)
        if half == 0:
            return [[failed]]
        return self.choose(requests[:half]) + self.choose(requests[half:])

    def _follow(
        self, requests: Sequence[Request], logits_NV: torch.Tensor, before: dict[Request, int]
    ) -> list[Followed]:
        """What follows in rows whose last tokens have been taken. A part of a prompt is not looked
        at: the row ends for what comes of it, as it does where the prompt is taken as a whole."""
        if not requests:
            return []
        drafts = [request.draft for request in requests]
        with one_line_errors("the pass cannot be ended"):  # of the device, of all rows
            found = follow(logits_NV, [request.sampler for request in requests], drafts)
            self._runner.kv.move(moves(requests, found))
        return self._explained(requests, found, before)

    def _fit(self, requests: Sequence[Request]) -> bool:
        """True if one pass has room for all of their tokens."""
        return sum(request.part for request in requests) <= self._runner.most_tokens

    def _explained(
        self, requests: Sequence[Request], found: list[Followed], before: dict[Request, int]
    ) -> list[Followed]:
        """What follows, with an error where nothing does."""
        bad = {i: requests[i] for i, tokens in enumerate(found) if not tokens}
        for request in bad.values():
            # Of a prompt that was taken in parts, any may be the one where they ceased to be.
            self._take_back({request: before[request] if request.new_ids else 0})
            request.drop_draft()
            request.part = request.behind
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
        """Rows to their lengths before a pass that brought them nothing; one whose window that
        has overwritten is to be taken anew."""
        for request, length in before.items():
            if (
                request.row is not None
                and self._runner.kv.rows.truncate(request.row, length) < length
            ):
                request.drop_draft()


class Heard:
    """The ``on_layer`` of each request whose first pass this is, and what one of them raised."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = [r for r in requests if r.on_layer is not None and not r.passes]
        self.error: Exception | None = None
        self.request: Request | None = None
        """Whose it is."""

    @property
    def anyone(self) -> bool:
        """True: there is one."""
        return bool(self._requests)

    def __call__(self, layer_idx: int) -> None:
        for request in self._requests:
            assert request.on_layer is not None
            try:
                request.on_layer(layer_idx)
            except Exception as error:
                self.error, self.request = error, request
                raise


def entries(requests: Sequence[Request]) -> list[tuple[Row, Sequence[int]]]:
    """What a pass appends to their rows."""
    return [(request.row, request.pending) for request in requests if request.row is not None]


def logits_of(
    logits_NV: torch.Tensor, requests: Sequence[Request], complete: Sequence[bool]
) -> torch.Tensor:
    """Those of the rows that are complete."""
    if all(complete):
        return logits_NV
    places, at = list[int](), 0
    for request, ends in zip(requests, complete, strict=True):
        count = 1 + len(request.draft)
        if ends:
            places.extend(range(at, at + count))
        at += count
    return logits_NV[places]


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
