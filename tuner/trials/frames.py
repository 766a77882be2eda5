"""What a trial's child tells its parent, on a descriptor that anybody in the child may write to.

A frame is a mark, a number and a length, a digest of these, JSON and a digest of it. Mark and
digests are made with a secret that parent and child share, so whatever else is written to the
descriptor cannot pass for a frame: the reader steps over it to the next mark. What tears a frame
apart loses that frame alone, and no length is believed that is not the writer's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from typing import Any

SECRET_NBYTES = 32
CANNOT_TELL = 74
"""Exit code of a child that has lost the descriptor for results."""
_DIGEST_NBYTES = 16
_NUMBERS = struct.Struct(">II")
HEAD_NBYTES = 2 * _DIGEST_NBYTES + _NUMBERS.size
_RETRY_SECONDS = 0.005
"""Between two tries on a descriptor that somebody has made non-blocking."""


class DescriptorLostError(OSError):
    """The descriptor for results is closed, or is another file by now."""


class FrameWriter:
    """Writes messages to ``descriptor``.

    Thread rules: any thread of the process that made it. A forked copy of that process that sends
    is ended on the spot: it is no trial of its own.
    """

    def __init__(self, descriptor: int, secret: bytes) -> None:
        self._descriptor = descriptor
        self._secret = secret
        self._number = 0
        self._process = os.getpid()
        self._identity = _identity(descriptor)
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message whole. DescriptorLostError if that is not possible any more."""
        if os.getpid() != self._process:
            os._exit(1)
        with self._lock:
            self._number += 1
            self._write(pack_frame(self._secret, self._number, json.dumps(message).encode()))

    def _write(self, packed: bytes) -> None:
        frame = memoryview(packed)
        while frame:
            try:
                # Numbers of closed descriptors are dealt out again: never write to another's file.
                if _identity(self._descriptor) != self._identity:
                    raise DescriptorLostError("the descriptor for results is another file")
                frame = frame[os.write(self._descriptor, frame) :]
            except BlockingIOError:
                time.sleep(_RETRY_SECONDS)
            except DescriptorLostError:
                raise
            except OSError as error:
                raise DescriptorLostError(f"the descriptor for results: {error}") from error


class FrameReader:
    """Finds the messages in what comes from a descriptor. Holds one message at the most."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._mark = _digest(secret, b"mark")
        self._buffer = bytearray()
        self._last = 0
        self.garbage = 0
        """Bytes so far that were no part of a message."""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes, each once and in the order they were sent."""
        self._buffer += data
        messages = []
        while self._find_mark() and len(self._buffer) >= HEAD_NBYTES:
            number, length = _NUMBERS.unpack_from(self._buffer, _DIGEST_NBYTES)
            end = HEAD_NBYTES + length
            torn = _head(self._secret, number, length) != self._buffer[:HEAD_NBYTES]
            if not torn and len(self._buffer) < end:
                break
            payload = bytes(self._buffer[HEAD_NBYTES:end][:-_DIGEST_NBYTES])
            if torn or pack_frame(self._secret, number, payload) != self._buffer[:end]:
                self._drop(1)  # another frame may begin within it
            elif number <= self._last:
                self._drop(end)  # a copy of one that was read
            else:
                del self._buffer[:end]
                self._last = number
                messages.append(json.loads(payload))
        return messages

    def _find_mark(self) -> bool:
        """Drop what stands before the next mark; False if there is none yet."""
        at = self._buffer.find(self._mark)
        # The end of the buffer may be the beginning of a mark.
        spare = max(0, len(self._buffer) - len(self._mark) + 1)
        self._drop(at if at >= 0 else spare)
        return at >= 0

    def _drop(self, nbytes: int) -> None:
        self.garbage += nbytes
        del self._buffer[:nbytes]


def pack_frame(secret: bytes, number: int, payload: bytes) -> bytes:
    """A message as it is sent; ``number`` counts messages from 1."""
    head = _head(secret, number, len(payload) + _DIGEST_NBYTES)
    return head + payload + _digest(secret, head + payload)


def _head(secret: bytes, number: int, length: int) -> bytes:
    numbers = _NUMBERS.pack(number, length)
    return _digest(secret, b"mark") + numbers + _digest(secret, numbers)


def _digest(secret: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=secret, digest_size=_DIGEST_NBYTES).digest()


def _identity(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino
