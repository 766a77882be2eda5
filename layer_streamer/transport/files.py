"""The checkpoint's open files: positional reads, and whether a file is still what it was."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path

from ..checkpoint.manifest import FileStamp
from ..errors import CheckpointChangedError, CheckpointError, ClosedError, ReadError, printable
from ..machine.descriptors import OUT_OF_DESCRIPTORS, open_regular, reserve
from ..machine.libc import direct_alignment
from ..planning.layout import PAGE
from .tasks import run_all

logger = logging.getLogger(__name__)

# Linux moves at most 0x7ffff000 bytes a call; a round number below it.
MAX_READ = 1 << 30
SAMPLES = 16
"""Places in an extent that are looked at to tell whether it is cached."""


class _Owner(FileIO):
    """Closes its descriptor when it goes, if not before: once, in a single call."""

    def __del__(self) -> None:
        self.close()


@dataclass(slots=True)
class _Open:
    """What is known of a file, in one place: it is looked up for every read."""

    stamp: FileStamp
    descriptor: int
    ctime_ns: int
    """As of the last look at its name."""


class OpenFiles:
    """One read-only descriptor per file of a checkpoint, and one more for direct reads.

    Thread rules: reads and checks from any thread; :meth:`close` once no thread reads any more.
    Ownership: descriptors are opened on a thread of their own, where no interrupt can come between
    a descriptor and its owner, and closed with this object if not before.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._stamps = dict(stamps)
        self._changes_of_name = count()  # one step, whichever threads are at it
        self._open: dict[Path, _Open] = {}
        self._direct: dict[Path, int] = {}
        self._owners: list[_Owner] = []
        self.reads_direct = False
        """True if reads are to be page-aligned, so that they can be direct."""
        self.direct_refused = False
        """True once the file system has refused to read a file directly."""
        reserve(2 * len(self._stamps))
        try:
            run_all([partial(self._open_file, stamp) for stamp in self._stamps.values()], 1)
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def use_direct(self) -> None:
        """From now on, read past the page cache wherever the file system allows that."""
        self.reads_direct = True
        run_all([partial(self._open_direct, path) for path in self._stamps], 1)

    def cached_share(self, extents: Iterable[tuple[Path, int, int]]) -> float:
        """About which part of some (path, offset, bytes) is in the page cache; 0 if unknown."""
        samples = [
            (self._open[path].descriptor, offset + nbytes * i // SAMPLES)
            for path, offset, nbytes in extents
            for i in range(SAMPLES)
            if nbytes
        ]
        cached = sum(_is_cached(descriptor, offset) for descriptor, offset in samples)
        return cached / len(samples) if samples else 1.0

    @property
    def read_modes(self) -> dict[Path, str]:
        """How each file is read: "direct", or "buffered" (through the page cache)."""
        return {path: "direct" if path in self._direct else "buffered" for path in self._stamps}

    def descriptor(self, path: Path) -> int:
        """The file descriptor of ``path``."""
        return self._open[path].descriptor

    def check_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """CheckpointChangedError if a file (None: any) differs from when its header was read."""
        for path in self._stamps if paths is None else paths:
            file = self._open.get(path)
            if file is None:
                raise ClosedError("the streamer is closed")
            stamp, info = file.stamp, os.fstat(file.descriptor)
            if (info.st_size, info.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
                change = stamp.change(info.st_size, info.st_mtime_ns)
                raise CheckpointChangedError(f"{path}: changed since it was opened: {change}")
            if info.st_ctime_ns != file.ctime_ns:
                self._look_at_name(path, file, info)

    def read_into(
        self, path: Path, view: memoryview, offset: int, wanted: int | None = None
    ) -> None:
        """Fill ``view`` with the file's bytes from ``offset`` on, at least ``wanted`` (None: all).

        Direct if the file is opened so; then ``offset``, the view's address and its length are
        multiples of a page. Errors: ReadError if the system refuses, CheckpointChangedError at the
        end of the file.
        """
        wanted = len(view) if wanted is None else wanted
        direct = self._direct.get(path) if self._direct else None
        if direct is not None and not (offset | len(view)) % PAGE:
            try:
                read_direct(direct, view, offset, wanted, path)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise read_error(path, wanted, offset, error) from error
                self._refuse_direct(path, error)
        try:
            read_exactly(self._open[path].descriptor, view[:wanted], offset, path)
        except OSError as error:
            raise read_error(path, wanted, offset, error) from error

    def close(self) -> None:
        """Close every descriptor. Idempotent; two threads may at once."""
        self._direct.clear()
        self._open.clear()
        for owner in self._owners:
            owner.close()

    def _open_file(self, stamp: FileStamp) -> None:
        try:
            descriptor = self._own(open_regular(stamp.path))
        except OSError as error:
            raise _open_error(stamp.path, error) from error
        self._open[stamp.path] = _Open(stamp, descriptor, stamp.ctime_ns)

    def _own(self, descriptor: int) -> int:
        self._owners.append(_Owner(descriptor))
        return descriptor

    def _look_at_name(self, path: Path, file: _Open, info: os.stat_result) -> None:
        """The file's time of change moved, and nothing else: a notice if its name is still its own,
        or nobody's; CheckpointChangedError if a file of other bytes lies there."""
        there = self._other_file(path)
        if there is not None and file.stamp.change(there.st_size, there.st_mtime_ns):
            raise _renamed(path)
        if next(self._changes_of_name) == 0:
            logger.warning(
                "%s: a link, the name or the permissions changed since it was opened, but not its "
                "size or time of modification: reading on",
                printable(str(path)),
            )
        file.ctime_ns = info.st_ctime_ns

    def _other_file(self, path: Path) -> os.stat_result | None:
        """What lies under the name of an open file, if it is another file by now."""
        try:
            there = path.stat()
        except OSError:
            return None  # moved away, or removed: what is open goes on
        same = os.path.samestat(there, os.fstat(self._open[path].descriptor))
        return None if same else there

    def _open_direct(self, path: Path) -> None:
        try:
            descriptor = self._own(open_direct(path))
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                raise _open_error(path, error) from error
            if self._other_file(path) is not None:
                raise _renamed(path) from error
            self._say_refused(path, error)
            return
        # A link on the way may lead elsewhere by now, which the first descriptor does not show.
        if not os.path.sameopenfile(descriptor, self._open[path].descriptor):
            raise _renamed(path)
        self._direct[path] = descriptor

    def _refuse_direct(self, path: Path, error: OSError) -> None:
        """From now on the file is read through the page cache."""
        # Other threads may still be reading from it: closed with the rest.
        if self._direct.pop(path, None) is not None:
            self._say_refused(path, error)

    def _say_refused(self, path: Path, error: OSError) -> None:
        self.direct_refused = True
        logger.warning(
            "%s: direct reads are refused (%s), reading buffered", printable(str(path)), error
        )


def open_direct(path: Path) -> int:
    """A descriptor of ``path`` for page-aligned reads past the page cache; OSError where that is
    refused."""
    if sys.platform != "linux":
        raise OSError("direct reads are implemented for Linux only")
    descriptor = open_regular(path, os.O_DIRECT)
    alignment = direct_alignment(descriptor)
    if alignment is not None and not 0 < alignment <= PAGE:
        os.close(descriptor)
        raise OSError(f"direct reads need an alignment of {alignment} bytes")
    return descriptor


def read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset`` of an open file, through short reads. Raises OSError."""
    done, wanted = 0, len(view)
    while done < wanted:
        # os.preadv fills the slot itself: no bytes object, no shared cursor, no GIL.
        got = os.preadv(descriptor, [view[done : done + MAX_READ]], offset + done)
        if got == 0:
            raise _end_of_file(path, wanted, offset, done)
        done += got


def read_direct(descriptor: int, view: memoryview, offset: int, wanted: int, path: Path) -> None:
    """Fill at least the first ``wanted`` bytes of a page-aligned ``view``. Raises OSError.

    After a short read it goes on at the page that the read ended in: at the end of the file that
    gives the same bytes again, so a read that covers nothing new is the end. EINVAL, as where
    direct reads are refused, if the file goes on there.
    """
    covered = 0
    while covered < wanted:
        start = covered // PAGE * PAGE
        got = os.preadv(descriptor, [view[start : start + MAX_READ]], offset + start)
        if start + got <= covered:
            if os.fstat(descriptor).st_size > offset + covered:
                raise OSError(errno.EINVAL, "they end within a page")
            raise _end_of_file(path, wanted, offset, covered)
        covered = start + got


def _is_cached(descriptor: int, offset: int) -> bool:
    """True if a byte can be read without waiting for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):
        return False  # not cached, or a system that does not tell


def _end_of_file(path: Path, wanted: int, offset: int, got: int) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{path}: expected {wanted} bytes at offset {offset}, got {got}: "
        "the file shrank after it was opened"
    )


def read_error(path: Path, wanted: int, offset: int, error: OSError) -> ReadError:
    """What is raised of a read that the system refused."""
    reason = error.strerror or error
    return ReadError(f"{path}: reading {wanted} bytes at offset {offset} failed: {reason}")


def _open_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be opened: {error.strerror or error}")


def _renamed(path: Path) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{path}: changed since it was opened: the name is another file's"
    )
