"""Records which experts passes ask for, in a file that :mod:`.trace` reads."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError
from ..machine.atomic import naming, read_record
from .trace import (
    HEAD,
    MOST_NBYTES,
    VERSION,
    ExpertPass,
    TraceHeader,
    check_header,
    check_pass,
    read_trace,
)

logger = logging.getLogger(__name__)


class TraceWriter:
    """Appends passes to a trace, which is new or of the same header. For one thread.

    Each is written with one call: it is in the file as a whole or not at all, whatever ends the
    process. Nobody else records there meanwhile.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Open or create ``path``; a last line that was torn is cut off.

        ConfigError if it cannot be opened, is something else, is of another header, or another
        writer has it.
        """
        self.path, self.header = path, header
        try:
            check_header(header)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        self._is_full = False
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(path, flags, 0o644)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def append(self, one: ExpertPass) -> bool:
        """Put a pass on record; False, once with a warning, if the file has MOST_NBYTES.

        ConfigError for a pass that cannot be of this header; OSError if it cannot be written:
        then nothing of it is.
        """
        document = {"tokens": one.tokens, "asked": one.asked}
        try:
            check_pass(self.header, document)
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        line, nbytes = _line_of(document), os.fstat(self._handle).st_size
        if nbytes + len(line) > MOST_NBYTES:
            if not self._is_full:
                logger.warning("%s: has %d bytes, no more is recorded", self.path, nbytes)
            self._is_full = True
            return False
        self._write(line, nbytes)
        return True

    def close(self) -> None:
        """Let others write. Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _begin(self) -> None:
        """See that what is there is ours, and whole."""
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise ConfigError(f"{self.path}: not a regular file")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another trace is being recorded there") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s: cannot be locked: %s", self.path, error.strerror)
        if not os.fstat(self._handle).st_size:
            self._write(_line_of({HEAD: VERSION, **asdict(self.header)}), 0)
            return
        there = read_trace(self.path).header
        if there != self.header:
            raise ConfigError(f"{self.path}: is a trace of {there}, not of {self.header}")
        os.ftruncate(self._handle, read_record(self.path, MOST_NBYTES).rfind(b"\n") + 1)

    def _write(self, line: bytes, begin: int) -> None:
        """All of it at ``begin``, the file's end, or nothing."""
        rest = line
        with naming(self.path):
            try:
                while True:
                    rest = rest[os.write(self._handle, rest) :]
                    if not rest:
                        break
            except BaseException:
                os.ftruncate(self._handle, begin)
                raise


def _line_of(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
