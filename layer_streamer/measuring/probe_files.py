"""The files that a probe reads: chosen, opened, handed out by chunks, dropped from the cache."""

from __future__ import annotations

import errno
import mmap
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..planning.layout import PAGE
from ..transport.files import open_direct, read_direct, read_error, read_exactly

WRITE_NBYTES = 16 << 20
FLUSH_NBYTES = 256 << 20
FREE_MARGIN = 1 << 30
"""Free space that a temporary file leaves to others."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One file, by its descriptors."""

    path: Path
    nbytes: int
    """Whole pages of it: direct reads take no less."""
    buffered: int
    direct: int | None
    """None: direct reads are refused."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """``nbytes`` of a file from ``offset`` on, both whole pages."""

    file: OpenFile
    offset: int
    nbytes: int


class ProbeFiles:
    """Files open for reading, as one ring of bytes that is read round and round.

    Thread rules: :meth:`read` from any thread; the rest from one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files: list[OpenFile] = []
        self.direct_refused: str | None = None
        """Why direct reads are not possible; None: they are."""
        self._position = (0, 0)
        self._taken = 0
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self.close()
            raise
        if self.direct_refused is not None:
            self._close_direct()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def read_again(self) -> bool:
        """True if more has been taken than there is, so that bytes were read twice."""
        return self._taken > self.nbytes

    def num_chunks(self, nbytes: int) -> int:
        """How many chunks of ``nbytes`` can be taken before the ring begins anew."""
        return sum(file.nbytes // nbytes for file in self.files)

    def take(self, nbytes: int, count: int) -> list[Chunk]:
        """The next ``count`` chunks of ``nbytes``, in the order of the files. One must fit."""
        assert self.num_chunks(nbytes) > 0
        number, offset = self._position
        chunks: list[Chunk] = []
        while len(chunks) < count:
            file = self.files[number]
            if offset + nbytes <= file.nbytes:
                chunks.append(Chunk(file, offset, nbytes))
                offset += nbytes
            else:
                number, offset = (number + 1) % len(self.files), 0
        self._position = (number, offset)
        self._taken += count * nbytes
        return chunks

    def read(self, chunk: Chunk, view: memoryview, mode: str) -> None:
        """Fill ``view``, page-aligned and as long as the chunk. ReadError if it is refused."""
        file = chunk.file
        try:
            if mode == "direct":
                assert file.direct is not None
                read_direct(file.direct, view, chunk.offset, chunk.nbytes, file.path)
            else:
                read_exactly(file.buffered, view, chunk.offset, file.path)
        except OSError as error:
            raise read_error(file.path, chunk.nbytes, chunk.offset, error) from error

    def close(self) -> None:
        """Close every descriptor. Idempotent."""
        self._close_direct()
        while self.files:
            os.close(self.files.pop().buffered)

    def _close_direct(self) -> None:
        for index, file in enumerate(self.files):
            if file.direct is not None:
                self.files[index] = OpenFile(file.path, file.nbytes, file.buffered, None)
                os.close(file.direct)

    def _open(self, path: Path) -> None:
        try:
            buffered = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be opened: {error.strerror or error}") from error
        nbytes = os.fstat(buffered).st_size // PAGE * PAGE
        self.files.append(OpenFile(path, nbytes, buffered, None))
        if self.direct_refused is None and nbytes:
            try:
                direct = open_direct(path)
            except OSError as error:
                self.direct_refused = str(error.strerror or error)
                return
            self.files[-1] = OpenFile(path, nbytes, buffered, direct)
            self._try_direct(path, direct)

    def _try_direct(self, path: Path, direct: int) -> None:
        """Some file systems accept the flag and refuse the read."""
        page = memoryview(mmap.mmap(-1, PAGE))
        try:
            read_direct(direct, page, 0, PAGE, path)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise read_error(path, PAGE, 0, error) from error
            self.direct_refused = str(error.strerror or error)


def drop_from_cache(chunks: Sequence[Chunk]) -> None:
    """Ask the system to forget the cached pages of ``chunks``; it may keep them."""
    if not hasattr(os, "posix_fadvise"):
        return
    for chunk in chunks:
        os.posix_fadvise(chunk.file.buffered, chunk.offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)


def is_cached(chunk: Chunk) -> bool | None:
    """True if the middle of ``chunk`` is in the page cache; None if the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    middle = chunk.offset + chunk.nbytes // 2 // PAGE * PAGE
    try:
        return os.preadv(chunk.file.buffered, [bytearray(1)], middle, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


def choose_files(path: Path, least_nbytes: int) -> list[Path]:
    """``path``, or the files in that directory, of at least ``least_nbytes``; else ConfigError."""
    try:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        large = [file for file in found if file.is_file() and file.stat().st_size >= least_nbytes]
        if path.is_dir() or path.is_file():
            missing = f"holds no file of at least {least_nbytes} bytes"
        else:
            path.stat()
            missing = "is neither a file nor a directory"
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not large:
        raise ConfigError(f"{path}: {missing}")
    return large


def temporary_nbytes(folder: Path, wanted: int, least: int) -> int:
    """Size of a temporary file in ``folder``: at most half of what it has free above a margin.

    ConfigError if that is less than ``least``.
    """
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be used: {error.strerror or error}") from error
    free = status.f_bavail * status.f_frsize
    nbytes = min(wanted, (free - FREE_MARGIN) // 2) // PAGE * PAGE
    if nbytes < least:
        raise ConfigError(
            f"{folder}: {free} bytes are free, a temporary file needs at least "
            f"{2 * least + FREE_MARGIN}; name a file or a directory with large files instead"
        )
    return nbytes


@contextmanager
def temporary_files(folder: Path, nbytes: int) -> Iterator[ProbeFiles]:
    """A file of ``nbytes`` random bytes in ``folder``, on the disk and not in the page cache.

    It has no name any more when this returns: it goes with its last descriptor, however the
    process ends. ConfigError if it cannot be written.
    """
    path = folder / f".layer-streamer-probe-{uuid.uuid4().hex}"
    handle, files = None, None
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(handle, nbytes)
            files = ProbeFiles([path])
            path.unlink()
            _write(handle, nbytes)
        except OSError as error:
            raise ConfigError(
                f"{folder}: a temporary file cannot be written: {error.strerror or error}"
            ) from error
        yield files
    finally:
        path.unlink(missing_ok=True)
        if files is not None:
            files.close()
        if handle is not None:
            os.close(handle)


def _write(handle: int, nbytes: int) -> None:
    """Random bytes, which no file system can compress; flushed as it goes."""
    block = memoryview(os.urandom(min(WRITE_NBYTES, nbytes)))
    offset = flushed = 0
    while offset < nbytes:
        begin = offset % len(block)
        offset += os.pwrite(handle, block[begin : begin + nbytes - offset], offset)
        if offset - flushed >= FLUSH_NBYTES or offset == nbytes:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, flushed, offset - flushed, os.POSIX_FADV_DONTNEED)
            flushed = offset
