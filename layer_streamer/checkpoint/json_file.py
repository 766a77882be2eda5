"""The small JSON files beside a model's weights: read by one function, whatever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .foreign import HEAD_BYTES, JSON_BEGINS, foreign_file
from .header import MAX_HEADER_BYTES, open_header


def read_json(path: str | Path) -> Any:
    """What the JSON file at ``path`` holds: a model's config, its tokenizer's, and the like.

    UTF-8 with or without a byte order mark, or UTF-16. Errors: CheckpointError, in one line that
    names the file, if it cannot be opened, is larger than 100 MB, or is no JSON; it says what the
    file is instead, if that can be told (a Git LFS pointer, an HTML page).
    """
    path = Path(path)
    with open_header(path) as file:
        if file.size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {file.size} bytes, more than {MAX_HEADER_BYTES}")
        content = file.read(0, file.size)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        head = content[:HEAD_BYTES]
        # What begins like JSON is JSON with a fault in it.
        what = "" if JSON_BEGINS.match(head) else foreign_file(head, "", len(content))
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path}: not JSON: {what or reason}") from error
