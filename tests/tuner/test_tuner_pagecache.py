"""The page cache, filled and emptied before a run."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layer_streamer.checkpoint.manifest import stamp_file
from layer_streamer.tuner.trials import pagecache
from layer_streamer.tuner.trials.pagecache import PageCache
from layer_streamer.tuner.trials.progress import work_done

NBYTES = (20 << 20) + 5


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file of 20 MiB and a bit, on a file system whose pages can be dropped."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20) * 20 + b"tail!")
    cache = PageCache({path: stamp_file(path)})
    cache.drop()
    if cache.share() != 0.0:
        pytest.skip("this file system does not drop or tell its cached pages")
    yield path


def open_cache(path: Path) -> PageCache:
    return PageCache({path: stamp_file(path)})


def test_a_filled_cache_holds_the_files_and_an_emptied_one_nothing(path: Path) -> None:
    cache = open_cache(path)
    assert cache.fill() == ""
    assert cache.share() > 0.8
    assert cache.drop() == ""
    assert cache.share() < 0.2


def test_looking_at_what_is_cached_does_not_change_it(path: Path) -> None:
    cache = open_cache(path)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(8 * mmap.PAGESIZE)
    first = cache.share()
    assert first is not None
    assert 0 < first < 0.1
    assert [cache.share() for _ in range(3)] == pytest.approx([first] * 3, abs=0.05)


def test_files_that_are_cached_are_not_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(path)
    cache.fill()

    def refuse(*arguments: object) -> int:
        raise AssertionError("was read")

    monkeypatch.setattr(os, "preadv", refuse)
    assert cache.fill() == ""


def test_pages_that_are_in_use_are_said_to_have_stayed(path: Path) -> None:
    cache = open_cache(path)
    cache.fill()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as m:
        assert sum(m[:: mmap.PAGESIZE]) > 0
        assert cache.drop() == (
            "cold: 100% of the checkpoint's files stayed in the page cache (in use?)"
        )


def test_files_that_memory_cannot_hold_are_not_read_through(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(path)
    monkeypatch.setattr(pagecache, "available_host_bytes", lambda: NBYTES)
    before = cache.share()
    assert cache.fill() == "warm: the page cache has no room for the checkpoint's files"
    assert cache.share() == before


def test_where_the_system_does_not_tell_files_are_read_and_nothing_is_claimed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "_may_look", lambda descriptor: False)
    cache = open_cache(path)
    before = work_done()
    assert cache.share() is None
    assert cache.fill() == ""
    assert work_done() - before >= NBYTES
    assert cache.drop() == ""
    monkeypatch.undo()
    assert cache.share() < 0.2


def test_a_long_fill_counts_as_progress(path: Path) -> None:
    before = work_done()
    assert open_cache(path).fill() == ""
    assert work_done() - before >= NBYTES
