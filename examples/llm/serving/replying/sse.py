"""Server-sent events: how a stream is written."""

from __future__ import annotations

import json
from typing import Any

PING = b": ping\n\n"
"""A comment, which clients skip: the connection is alive."""
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
"""Of a reply that nobody on the way is to keep or to hold back."""


def event(document: Any) -> bytes:
    """One event with a JSON document. In one line, and in ASCII: so no character can be cut in two,
    nor taken for the end of a line."""
    return b"data: " + to_json(document) + b"\n\n"


def to_json(document: Any) -> bytes:
    """Compact JSON in ASCII. ValueError for a number that JSON does not have."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
