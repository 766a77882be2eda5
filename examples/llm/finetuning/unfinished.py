"""The folder of a run that is not over, and its end: OUT is there when all of it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .samples import Sample

RECORD, ADAPTER = "finetune.json", "adapter"
CHECKPOINTS = "checkpoint-*/trainer_state.json"
"""Of which the trainer writes this file last."""


class Unfinished:
    """OUT.partial: the trainer's checkpoints, and what they are of.

    Thread rules: one thread, one process for each OUT.
    """

    def __init__(self, out: Path) -> None:
        """ValueError if ``out`` is there already, or has no folder to be in."""
        if out.exists() or out.is_symlink():
            raise ValueError(f"{out}: exists")
        if not out.parent.is_dir():
            raise ValueError(f"{out.parent}: no such directory")
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")

    def begin(self, record: Mapping[str, Any], *, anew: bool = False) -> None:
        """Make the folder, or find it as a run of the same record has left it. ValueError, naming
        what differs, if there is something to go on from, and it is another's. ``anew``: what is
        left there goes."""
        place = self.folder / RECORD
        if self.folder.exists():
            try:
                found = json.loads(place.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.folder}: exists, and no run has left it") from error
            if not anew and any(self.folder.glob(CHECKPOINTS)):
                self._compare(found, record)
                return
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        place.write_text(json.dumps(record))

    def _compare(self, found: Any, record: Mapping[str, Any]) -> None:
        of = json.loads(json.dumps(record))
        differs = [
            name for name in of if not isinstance(found, dict) or found.get(name) != of[name]
        ]
        if differs:
            raise ValueError(
                f"{self.folder}: left by a run with other {', '.join(differs)}: "
                "--restart removes it and begins anew"
            )

    def give_up(self) -> bool:
        """A run has ended early: whether there is something to go on from, which stays."""
        kept = any(self.folder.glob(CHECKPOINTS))
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        return kept

    def last_checkpoint(self) -> str | None:
        """The last one that was written to its end."""
        found = {
            int(path.parent.name.rpartition("-")[2]): path.parent
            for path in self.folder.glob(CHECKPOINTS)
        }
        return str(found[max(found)]) if found else None

    def finish(self, model: Any) -> None:
        """Save the adapter of a model of peft's, under its own name when it is whole; the rest
        goes."""
        made = self.folder / ADAPTER
        shutil.rmtree(made, ignore_errors=True)
        model.save_pretrained(made, save_embedding_layers=False)
        made.rename(self.out)
        shutil.rmtree(self.folder)


def digest(samples: Sequence[Sample]) -> str:
    """What rows are, in a few letters."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps(sample).encode())
    return found.hexdigest()[:16]
