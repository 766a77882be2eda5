"""Small files that are read and replaced whole, and errors that name the file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .descriptors import open_regular

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What writes raise where nothing more can be written."""


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, so that no reader sees half of it."""
    with naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_record(path: Path, most: int) -> bytes:
    """A regular file of ``most`` bytes at the most. OSError; ValueError for a larger one."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content


def read_text(path: Path) -> str:
    """What a file of the kernel's says; nothing if it cannot be read. A name in it may be of any
    bytes, which are kept."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which the error of a full disk, which a write raises without a name, gets one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise
