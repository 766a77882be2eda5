"""What both header parsers stand on: a file read by position, and limits on what a header may ask.

Headers are read with ``os.pread`` in windows, never mapped: a file that shrinks meanwhile is an
error here, not a SIGBUS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..machine.descriptors import open_regular
from .manifest import FileStamp, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""Longest header of one file, and all headers of a checkpoint together. The format's own limit in
safetensors; the largest GGUF vocabularies (260k tokens, 500k merges) take 15 MB, the headers of the
largest checkpoints in many files 30 MB."""

MAX_TENSORS = 250_000
"""Most tensors in one checkpoint. The largest published have 90k (DeepSeek V3, FP8) to 210k names
(mixtures of 384 experts packed in 4 bits: three tensors a matrix)."""

MAX_FILE_TENSORS = 65_536
"""Most tensors in one file, several times what published files have; they parse in some 0.6 s,
which keeps a header whose last entry is wrong under a second."""

MAX_RECORD_BYTES = 80_000_000
"""Most memory for the records of one checkpoint's tensors, about 330 bytes each with usual names
and shapes: what keeps odd headers (very long names, all shapes different) under 100 MB."""

MAX_FILES = 4096
"""Most files in one checkpoint; the largest published have some 250."""

MAX_TEXT_BYTES = 4_000_000
"""Most metadata text kept of one checkpoint. Chat templates take 100 kB and training logs a MB or
two; Python may need four bytes a character, and twice that while it parses."""

MAX_DIMS = 32
"""Most dimensions of a tensor; no format writes more than 8."""

MAX_WALKED = 2_500_000
"""Most GGUF strings stepped over in one checkpoint: three times the largest vocabulary (260k tokens
and 510k merges), some 0.3 s."""

MAX_KEYS = 65_536
"""Most GGUF keys in one checkpoint; real ones have 20 to 60, parts of a split one 5."""

MAX_INT = 2**63 - 1
"""Largest dimension or offset: what torch and the kernel can express."""

WINDOW_BYTES = 1 << 20
"""Bytes a header is read by: large enough for few calls, small beside the memory bound."""


class Quota:
    """What one checkpoint may still ask for, shared by all of its files."""

    def __init__(self) -> None:
        self.header = MAX_HEADER_BYTES
        """Bytes of headers."""
        self.keys = MAX_KEYS
        """Keys of GGUF metadata."""
        self.elements = MAX_WALKED
        self.text = MAX_TEXT_BYTES
        self._tensors = MAX_TENSORS
        self._memory = MAX_RECORD_BYTES

    def charge(self, name: str, num_dims: int, path: Path) -> None:
        """Pay for one tensor's record; CheckpointError from ``path`` when the quota is spent.

        ``num_dims`` is 0 for a shape that another tensor's record has paid for.
        """
        # Sizes of the objects in CPython: a TensorSpec, two ints, its place in two dicts; and the
        # shape's tuple, once as a key.
        self._memory -= 220 + sys.getsizeof(name) + (num_dims and 250 + 60 * num_dims)
        self._tensors -= 1
        if self._tensors < 0:
            raise CheckpointError(f"{path}: more than {MAX_TENSORS} tensors in this checkpoint")
        if self._memory < 0:
            raise CheckpointError(
                f"{path}: tensor names and shapes take more than {MAX_RECORD_BYTES} bytes"
            )


@dataclass(frozen=True, slots=True)
class Contents:
    """What one format's parser found, before tensors are grouped into layers."""

    tensors: Mapping[str, TensorSpec]
    files: Mapping[Path, FileStamp]
    metadata: Mapping[str, Any]


class HeaderFile:
    """An open regular file, read by position; its stamp is of the very file that is read."""

    def __init__(self, path: Path, fd: int) -> None:
        info = os.fstat(fd)
        self.path = path
        self.size = info.st_size
        # Taken before the first read: what changes the file from now on shows as a difference.
        self.stamp = FileStamp(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        self._fd = fd

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``; the caller has checked them against the size."""
        pieces = []
        while count > 0:
            try:
                piece = os.pread(self._fd, count, offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {error.strerror or error}") from error
            if not piece:
                raise CheckpointError(f"{self.path}: ends at byte {offset}, shrank while read")
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def open_header(path: Path, context: str = "") -> Iterator[HeaderFile]:
    """Open ``path`` for reading its header; CheckpointError if that fails, with ``context``."""
    try:
        fd = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: {reason}{context}") from error
    try:
        yield HeaderFile(path, fd)
    finally:
        os.close(fd)


def list_directory(path: Path) -> list[str]:
    """Sorted names in a directory, hidden ones left out; CheckpointError if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
