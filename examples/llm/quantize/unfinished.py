"""OUT.partial: what an interrupted run leaves, and what the next one goes on with.

Nothing in it is taken for a model: the index and config.json come last, right before it gets the
name OUT. What a file holds depends on nothing but the options, so those are kept beside them, and a
run with others is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .shards import INDEX, TEMPORARY, Entry, as_json, is_whole, read_header, whole, write_shard

OPTIONS = "quantize-options.json"
RECORD = "quantize"
"""Under which key of a file's metadata is what belongs to it."""


class Unfinished:
    """The directory OUT.partial, which one process at a time may write.

    ValueError if OUT is there, if another process is at it, or if it was begun with other options.
    """

    def __init__(self, out: Path, names: list[str], options: Mapping[str, Any]) -> None:
        """``names``: of the files with tensors, all of them."""
        self._out, self._names = out, names
        self.path = out.with_name(out.name + ".partial")
        self._options = dict(options)
        self._descriptor = -1

    def __enter__(self) -> Unfinished:
        if os.path.lexists(self._out):
            raise ValueError(f"{self._out}: exists")
        self.path.mkdir(exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)  # and with it the lock

    @property
    def missing(self) -> list[str]:
        """Files that have not been written, neither now nor by an earlier run."""
        return [name for name in self._names if not is_whole(self.path / name)]

    def write(self, name: str, entries: Mapping[str, Entry], record: Mapping[str, Any]) -> None:
        """Write a file; ``record`` is kept with it."""
        write_shard(self.path / name, entries, {RECORD: json.dumps(record)})

    def record(self, name: str) -> dict[str, Any]:
        """What was kept with a file."""
        found: dict[str, Any] = json.loads(read_header(self.path / name)["__metadata__"][RECORD])
        return found

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add these files, config.json among them, and the index; then it is OUT.

        A run that was ended here may have left some of them: none is ever there in part.
        """
        for name, content in ({INDEX: self._index()} | dict(files)).items():
            with whole(self.path / name) as file:
                file.write(content)
        if os.path.lexists(self._out):
            raise ValueError(f"{self._out}: exists")
        self.path.rename(self._out)
        (self._out / OPTIONS).unlink(missing_ok=True)
        os.fsync(self._descriptor)

    def _begin(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is writing it") from None
        present = {path.name for path in self.path.iterdir()}
        for name in [name for name in present if name.endswith(TEMPORARY)]:
            (self.path / name).unlink()
            present.remove(name)
        if OPTIONS in present:
            self._compare(json.loads((self.path / OPTIONS).read_text(encoding="utf-8")))
        elif present:
            raise ValueError(f"{self.path}: has files, but no {OPTIONS}: nothing to go on with")
        else:
            temporary = self.path / (OPTIONS + TEMPORARY)
            temporary.write_bytes(as_json(self._options))
            temporary.replace(self.path / OPTIONS)

    def _compare(self, begun: Mapping[str, Any]) -> None:
        for key, value in self._options.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{self.path}: was begun with {key} {begun.get(key)!r}, not {value!r}: remove "
                    "it to begin anew, or name the same options to go on"
                )

    def _index(self) -> bytes:
        weight_map, total = {}, 0
        for name in self._names:
            for key, fields in read_header(self.path / name).items():
                if key != "__metadata__":
                    weight_map[key] = name
                    total += fields["data_offsets"][1] - fields["data_offsets"][0]
        return as_json({"metadata": {"total_size": total}, "weight_map": weight_map})
