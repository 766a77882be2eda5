"""API keys: where they come from, and how one is compared."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

ENVIRONMENT = "LAYER_STREAMER_API_KEY"
"""One key, or several with white space between."""
LEAST = 8
"""Characters of a key."""


class Keys:
    """Keeps digests alone."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """ValueError, which does not show it, for a key that is too short or could not be sent."""
        self._digests = []
        for number, key in enumerate(keys, 1):
            if len(key) < LEAST or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"API key {number}: must be at least {LEAST} characters of ASCII without spaces"
                )
            self._digests.append(_digest(key.encode("ascii")))

    @classmethod
    def read(cls, path: str | Path | None) -> Keys:
        """Those of a file, one a line (# begins a comment), and of the environment. ValueError,
        OSError in one line."""
        found = os.environ.get(ENVIRONMENT, "").split()
        if path is not None:
            lines = Path(path).expanduser().read_text("utf-8").splitlines()
            in_file = [line.strip() for line in lines if line.strip()]
            in_file = [line for line in in_file if not line.startswith("#")]
            if not in_file:
                raise ValueError(f"{path}: there is no API key in it")
            found += in_file
        return cls(dict.fromkeys(found))

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """Whose key the header has: a name that tells nothing of it; None if it is of nobody.

        ``Bearer KEY``, or ``Basic`` with the key for a password, as a browser asks for one. How
        long it takes does not go by what is wrong.
        """
        digest = _digest(_given(authorization))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given(authorization: str | None) -> bytes:
    """The key in a header; nothing if there is none."""
    scheme, _, rest = (authorization or "").strip().partition(" ")
    given = rest.strip().encode("utf-8", "replace")
    if scheme.lower() == "bearer":
        return given
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
