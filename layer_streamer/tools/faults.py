"""Errors as a command says them: one line that names the file, or the limit of the machine; and the
exit code that follows."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import StreamerError, printable
from .command import say

MOST_CHARACTERS = 2000
"""Of a line: some of torch's errors carry a page of C++."""
OF_THREADS = ("can't start new thread", "resource temporarily unavailable")
OF_MEMORY = ("alloc", "out of memory", "not enough memory")
OF_DEVICES = ("cuda", "cublas", "nvml", "driver")
"""How torch and others say it where they raise a RuntimeError."""


def exit_code(run: Callable[[], int | None]) -> int:
    """Of a command or a script: what ``run`` returns (None: 0), 2 after an error (one line on
    stderr), 130 after Ctrl-C or SIGTERM. A fault of ours is raised."""
    try:
        with sigterm_as_ctrl_c():
            code = run()
            if sys.stdout is not None:
                sys.stdout.flush()  # what a full disk does not take is an error, too
            return code or 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            say("")  # after the terminal's ^C
        return 130
    except BrokenPipeError:
        leave_stdout()  # the reader has gone
    except Exception as error:
        if not is_the_users(error):
            raise
        say(f"error: {one_line(error)}")
        if isinstance(error, OSError) and error.filename is None:
            leave_stdout()  # it may be what could not be written
        return 2
    return 0


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt, so that files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_the_users(error: Exception) -> bool:
    """True for what arguments, files and the machine can be the cause of: one line will do.

    Of RuntimeErrors, which torch and threads raise for everything, those that name such a cause.
    """
    if isinstance(error, StreamerError | OSError | ValueError | ImportError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in (*OF_THREADS, *OF_MEMORY, *OF_DEVICES)
    )


def one_line(error: BaseException) -> str:
    """What went wrong, printable in a terminal whatever names are in it."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        names = (error.filename, error.filename2)
        named = [os.fsdecode(name) for name in names if isinstance(name, str | bytes)]
        said = ": ".join([" -> ".join(named), error.strerror] if named else [error.strerror])
    elif isinstance(error, MemoryError):
        said = f"out of host memory ({said})" if said != "MemoryError" else "out of host memory"
    said = printable(said[:MOST_CHARACTERS])
    limit = limit_met(error)
    return f"{said} ({limit})" if limit else said


def limit_met(error: BaseException) -> str:
    """The limit of this process that an error comes from, where one is set; "" otherwise."""
    if isinstance(error, StreamerError) and error.__cause__ is not None:
        error = error.__cause__
    text, number = str(error).lower(), getattr(error, "errno", None)
    if number == errno.EAGAIN or any(words in text for words in OF_THREADS):
        # A thread's stack takes addresses, too, and that is the rarer limit to be set.
        addresses = _limit("RLIMIT_AS", "KiB of addresses: ulimit -v", 1024)
        return addresses or _limit("RLIMIT_NPROC", "processes and threads: ulimit -u", 1)
    is_runtime = isinstance(error, RuntimeError) and any(words in text for words in OF_MEMORY)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or is_runtime:
        return _limit("RLIMIT_AS", "KiB of addresses: ulimit -v", 1024)
    if number in (errno.EMFILE, errno.ENFILE):
        return _limit("RLIMIT_NOFILE", "open files: ulimit -n", 1)
    if number == errno.EFBIG:
        return _limit("RLIMIT_FSIZE", "KiB a file: ulimit -f", 1024)
    return ""


def leave_stdout() -> None:
    """Have what is still to be printed go nowhere: at exit Python would try, and complain, again.

    The descriptor of a stdout that a program has put in its place is left as it is.
    """
    with suppress(OSError, ValueError, AttributeError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _limit(name: str, unit: str, size: int) -> str:
    with suppress(ImportError, AttributeError):  # not on every system
        import resource

        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            return f"this process may have {soft // size} {unit}"
    return ""
