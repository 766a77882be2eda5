"""The thread that owns the engine: what is to be done comes in by a queue, passes are reported."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from .pieces import Piece
from .served import Load, Served, Tag

logger = logging.getLogger(__name__)

TaggedPieces = list[tuple[Tag, Piece]]
Command = Callable[[Served], Iterable[tuple[Tag, Piece]]]
"""Something to be done between passes, and what texts are to hear of it."""


@dataclass(slots=True)
class Report:
    """What happened since the last one."""

    events: TaggedPieces = field(default_factory=list)
    load: Load = field(default_factory=Load)
    commands: int = 0
    """How many were done."""
    seconds: float | None = None
    """Of the pass; None: there was none."""
    opened: Served | None = None
    ended: bool = False
    """It is the last report."""
    error: BaseException | None = None
    """What ended it."""


class EngineThread:
    """Opens an engine, does its passes, closes it; all in one thread.

    It waits where there is nothing to do. What an engine raises in a pass ends it. Thread rules:
    any thread.
    """

    def __init__(
        self, open_engine: Callable[[], Served], report: Callable[[Report], object]
    ) -> None:
        """``report`` is called in the thread: after it was opened, after each pass or what was done
        without one, and at the end."""
        self._open, self._report = open_engine, report
        self._bell = threading.Condition()
        self._commands: deque[Command] = deque()
        self._stops = False
        # Not a daemon: memory of the device is returned before the process ends.
        self._thread = threading.Thread(target=self._run, name="layer-streamer-serve")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def do(self, command: Command) -> None:
        """Have something done before the next pass."""
        with self._bell:
            self._commands.append(command)
            self._bell.notify()

    def stop(self) -> None:
        """End after the pass that runs, and wait for it. Idempotent."""
        with self._bell:
            self._stops = True
            self._bell.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._open()
            try:
                self._tell(Report(opened=engine, load=engine.load))
                self._work(engine)
            finally:
                engine.close()
        except BaseException as raised:
            logger.debug("the engine has ended", exc_info=raised)
            error = raised
        self._tell(Report(ended=True, error=error))

    def _work(self, engine: Served) -> None:
        busy = False
        while True:
            commands = self._take(busy)
            if commands is None:
                return
            report = Report(commands=len(commands))
            for command in commands:
                report.events += command(engine)
            load, began = engine.load, time.perf_counter()
            report.events += engine.step()
            if load.rows or load.waiting:
                report.seconds = time.perf_counter() - began
            report.load = load = engine.load
            busy = bool(load.rows or load.waiting)
            self._tell(report)

    def _take(self, busy: bool) -> list[Command] | None:
        """What is to be done, waited for if nothing else is; None: end."""
        with self._bell:
            self._bell.wait_for(lambda: busy or self._commands or self._stops)
            if self._stops:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _tell(self, report: Report) -> None:
        with suppress(RuntimeError):  # the loop that would hear of it has been closed
            self._report(report)
