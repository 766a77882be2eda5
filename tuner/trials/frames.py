"""What a trial's child tells its parent, on a descriptor that anybody in the child may write to.

A message is a line: a digest, a space, and JSON of the message's number and itself. The digest is
made of the JSON and a nonce that parent and child share, so whatever else is written to the
descriptor cannot pass for a message, and what tears one apart loses that one alone. JSON as it is
written here has no line feed; one stands before a message, too, and ends what another has begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from typing import Any

CANNOT_TELL = 74
"""Exit code of a child that has lost the descriptor for results."""
MOST_NBYTES = 1 << 20
"""Of a line: what goes on for longer is no message. A traceback is cut to some thousand letters."""
_RETRY_SECONDS = 0.005
"""Between two tries on a descriptor that somebody has made non-blocking."""


class DescriptorLostError(OSError):
    """The descriptor for results is closed, or is another file by now."""


class FrameWriter:
    """Writes messages to ``descriptor``.

    Thread rules: any thread of the process that made it. A forked copy of that process that sends
    is ended on the spot: it is no trial of its own.
    """

    def __init__(self, descriptor: int, nonce: str) -> None:
        self._descriptor = descriptor
        self._nonce = nonce
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
            self._write(pack_frame(self._nonce, self._number, message))

    def _write(self, frame: bytes) -> None:
        while frame:
            try:
                # Numbers of closed descriptors are dealt out again: never write to another's file.
                if _identity(self._descriptor) != self._identity:
                    raise OSError("is another file")
                frame = frame[os.write(self._descriptor, frame) :]
            except BlockingIOError:
                time.sleep(_RETRY_SECONDS)
            except OSError as error:
                raise DescriptorLostError(f"the descriptor for results: {error}") from error


class FrameReader:
    """Finds the messages in what comes from a descriptor. Holds MOST_NBYTES at the most."""

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce
        self._begun = b""
        self._last = 0
        self.garbage = 0
        """Bytes so far that were no part of a message, what a message has begun with among them."""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes, each once and in the order they were sent."""
        self.garbage += len(data)
        *lines, begun = (self._begun + data).split(b"\n")
        self._begun = begun if len(begun) <= MOST_NBYTES else b""
        messages = []
        for line in lines:
            digest, _, payload = line.partition(b" ")
            if digest != _digest(self._nonce, payload):
                continue
            number, message = json.loads(payload)
            if number > self._last:  # else a copy of one that was read
                self._last = number
                self.garbage -= len(line) + 2
                messages.append(message)
        return messages


def pack_frame(nonce: str, number: int, message: dict[str, Any]) -> bytes:
    """A message as it is sent; ``number`` counts messages from 1."""
    payload = json.dumps([number, message]).encode()
    return b"\n%b %b\n" % (_digest(nonce, payload), payload)


def _digest(nonce: str, payload: bytes) -> bytes:
    return hashlib.blake2b(nonce.encode() + payload, digest_size=16).hexdigest().encode()


def _identity(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino
