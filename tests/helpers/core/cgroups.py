"""A real limit on memory, where one can be set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layer_streamer.machine import hostmem

V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
"""Files of a cgroup: limit and usage."""


@contextmanager
def real_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup of ``limit`` bytes below our own; skips the test where there can be none."""
    own = next(
        (f for f in hostmem._cgroups() if f.is_dir() and (f / "cgroup.procs").exists()), None
    )
    if own is None:
        pytest.skip("this process is in no cgroup that can be seen")
    folder = own / f"layer-streamer-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made below {own}: {error.strerror}")
    try:
        names = [name for name in (V1[0], V2[0]) if (folder / name).exists()]
        if not names:
            pytest.skip(f"cgroups below {own} have no memory controller")
        (folder / names[0]).write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()
