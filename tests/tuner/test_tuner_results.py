"""The results file: torn at every byte, shared by tunes, locked."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tried import tried

from layer_streamer import ConfigError
from layer_streamer.tuner.results import HEAD, Result, ResultsFile
from layer_streamer.tuner.trials.record import Ending, TrialLimits, TrialRecord

LIMITS = TrialLimits(best_seconds=2.0, margin=0.1)


def record(number: int, **more: Any) -> TrialRecord:
    return TrialRecord(
        settings={"n_gpu": number, "n_cpu": 0, "read_mode": "direct"},
        ending="ok",
        run_seconds=(1.5, 1.25 + number),
        step_bytes={"read": 10**12},
        detail='a "line"\nand\u2028another',
        **more,
    )


def write(path: Path, count: int, fingerprint: str = "f") -> None:
    file = ResultsFile(path, fingerprint, {"machine": "this"})
    for number in range(count):
        file.append(record(number), LIMITS)
    file.close()


def read(path: Path, fingerprint: str = "f") -> list[Result]:
    file = ResultsFile(path, fingerprint, {})
    file.close()
    return file.results


def test_what_was_written_is_read_again_field_by_field(tmp_path: Path) -> None:
    write(tmp_path / "r", 3)
    assert read(tmp_path / "r") == [Result(record(number), LIMITS) for number in range(3)]


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_torn_at_any_byte_keeps_all_whole_lines_and_can_be_continued(
    tmp_path: Path, stride: int
) -> None:
    path = tmp_path / "r"
    write(path, 2)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    around = {end + off for end in [0, *ends] for off in range(-2, 3)} & set(range(len(whole) + 1))
    for cut in sorted({*range(0, len(whole), stride), *around}):
        path.write_bytes(whole[:cut])
        # A line is there once its last brace is; the line's end can be missing.
        num_lines = sum(cut >= end - 1 for end in ends)
        expected = [Result(record(number), LIMITS) for number in range(max(num_lines - 1, 0))]
        assert read(path) == expected, cut
        write(path, 1)
        assert read(path) == [*expected, Result(record(0), LIMITS)], cut
        assert all(json.loads(line) for line in path.read_text().splitlines()), cut


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=40).filter(lambda b: b"\n" not in b), where=st.integers(1, 3))
def test_a_line_that_is_none_of_ours_costs_that_line_alone(
    tmp_path: Path, junk: bytes, where: int
) -> None:
    path = tmp_path / "r"
    path.unlink(missing_ok=True)
    write(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(where, junk + b"\n")
    path.write_bytes(b"".join(lines))
    assert [result.record for result in read(path)] == [record(0), record(1)]


def test_tunes_of_other_fingerprints_share_a_file_and_see_only_their_own(tmp_path: Path) -> None:
    write(tmp_path / "r", 2, "one")
    write(tmp_path / "r", 1, "other")
    write(tmp_path / "r", 1, "one")
    assert len(read(tmp_path / "r", "one")) == 3
    assert len(read(tmp_path / "r", "other")) == 1
    descriptions = [line for line in (tmp_path / "r").read_text().splitlines() if '"of"' in line]
    assert len(descriptions) == 2


def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(ConfigError, match=r"notes\.txt: is there and is no file of results"):
        read(path)
    assert path.read_text() == "dear diary"


def test_two_tunes_cannot_have_one_file(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r", "f", {})
    with pytest.raises(ConfigError, match="another tune is using it"):
        ResultsFile(tmp_path / "r", "g", {})
    file.close()
    file.close()
    ResultsFile(tmp_path / "r", "g", {}).close()


def test_a_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"results_path={tmp_path}: Is a directory"):
        ResultsFile(tmp_path, "f", {})


@pytest.mark.parametrize(
    ("ending", "then", "now", "holds"),
    [
        ("timed out", {"trial_seconds": 5.0}, {"trial_seconds": 600.0}, False),
        ("timed out", {"trial_seconds": 600.0}, {"trial_seconds": 5.0}, True),
        ("hung", {"hang_seconds": 5.0}, {"hang_seconds": 6.0}, False),
        ("out of memory", {"max_host_bytes": 10}, {}, False),
        ("out of memory", {"max_host_bytes": 10}, {"max_host_bytes": 20}, False),
        ("out of memory", {"max_host_bytes": 10}, {"max_host_bytes": 5}, True),
        ("out of memory", {}, {"max_host_bytes": 5}, True),
        ("exception", {}, {"max_host_bytes": 5}, True),
    ],
)
def test_a_failure_holds_only_under_limits_that_are_no_wider(
    ending: Ending, then: dict[str, Any], now: dict[str, Any], holds: bool
) -> None:
    result = Result(TrialRecord(settings={}, ending=ending), TrialLimits(**then))
    assert result.holds_under(TrialLimits(**now)) is holds


def test_a_slower_trial_says_what_it_took_at_least() -> None:
    result = Result(TrialRecord(settings={}, ending="slower"), LIMITS)
    assert result.exceeded_seconds == pytest.approx(2.2)


def test_a_file_in_which_no_pool_is_null_still_counts(tmp_path: Path) -> None:
    write(tmp_path / "r", 2)
    (tmp_path / "r").write_text((tmp_path / "r").read_text().replace('"n_cpu": 0', '"n_cpu": null'))
    assert '"n_cpu": null' in (tmp_path / "r").read_text()
    assert read(tmp_path / "r") == [Result(record(number), LIMITS) for number in range(2)]


def lines_of_one_result(folder: Path) -> tuple[str, Any]:
    """The line that describes a tune, and the document of one that has a result."""
    (folder / "sample").unlink(missing_ok=True)
    write(folder / "sample", 1)
    first, second = (folder / "sample").read_text().splitlines()
    return first, json.loads(second)


@tried(40, 100, data=st.data())
def test_whatever_a_line_holds_the_others_are_read_and_what_is_taken_can_be_used(
    tmp_path: Path, data: st.DataObject
) -> None:
    first, document = lines_of_one_result(tmp_path)
    line = data.draw(damaged(document))
    path = tmp_path / "r"
    path.unlink(missing_ok=True)
    write(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n" + first.encode() + b"\n")
    write(path, 2)
    found = read(path)
    assert [result.record.settings["n_gpu"] for result in (found[0], *found[-2:])] == [0, 0, 1]
    for result in found:
        result.holds_under(LIMITS)
        assert math.isfinite(result.exceeded_seconds)
        assert result.record.seconds is None or 0 < result.record.seconds < math.inf
        json.dumps(asdict(result.record), allow_nan=False)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_a_path_that_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "results"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        else:
            path = Path("/dev/zero")
        with pytest.raises(ConfigError, match=f"results_path={path}: "):
            read(path)


def test_of_a_large_file_of_something_else_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    os.truncate(path, 1 << 40)  # more than any memory holds
    with pytest.raises(ConfigError, match="is no file of results"):
        read(path)
    path.write_bytes(HEAD.encode())
    os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match="is no file of results"):
        read(path)
    assert path.stat().st_size == 1 << 40


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = ResultsFile(tmp_path / "r", "f", {})
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'r'}'"):
        file.append(record(0), LIMITS)
    file.close()
