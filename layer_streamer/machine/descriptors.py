"""Descriptors of files: opened without waiting, and the limit on how many there may be."""

from __future__ import annotations

import errno
import os
import resource
import stat
from contextlib import suppress
from pathlib import Path

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""Errors of a process, or a machine, that has as many files open as it may."""


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor of a regular file, for reading; OSError if there is none to be had.

    Never waits for the writer of a FIFO that has come to lie there. Where this process has as many
    files open as it may, its soft limit is raised to the hard one first; an error that stays names
    the limit.
    """
    # O_NONBLOCK means nothing to a regular file.
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EMFILE and raise_limit():
            return open_regular(path, flags)
        if error.errno in OUT_OF_DESCRIPTORS:
            raise OSError(error.errno, f"{error.strerror} ({_limit(error.errno)})") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def raise_limit() -> bool:
    """Let this process open as many files as its hard limit says; False if it may already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with suppress(OSError, ValueError):  # macOS has a limit of its own below an infinite one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] != soft


def reserve(count: int) -> None:
    """Raise the soft limit where ``count`` descriptors would be more than half of it, so that what
    else the process opens finds some left."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and 2 * count > soft:
        raise_limit()


def _limit(number: int) -> str:
    if number == errno.ENFILE:
        return "the machine's limit, /proc/sys/fs/file-max"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may open {hard}: raise its hard limit, ulimit -Hn"
