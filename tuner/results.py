"""The results file: one JSON document a line, appended as trials end.

A line says which tune it belongs to (its fingerprint), so one file can hold several; it is written
with one call and synchronised, so that an interrupted tune loses no finished trial. A last line
that was torn is dropped. While a file is open, it is locked against other tunes.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..machine.atomic import naming
from ..machine.cache import cache_path
from ..machine.records import Form
from .search.space import name_absent_pools
from .trials.record import TrialLimits, TrialRecord

logger = logging.getLogger(__name__)

HEAD = '{"layer_streamer_tune": '
"""How every line begins: with its fingerprint."""
MOST_NBYTES = 256 << 20
"""Of a file of results, which has a kilobyte or two for each trial."""
# A line of a newer version may say more; no count and no time is below 0.
FORM = Form(lambda name, value: isinstance(value, str) or value >= 0, exact=False)


@dataclass(frozen=True, slots=True)
class Result:
    """A finished trial as it was put on record."""

    record: TrialRecord
    limits: TrialLimits

    def holds_under(self, limits: TrialLimits) -> bool:
        """True if the same trial would end the same with ``limits`` ("slower": see the race)."""
        then, ending = self.limits, self.record.ending
        if ending == "timed out":
            return limits.trial_seconds <= then.trial_seconds
        if ending == "hung":
            return limits.hang_seconds <= then.hang_seconds
        if ending == "out of memory" and then.max_host_bytes is not None:
            bound = limits.max_host_bytes
            return bound is not None and bound <= then.max_host_bytes
        return True

    @property
    def exceeded_seconds(self) -> float:
        """Of a trial that ended as "slower": what its run took at least."""
        best = self.limits.best_seconds
        return best * (1 + self.limits.margin) if best is not None else 0.0


class ResultsFile:
    """Results of one tune, in a file that is locked until :meth:`close`.

    Thread rules: one thread.
    """

    def __init__(self, path: Path, fingerprint: str, description: Mapping[str, Any]) -> None:
        """Open or create ``path``, repair its end, read what belongs to ``fingerprint``.

        ConfigError if it cannot be opened, is something else, or another tune has it.
        """
        self.path, self._fingerprint, self._description = path, fingerprint, dict(description)
        self.results: list[Result] = []
        self._is_new = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of a FIFO that nobody writes, opening would wait.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            self._handle = os.open(path, flags, 0o644)
        except OSError as error:
            raise ConfigError(f"results_path={path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                raise ConfigError(f"results_path={path}: is there and is no file of results")
            lock(self._handle, f"results_path={path}")
            self._read()
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, record: TrialRecord, limits: TrialLimits) -> None:
        """Put a finished trial on record, for good. OSError if it cannot be written."""
        if self._is_new:
            self._write({"of": self._description})
            self._is_new = False
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._write({"record": asdict(record), "limits": asdict(limits), "at": at})
        self.results.append(Result(record, limits))

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write(self, document: Mapping[str, Any]) -> None:
        rest = json.dumps(document)[1:]
        line = f"{HEAD}{json.dumps(self._fingerprint)}, {rest}\n".encode()
        with naming(self.path):
            while True:
                line = line[os.write(self._handle, line) :]
                if not line:
                    break
            os.fsync(self._handle)

    def _read(self) -> None:
        """Of a file that is something else, no more is read than what every line begins with."""
        head = HEAD.encode()
        with open(self._handle, "rb", closefd=False) as file:
            begin = file.read(len(head))
            is_other = begin != head[: len(begin)]
            if is_other or os.fstat(self._handle).st_size > MOST_NBYTES:
                raise ConfigError(f"results_path={self.path}: is there and is no file of results")
            content = begin + file.read()
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not self._take(line):
                logger.warning("%s:%d: not read, it is no result", self.path, number)
        if torn and self._take(torn):
            os.write(self._handle, b"\n")
        elif torn:
            logger.info("%s: a torn last line is dropped", self.path)
            os.ftruncate(self._handle, len(content) - len(torn))

    def _take(self, line: bytes) -> bool:
        """Read one line; False if it is none of ours, whatever the tune."""
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                return False
            fingerprint = document["layer_streamer_tune"]
            if fingerprint != self._fingerprint:
                return isinstance(fingerprint, str)
            self._is_new = False
            if "record" in document:
                self.results.append(parse_result(document))
        except (ValueError, KeyError, RecursionError):
            return False
        return True


def parse_result(document: Mapping[str, Any]) -> Result:
    """A line's result. ValueError or KeyError if it is none."""
    record = FORM.read(TrialRecord, document["record"], "record")
    limits = FORM.read(TrialLimits, document["limits"], "limits")
    if record.ending == "ok" and not (record.run_seconds and min(record.run_seconds) > 0):
        raise ValueError("no run")
    return Result(replace(record, settings=name_absent_pools(record.settings)), limits)


def lock(handle: int, what: str) -> None:
    """Lock an open file until it is closed; ConfigError if somebody has it."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{what}: another tune is using it") from None
    except OSError as error:
        # Some network file systems have no locks; a results file is better than none.
        logger.warning("%s: cannot be locked: %s", what, error.strerror)


def cache_folder() -> Path:
    """The tuner's folder in the user's cache directory, made. OSError: see cache_path."""
    return cache_path("tuner", make=True)
