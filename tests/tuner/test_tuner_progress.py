"""Loading counts as progress, waiting does not."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest

from layer_streamer.tuner.trials.progress import LEAST_NBYTES, telling_of_progress, work_done


def test_while_work_gets_on_it_is_told_and_an_error_there_ends_nothing() -> None:
    done, heard = 0, threading.Event()

    def rise() -> int:
        nonlocal done
        done += LEAST_NBYTES
        return done

    def alive() -> None:
        heard.set()
        raise OSError("nobody listens")

    with telling_of_progress(alive, rise, look_seconds=0.001):
        assert heard.wait(60)
    assert all(thread.name != "layer-streamer-progress" for thread in threading.enumerate())


def test_what_a_look_costs_is_no_progress() -> None:
    looks, many = 0, threading.Event()

    def stand_still() -> int:
        nonlocal looks
        looks += 1
        if looks > 20:
            many.set()
        return LEAST_NBYTES * 5 // 6 if looks % 2 else 0

    def never() -> None:
        pytest.fail("it hangs")

    with telling_of_progress(never, stand_still, look_seconds=0.001):
        assert many.wait(60)


def test_reads_and_pages_are_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    before = work_done()
    assert (tmp_path / "file").read_bytes()
    between = work_done()
    memory = mmap.mmap(-1, 8 << 20)
    memory.write(b"x" * (8 << 20))
    assert between - before >= LEAST_NBYTES
    assert work_done() - between >= LEAST_NBYTES
