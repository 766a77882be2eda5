"""The report: a table that has all candidates, a frontier, a picture where there is matplotlib."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.tuner.report import Findings, frontier, is_wide, make_table, write_report
from layer_streamer.tuner.trials.record import TrialRecord

WELL = [
    TrialRecord(
        settings={"n_gpu": n, "read_mode": "direct"},
        ending="ok",
        run_seconds=(0.5 / n, 0.4 / n, 0.6 / n),
        peak_device_bytes=n << 30,
        peak_host_bytes=1 << 20,
    )
    for n in (1, 2, 4)
]
BAD = [
    TrialRecord(settings={"n_gpu": 8}, ending="exception", detail="a | b\nTraceback"),
    TrialRecord(settings={"n_gpu": 9}, ending="pruned", detail="x" * 500),
    TrialRecord(settings={}, ending="slower"),
]
FINDINGS = Findings("Tune of model", [*BAD, *WELL], WELL[2], 3)


def test_the_table_has_a_row_for_each_candidate_the_fastest_first() -> None:
    lines = make_table(FINDINGS).splitlines()
    rows = lines[lines.index("|---:|---:|---:|---:|---:|---|---|") + 1 :]
    assert len(rows) == 6
    assert all(row.count("|") == 8 for row in rows)
    assert rows[0].startswith("| 0.1250 | 0.1500, 0.1000 | +0.0% | 4.00 GiB | 1.00 MiB | ok |")
    assert [row.split(" | ")[2] for row in rows[:3]] == ["+0.0%", "+100.0%", "+300.0%"]
    assert "exception: a / b" in rows[3]
    assert max(map(len, rows)) < 300
    assert "Best: `n_gpu=4, read_mode='direct'`, 0.1250 s a run." in lines
    assert "3 candidates were not tried." in lines


def test_a_table_without_a_best_one_is_a_table() -> None:
    assert "Best" not in make_table(Findings("t", BAD, None, 0))


points = st.tuples(st.integers(0, 20).map(float), st.integers(0, 20).map(float))


@given(st.lists(points))
def test_the_frontier_is_what_no_other_point_beats(found: list[tuple[float, float]]) -> None:
    best = frontier(found)
    for nbytes, seconds in found:
        assert any(b <= nbytes and s <= seconds for b, s in best)
    for point in best:
        assert point in found
        assert not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in found
        )


@pytest.mark.parametrize(("times", "wide"), [([], False), ([1, 5], False), ([1, 3, 5.1], True)])
def test_times_that_are_far_apart_get_a_logarithmic_axis(times: list[float], wide: bool) -> None:
    records = [replace(WELL[0], run_seconds=(time,) * 3) for time in times]
    assert is_wide([*BAD, *records]) == wide


@pytest.mark.parametrize("findings", [FINDINGS, Findings("t", BAD, None, 0)])
def test_table_and_picture_are_written(tmp_path: Path, findings: Findings) -> None:
    table, picture = write_report(tmp_path / "new" / "folder", findings)
    assert table.read_text() == make_table(findings)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_written_and_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'layer-streamer\[report\]'.*tune\.md"):
        write_report(tmp_path, FINDINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["tune.md"]
