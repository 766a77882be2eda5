"""The errors that layer_streamer raises: all of them are StreamerErrors.

::

    StreamerError (RuntimeError)
    |-- CheckpointError (also ValueError)  a checkpoint's files contradict their format
    |   `-- CheckpointChangedError         a file changed or shrank after it was opened
    |-- ReadError                          reading a layer's bytes failed
    |-- TuneError                          no candidate of a tune gave a result
    |-- ConfigError (also ValueError)      an option that cannot work: field, value, bound
    |-- SupersededError                    a sweep was overtaken by a newer pass
    `-- ClosedError                        the streamer was closed (or belongs to another process)

What Python itself raises for a call that no function takes (TypeError for an unknown keyword or
for a change of read-only weights) stays what it is.
"""


def printable(text: str) -> str:
    """``text`` as one line that a terminal can show: what would move a cursor, end the line, or
    cannot be encoded (a byte of a file's name that is no UTF-8) is written as an escape.

    For every name that comes from a file or a path, wherever people see it.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class StreamerError(RuntimeError):
    """Root of every error that this library raises on purpose. Its text is :func:`printable`,
    whatever names of files and tensors are in it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class CheckpointError(StreamerError, ValueError):
    """A checkpoint's file is malformed, incomplete or contradicts another; names the file."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint's file is no longer what it was when the streamer opened it."""


class ReadError(StreamerError):
    """Reading a layer's bytes failed; names file, layer and byte range."""


class TuneError(StreamerError):
    """A tune found no settings: says how its candidates ended."""


class SupersededError(StreamerError):
    """This sweep was overtaken by a newer pass on the same streamer."""


class ClosedError(StreamerError):
    """The streamer is closed, or was opened in another process."""


class ConfigError(StreamerError, ValueError):
    """An option cannot work; names the field, the value and the bound."""
