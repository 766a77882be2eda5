"""The checkpoint's open files: positional reads, and whether a file is still what it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import CheckpointChangedError, CheckpointError, ClosedError, ReadError
from .manifest import FileStamp

# Linux moves at most 0x7ffff000 bytes a call; a round number below it.
MAX_READ = 1 << 30


class OpenFiles:
    """One read-only descriptor per file of a checkpoint.

    Thread rules: reads and checks from any thread; :meth:`close` once no thread reads any more.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._stamps = dict(stamps)
        self._descriptors: dict[Path, int] = {}
        try:
            for path in stamps:
                self._descriptors[path] = _open(path)
            self.check_unchanged(stamps)
        except BaseException:
            self.close()
            raise

    def descriptor(self, path: Path) -> int:
        """The file descriptor of ``path``."""
        return self._descriptors[path]

    def check_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """CheckpointChangedError if a file (None: any) differs from when its header was read."""
        for path in self._stamps if paths is None else paths:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                raise ClosedError("the streamer is closed")
            stamp, info = self._stamps[path], os.fstat(descriptor)
            if info.st_size != stamp.size:
                raise CheckpointChangedError(
                    f"{path}: changed since it was opened: "
                    f"expected {stamp.size} bytes, got {info.st_size}"
                )
            if (info.st_mtime_ns, info.st_ctime_ns) != (stamp.mtime_ns, stamp.ctime_ns):
                raise CheckpointChangedError(
                    f"{path}: changed since it was opened (its time of change moved)"
                )

    def read_into(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the file's bytes from ``offset`` on.

        Errors: ReadError if the system refuses, CheckpointChangedError at the end of the file.
        """
        read_exactly(self._descriptors[path], view, offset, path)

    def close(self) -> None:
        """Close every descriptor. Idempotent."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)


def read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset`` of an open file, through short reads; errors as read_into."""
    done, wanted = 0, len(view)
    try:
        while done < wanted:
            # os.preadv fills the slot itself: no bytes object, no shared cursor, no GIL.
            got = os.preadv(descriptor, [view[done : done + MAX_READ]], offset + done)
            if got == 0:
                raise CheckpointChangedError(
                    f"{path}: expected {wanted} bytes at offset {offset}, got {done}: "
                    "the file shrank after it was opened"
                )
            done += got
    except OSError as error:
        raise ReadError(
            f"{path}: reading {wanted} bytes at offset {offset} failed: {error.strerror or error}"
        ) from error


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from error
