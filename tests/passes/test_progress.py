"""The progress bar: what goes wrong on stderr ends no pass, and jams no other bar."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from interrupter import Interrupt
from routes import NUM_LAYERS
from support import in_thread, open_checkpoint

from layer_streamer import LayerStreamer
from layer_streamer.progress import ProgressBar
from layer_streamer.tuner.options import TuneOptions
from layer_streamer.tuner.progress import TuneProgress


class Stderr(io.StringIO):
    """Raises at its ``number``-th write or flush, and at every later one if it is dead by then."""

    def __init__(self, number: int, error: BaseException, *, dead: bool) -> None:
        super().__init__()
        self._number, self._error, self._dead = number, error, dead
        self.raised = False

    def write(self, text: str) -> int:
        self._call()
        return super().write(text)

    def flush(self) -> None:
        self._call()

    def _call(self) -> None:
        self._number -= 1
        if self._number == 0 or (self._number < 0 and self._dead):
            self.raised = True
            raise self._error


@pytest.fixture
def drawn_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every bar is drawn, however soon it comes after the one before."""
    init = ProgressBar.__init__

    def draw_always(bar: ProgressBar, **options: Any) -> None:
        init(bar, **{"mininterval": 0, "miniters": 1, **options})

    monkeypatch.setattr(ProgressBar, "__init__", draw_always)


@pytest.fixture
def streamer(tmp_path: Path, tensors: Any, drawn_always: None) -> Any:
    with open_checkpoint(None, tmp_path, track_progress=True) as opened:
        yield opened


def a_pass_counts_every_layer(streamer: LayerStreamer) -> None:
    seen: list[int] = []
    streamer.run_pass(None, lambda x, w, i: seen.append(i))
    assert seen == list(range(NUM_LAYERS))


def tune_a_little() -> None:
    bar = TuneProgress(TuneOptions(), time.monotonic)
    bar.begin(0, 2)
    bar.event("opening", 0.1)
    bar.note("a line")
    bar.end(1.0)
    bar.close()


ERRORS = [
    partial(BrokenPipeError, errno.EPIPE, "Broken pipe"),
    partial(OSError, errno.ENOSPC, "No space left on device"),
    partial(OSError, errno.EIO, "Input/output error"),
    partial(ValueError, "I/O operation on closed file."),
    partial(UnicodeEncodeError, "ascii", "x", 0, 1, "ordinal not in range(128)"),
]


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        pytest.param(make, dead, marks=[] if dead == number % 2 else pytest.mark.slow)
        for number, make in enumerate(ERRORS)
        for dead in (False, True)
    ],
    ids=lambda value: value.func.__name__ if isinstance(value, partial) else None,
)
def test_an_error_of_stderr_at_any_write_ends_no_pass_and_no_tune(
    streamer: LayerStreamer, monkeypatch: Any, make: Callable[[], Exception], dead: bool
) -> None:
    uses = (lambda: a_pass_counts_every_layer(streamer), tune_a_little)
    for number, use in product((1, 2, 3, 6, 9), uses):
        stderr = Stderr(number, make(), dead=dead)
        monkeypatch.setattr(sys, "stderr", stderr)
        use()
        assert stderr.raised
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert in_thread(use) is None
        assert not ProgressBar._instances


def closed_file() -> io.TextIOWrapper:
    file = open(os.devnull, "w")  # noqa: SIM115
    file.close()
    return file


@pytest.mark.parametrize("make", [lambda: None, closed_file], ids=["none", "closed"])
def test_a_process_without_stderr_runs_passes_and_tunes(
    streamer: LayerStreamer, monkeypatch: Any, make: Callable[[], Any]
) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    a_pass_counts_every_layer(streamer)
    tune_a_little()


def test_an_interrupt_while_a_bar_is_drawn_jams_no_bar_of_another_thread(
    streamer: LayerStreamer, monkeypatch: Any
) -> None:
    uses = (lambda: a_pass_counts_every_layer(streamer), tune_a_little)
    for number, use in product(range(1, 12), uses):
        stderr, interrupted = Stderr(number, Interrupt(), dead=False), False
        monkeypatch.setattr(sys, "stderr", stderr)
        try:
            use()
        except Interrupt:
            interrupted = True
        assert interrupted == stderr.raised
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert in_thread(use) is None
        use()
