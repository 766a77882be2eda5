"""Threads of the pipeline: how they wait, how they are told to start over, how they stop.

The pipeline is driven by *step numbers*. One unbroken sequence of passes is a :class:`Run`; its
steps are numbered 0, 1, 2, ... across passes. A *lane* is one device with the threads and slots
that serve it; its stages do the steps of that device that they have work with, in order, and count
them from 0. What a stage may do next follows from the counters of its neighbours alone, so no slot
is ever carried through a queue where an interrupt could lose it.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .tasks import start_thread

if TYPE_CHECKING:
    from .schedule import Order, Orders, Schedule


class Bell:
    """Wakes one thread that waits for other threads' counters to move.

    Guarantees: a ring is never lost, and rings that nobody heard count as one. The waiter checks
    its condition, then waits, then checks again; whoever changes what it waits for rings after.
    Both calls are a single C call, so a KeyboardInterrupt leaves no lock taken. One waiter only.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the waiter, or let its next wait return at once. Never blocks."""
        if not self._lock.locked():
            return  # was rung already
        try:
            self._lock.release()
        except RuntimeError:
            return  # another thread's ring was first

    def wait(self) -> None:
        """Block until the next ring."""
        self._lock.acquire()


class Progress:
    """How far a stage has come in a run. Written by that stage only, read by all.

    ``done`` counts finished steps (whose input slots are free again), ``out`` those handed on:
    every ``batch`` steps, and at the end of each pass, as the stage's ``order`` has them.
    """

    __slots__ = ("_batch", "_order", "done", "out")

    def __init__(self, batch: int, order: Order) -> None:
        self.done = 0
        self.out = 0
        self._batch = batch
        self._order = order

    def advance(self) -> None:
        """One more step is done."""
        done = self.done + 1
        self.done = done
        if done - self.out >= self._batch or self._order.ends(done):
            self.out = done


@dataclass(slots=True, eq=False)
class LaneRun:
    """How far the stages of one lane have come in a run.

    Each Progress belongs to its stage. ``read`` and ``staged`` count the steps that come from disk
    (their parts, where they pass through a ring), ``copied`` those that go through the device's
    slots. ``enqueued`` is the copier's as well: the steps or parts from disk whose copies out of
    host memory have been enqueued.
    """

    run: Run
    orders: Orders
    """Which steps they have work with, in such a run."""
    read: Progress
    staged: Progress
    copied: Progress
    enqueued: int = 0


class Heading(NamedTuple):
    """Which way the passes of a run go over the layers."""

    back: bool = False
    """The first goes from the last layer to the first one."""
    turns: bool = False
    """Each goes the other way than the one before it, and uses again what lies in slots then."""
    on_host: bool = False
    """Layers that may be computed in host memory are, and are copied to no device."""

    def goes_back(self, passes: int) -> bool:
        """Whether the pass after so many of them goes from the last layer to the first one."""
        return self.back != (self.turns and passes % 2 == 1)


AHEAD = Heading()
"""From the first layer to the last one, again and again."""


@dataclass(slots=True, eq=False)
class Run:
    """One unbroken sequence of passes, from its start to the abort that ends it.

    Ownership: ``aborted``, ``handed`` and ``released`` (in steps of the pass, whatever the lane)
    belong to the caller's thread; ``lanes`` is complete before the run is published. ``failures``
    maps a step to the error that its pass is to raise; a stage adds to it (:meth:`fail`) before it
    hands the step on, and the caller takes out what it raises. Nothing is kept that nobody will
    raise: the frames of an error lead back to the run, and to all that a pass was given.
    """

    base_pass: int
    heading: Heading = AHEAD
    aborted: bool = False
    handed: int = 0
    released: int = 0
    failures: dict[int, BaseException] = field(default_factory=dict)
    lanes: tuple[LaneRun, ...] = ()

    def fail(self, number: int, error: BaseException) -> None:
        """Have the pass of step ``number`` raise ``error``, if no other was first. Any thread."""
        self.failures.setdefault(number, error)
        if self.aborted:
            self.failures.clear()

    def attempt(self, number: int, work: Callable[[], object]) -> None:
        """Do something for step ``number``; an error is what its pass is to raise. Any thread."""
        try:
            work()
        except BaseException as error:
            self.fail(number, error)

    def abort(self) -> None:
        """End it: nobody takes its steps any more. From the caller's thread."""
        self.aborted = True
        self.failures.clear()


