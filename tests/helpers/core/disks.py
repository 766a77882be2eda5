"""Files whose direct reads do what a test says, and what became of them."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layer_streamer.checkpoint.manifest import FileStamp
from layer_streamer.planning.layout import PAGE
from layer_streamer.transport import files
from layer_streamer.transport.files import open_direct


def stamp(path: Path) -> FileStamp:
    info = path.stat()
    return FileStamp(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def pages(nbytes: int) -> memoryview:
    """Page-aligned memory of at least ``nbytes``, whole pages."""
    return memoryview(mmap.mmap(-1, max(-(-nbytes // PAGE), 1) * PAGE))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def refuse(number: int = errno.EINVAL) -> int:
    raise OSError(number, os.strerror(number))


class Disk:
    """The system's open and preadv, with direct descriptors that do what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._preadv = os.preadv
        self.direct: dict[int, Path] = {}
        self.read: Callable[[Path, Any, int], int | None] = lambda path, view, offset: None
        """Bytes to read instead of all, or None; may raise. Of direct descriptors alone."""
        self.calls = 0
        monkeypatch.setattr(files, "open_direct", self._open)
        monkeypatch.setattr(os, "preadv", self)

    def _open(self, path: Path) -> int:
        try:
            descriptor = open_direct(path)
        except OSError:
            # These tests are about what follows, wherever they run.
            descriptor = os.open(path, os.O_RDONLY)
        self.direct[descriptor] = path
        return descriptor

    def __call__(self, descriptor: int, views: Any, offset: int, flags: int = 0) -> int:
        path = self.direct.get(descriptor)
        if path is None:
            return self._preadv(descriptor, views, offset, flags)
        self.calls += 1
        view = views[0]
        most = self.read(path, view, offset)
        got = self._preadv(descriptor, views, offset, flags)
        if most is None or got <= most:
            return got
        view[most:got] = bytes([0xDB]) * (got - most)
        return most
