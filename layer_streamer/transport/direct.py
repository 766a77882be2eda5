"""Direct reads: descriptors that bypass the page cache, where the file system allows them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..machine.descriptors import open_regular
from ..machine.libc import direct_alignment
from ..planning.layout import PAGE


def open_direct(path: Path) -> int:
    """A descriptor of ``path`` for page-aligned direct reads; OSError where that is refused."""
    if sys.platform != "linux":
        raise OSError("direct reads are implemented for Linux only")
    descriptor = open_regular(path, os.O_DIRECT)
    alignment = direct_alignment(descriptor)
    if alignment is not None and not 0 < alignment <= PAGE:
        os.close(descriptor)
        raise OSError(f"direct reads need an alignment of {alignment} bytes")
    return descriptor
