"""Names that a checkpoint gives, of tensors, keys and files: which are taken, how they are shown.

Beside these, ``errors.printable`` makes any of them fit to be printed.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError

MAX_NAME_CHARS = 1024
"""Longest name of a tensor or key; also keeps error messages readable."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can have by itself ("\\ud800"), and no valid text can: all that UTF-8 refuses."""


def check_name(name: str, path: Path, what: str) -> None:
    """CheckpointError unless ``name`` is a bounded, encodable, non-empty string."""
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise CheckpointError(
            f"{path}: {what} {shown(name)}: a name of {len(name)} characters, "
            f"not 1 to {MAX_NAME_CHARS}"
        )
    if not name.isascii() and _SURROGATE.search(name):
        raise CheckpointError(f"{path}: {what} {shown(name)}: not valid Unicode")


def shown(value: object) -> str:
    """``repr`` of a value from a file, cut to one short line for a message."""
    if isinstance(value, int) and value.bit_length() > 128:  # repr() may refuse a huge int
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[:200]
    elif isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)} elements"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def file_fault(name: str) -> str:
    """Why the file of this name, which a checkpoint gives, may not be opened; '' if it may.

    Lexical: links inside a cache lead out of the model's directory legitimately.
    """
    if "\0" in name or "\\" in name or len(name) > 4096:
        return "is no file name (NUL, backslash or too long)"
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        return "is not below the model's directory"
    return "is not valid Unicode" if _SURROGATE.search(name) else ""


def absolute(path: Path) -> Path:
    """The path from the root on, so that it means the same when the process changes its folder."""
    try:
        return path.absolute()
    except OSError as error:
        raise CheckpointError(f"{path}: the working directory is gone: {error.strerror}") from error