@dataclass(frozen=True, slots=True)
class Post:
    """Where a stage stands in its lane: what it looks at, whom it wakes."""

    control: Control
    lane_idx: int
    schedule: Schedule
    bells: Sequence[Bell]
    """Of the stage whose slots it empties, its own, and of whoever it hands on to."""
    first_bell: Bell
    """Of the lane's first stage."""


class Stage(ABC):
    """A named daemon thread that works through the steps of one run after another.

    Contract: ``process`` runs on the stage's thread and returns when its run is aborted or the
    pipeline closes; it looks at that through :meth:`await_true`. ``run`` is the run that the stage
    has adopted: once it shows a run, the stage has left every earlier one for good. The lane's
    first stage, the barrier between runs, is woken then.
    """

    def __init__(self, name: str, post: Post) -> None:
        self.source_bell, self.bell, self.target_bell = post.bells
        self.run = post.control.run
        self._name = name
        self._control = post.control
        self._lane_idx = post.lane_idx
        self._schedule = post.schedule
        self._first_bell = post.first_bell

    def start(self) -> None:
        """Start the thread."""
        self._control.start(threading.Thread(target=self._loop, name=self._name, daemon=True))

    @abstractmethod
    def process(self, lane_run: LaneRun) -> None:
        """Do the lane's steps of a run until that is aborted."""

    def prepare(self) -> None:  # noqa: B027 - most stages have nothing to set up
        """Set up the stage's thread before the first run."""

    def await_true(self, run: Run, condition: Callable[[], bool]) -> bool:
        """Wait until ``condition`` holds; False once the run is over."""
        while True:
            if run.aborted or self._control.closing:
                return False
            if condition():
                return True
            self.bell.wait()

    def _loop(self) -> None:
        try:
            self.prepare()
            while True:
                run = self._next_run()
                if run is None:
                    break
                self.process(run.lanes[self._lane_idx])
        except BaseException as error:
            self._control.fail(error)
        self._control.leave()

    def _next_run(self) -> Run | None:
        while not self._control.closing:
            run = self._control.run
            if run is not self.run:
                self.run = run
                self._first_bell.ring()
                return run
            self.bell.wait()
        return None


class Control:
    """What every thread of a pipeline looks at: the run to do, and whether to stop.

    ``run`` is replaced, never changed, by the caller's thread in a single assignment, so that an
    interrupt leaves either the old or the new one; before the first it is one that is over, which
    every stage is taken to have left. ``closing`` only ever becomes True. ``fatal``
    is an error that ended a thread: no pass can succeed after it. ``threads`` are all that were
    started; the first of them that leaves its loop does what is in ``on_leave``.
    """

    def __init__(self) -> None:
        self.run = Run(0)
        self.run.abort()
        self.closing = False
        self.fatal: BaseException | None = None
        self.on_fatal: Callable[[], None] = lambda: None
        self.threads: list[threading.Thread] = []
        self.on_leave: list[Callable[[], None]] = []
        _controls.add(self)

    def start(self, thread: threading.Thread) -> None:
        """Start one of the pipeline's threads. Raises StreamerError."""
        self.threads.append(thread)
        start_thread(thread)

    def leave(self) -> None:
        """From a thread that has left its loop, and holds nothing that others may wait for."""
        with suppress(IndexError):
            last_act = self.on_leave.pop()
            last_act()

    def on_own_thread(self) -> bool:
        """True if a thread of the pipeline calls this."""
        return threading.get_ident() in [thread.ident for thread in self.threads]

    def forget_errors(self) -> None:
        """Once all threads have ended: frames of errors nobody raised lead back to everything."""
        self.fatal = None
        self.run.abort()

    def fail(self, error: BaseException) -> None:
        """Record that a thread died of ``error`` and wake the caller."""
        self.fatal = error
        self.on_fatal()


_controls: weakref.WeakSet[Control] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child has none of the threads, and zeros in the slots: its passes end."""
    for control in tuple(_controls):
        control.closing = True
        control.on_fatal()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
