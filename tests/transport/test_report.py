"""The report of a pass, its table and its timeline."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import routes
import torch
from checkpoints import tiny_checkpoint
from disks import Disk, refuse
from hypothesis import given
from hypothesis import strategies as st
from routes import nothing
from support import make_device, open_checkpoint

from layer_streamer import LayerStreamer
from layer_streamer.assembly import rates_on_record
from layer_streamer.machine.identity import file_system, this_machine
from layer_streamer.machine.limits import (
    DeviceLimits,
    DiskPart,
    MachineLimits,
    MachinePart,
    ReadRate,
    SizeRate,
    ThreadRate,
)
from layer_streamer.planning.placement import Rates
from layer_streamer.transport import files
from layer_streamer.transport.clock import PassClock
from layer_streamer.transport.files import OpenFiles
from layer_streamer.transport.stats import PassReport, Span, report_step

NUM_LAYERS = 5


def step_of(*spans: tuple[float, float], nbytes: int = 10**9) -> Any:
    return report_step("copy", nbytes, [Span(i, *span) for i, span in enumerate(spans)])


def test_busy_time_counts_overlapping_layers_once() -> None:
    assert step_of((0.0, 2.0), (1.0, 3.0)).busy_seconds == 3.0


def test_stalled_time_is_the_gap_between_layers_since_the_pass_began() -> None:
    assert step_of((0.5, 1.0), (1.25, 2.0)).stalled_seconds == 0.75


def test_work_done_before_the_pass_began_is_busy_time_but_no_stall() -> None:
    step = step_of((-9.0, -8.0), (-2.0, -1.0), (0.25, 1.0))
    assert (step.busy_seconds, step.stalled_seconds) == (2.75, 0.25)


def test_on_a_device_that_is_behind_a_stall_counts_from_its_own_begin() -> None:
    spans = [Span(0, 3.0, 4.0), Span(1, 4.5, 5.0)]
    assert report_step("compute", 1, spans, begin=2.0).stalled_seconds == 1.5


def test_the_rate_is_bytes_over_busy_seconds() -> None:
    assert step_of((0.0, 0.5)).gb_per_s == 2.0
    assert step_of().gb_per_s == 0.0


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), max_size=8))
def test_busy_and_stalled_time_add_up_to_the_time_until_the_last_end(spans: Any) -> None:
    step = step_of(*((begin, begin + length) for begin, length in spans))
    last = max((begin + length for begin, length in spans), default=0.0)
    inside = step_of(*((max(b, 0.0), max(b + n, 0.0)) for b, n in spans)).busy_seconds
    assert inside + step.stalled_seconds == pytest.approx(max(last, 0.0))


def test_every_finished_pass_leaves_a_report_of_its_own(
    streamer: LayerStreamer, route: str
) -> None:
    assert streamer.last_pass is None
    tiers, layers = streamer.plan.tiers, streamer.manifest.layers
    seen = []
    for _ in range(4):
        streamer.run_pass(torch.zeros(1), nothing)
        report = streamer.last_pass
        assert isinstance(report, PassReport)
        seen.append(report)
        read = [i for i, tier in enumerate(tiers) if tier == "disk"]
        there = list(streamer.plan.host_layers)
        copied = [i for i, tier in enumerate(tiers) if tier != "device" and i not in there]
        computed = [i for i in range(routes.NUM_LAYERS) if i not in there]
        assert report.num_layers == len(layers)
        expected = {"read": read, "compute": computed, "host": there}
        if "cpu" not in route:
            expected["copy"] = copied
        for name, indices in expected.items():
            assert (name in report.steps) == bool(indices)
            if indices:
                step = report.steps[name]
                assert sorted(span.layer_idx for span in step.spans) == indices
                assert step.bytes >= sum(layers[i].nbytes for i in indices)
        assert report.bound_by in report.steps
        assert all(1 <= peak <= count for peak, count in report.peak_slots.values())
        assert all(s.begin <= s.end for step in report.steps.values() for s in step.spans)
    assert len({report.steps["compute"].spans for report in seen}) == 4


def test_a_pass_that_failed_leaves_the_report_of_the_one_before(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    with open_checkpoint(None, tmp_path) as streamer:
        streamer.run_pass(None, nothing)
        before = streamer.last_pass
        assert before is not None
        for _ in range(5):
            next(streamer.sweep())
        after = streamer.last_pass
        assert after is not None
        assert after.seconds == before.seconds
        assert after.steps["compute"].bytes == before.steps["compute"].bytes


def test_a_report_stays_right_while_more_slots_than_layers_run_ahead(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 1)
    with open_checkpoint(None, tmp_path, n_gpu=9) as streamer:
        for _ in range(30):
            streamer.run_pass(None, nothing)
            report = streamer.last_pass
            assert report is not None
            read, compute = report.steps["read"].spans[0], report.steps["compute"].spans[0]
            assert read.begin <= read.end <= compute.begin <= compute.end


def test_the_table_names_every_step_and_what_bounds_the_pass(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, num_shards=2, padding=1)
    with open_checkpoint(None, tmp_path) as streamer:
        streamer.run_pass(None, nothing)
        report = streamer.last_pass
        assert report is not None
        text = str(report)
        assert f"bound by {report.bound_by}" in text
        assert all(name in text for name in report.steps)
        assert "slots in use at most: device" in text


def test_the_timeline_is_chrome_trace_json_with_a_span_for_every_layer_of_every_step(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    target = tmp_path / "trace.json"
    with open_checkpoint(None, tmp_path) as streamer:
        streamer.run_pass(None, nothing)
        report = streamer.last_pass
        assert report is not None
        report.save_timeline(target)
        steps = len(report.steps)
    trace = json.loads(target.read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == steps * NUM_LAYERS
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in spans)
    rows = {event["tid"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {event["tid"] for event in spans} == rows
    assert [p.name for p in tmp_path.iterdir() if "trace" in p.name] == ["trace.json"]


def test_spans_on_one_row_of_the_timeline_never_overlap(tmp_path: Path) -> None:
    report = PassReport(
        seconds=1.0,
        num_layers=3,
        steps={"read": step_of((0.0, 2.0), (1.0, 3.0), (2.0, 4.0))},
        peak_slots={},
    )
    events: Any = report.timeline()["traceEvents"]
    rows: dict[int, list[Any]] = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    assert len(rows) == 2
    for row in rows.values():
        for left, right in pairwise(row):
            assert left["ts"] + left["dur"] <= right["ts"]


def test_track_progress_shows_a_bar_over_the_layers_on_stderr(tmp_path: Path, capsys: Any) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    with open_checkpoint(None, tmp_path, track_progress=True) as streamer:
        streamer.run_pass(None, nothing)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"/{NUM_LAYERS}" in printed.err
    assert "layer" in printed.err


def test_a_report_shows_the_share_of_a_limit_that_is_known() -> None:
    read, copy = step_of((0.0, 2.0), nbytes=10), step_of((0.0, 1.0), nbytes=10)
    report = PassReport(
        seconds=2.0,
        num_layers=1,
        steps={"read": replace(read, name="read"), "copy": replace(copy, name="copy")},
        peak_slots={},
        limits={"read": 10.0, "memcpy": 1.0},
    )
    assert report.share_of_limit("read") == pytest.approx(0.5)
    assert report.share_of_limit("copy") is None
    assert report.share_of_limit("memcpy") is None
    assert "(50% of the limit)" in str(report)
    assert str(report).count("of the limit") == 1


RATES = Rates(5.0, (7.0,), cold=4.0, cached=9.0)


@pytest.mark.parametrize(
    ("device", "mode", "cached", "expected"),
    [
        ("fake", "direct", 1.0, {"read": 5.0, "copy": 7.0}),
        ("fake", "buffered", 1.0, {"copy": 7.0}),
        ("fake", "buffered", 0.5, {"copy": 7.0}),
        ("fake", "buffered", 0.0, {"copy": 7.0}),
        ("cpu", "direct", 0.0, {"read": 5.0}),
        ("cpu", "buffered", 1.0, {}),
        ("cpu", "mapped", 1.0, {}),
    ],
)
def test_limits_on_record_of_the_way_that_is_taken_reach_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, mode: str, cached: float,
    expected: dict[str, float],
) -> None:  # fmt: skip
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    Disk(monkeypatch)  # direct reads are possible, wherever this runs
    monkeypatch.setattr("layer_streamer.assembly.rates_on_record", lambda limits, devices: RATES)
    monkeypatch.setattr(OpenFiles, "cached_share", lambda files, extents: cached)
    options: dict[str, Any] = {"n_cpu_pinned": 1, "read_mode": mode}
    with open_checkpoint(make_device(device), tmp_path, **options) as streamer:
        streamer.run_pass(None, nothing)
        assert streamer.last_pass is not None
        assert streamer.last_pass.limits == expected


@pytest.mark.parametrize("at", ["open", "read"])
def test_once_direct_reads_are_refused_their_limit_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    disk = Disk(monkeypatch)
    monkeypatch.setattr("layer_streamer.assembly.rates_on_record", lambda limits, devices: RATES)
    if at == "open":
        monkeypatch.setattr(files, "open_direct", lambda path: refuse())
    options: dict[str, Any] = {"n_cpu_pinned": 1, "read_mode": "direct"}
    with open_checkpoint(make_device("fake"), tmp_path, **options) as streamer:
        disk.read = lambda path, view, offset: refuse()
        streamer.run_pass(None, nothing)
        assert streamer.last_pass is not None
        assert streamer.last_pass.limits == {"copy": 7.0}


def test_limits_of_a_probe_are_taken_each_for_its_own_way(tmp_path: Path) -> None:
    device = DeviceLimits("cuda:0", True, (SizeRate(1, 52.0),), 10.0, 50.0)
    machine = MachinePart(this_machine(), "", False, (), (device,), None)
    reads = [("cold", 4, 6.0), ("direct", 4, 3.0), ("cold", 8, 7.0), ("direct", 1, 2.0)]
    rates = tuple(ReadRate(mode, threads, 1, rate) for mode, threads, rate in reads)
    part = DiskPart(file_system(tmp_path), "", "", False, rates, (ThreadRate(8, 20.0),))
    gpu: Any = SimpleNamespace(torch_device="cuda:0")
    found = rates_on_record(MachineLimits(machine, part), [gpu])
    expected = Rates(3.0, (52.0,), None, cold=7.0, cached=20.0, pageable=(10.0,), beside=(None,))
    assert found == expected
    other: Any = SimpleNamespace(torch_device="cuda:1")
    nothing_known = Rates(None, (None,), pageable=(None,), beside=(None,))
    assert rates_on_record(MachineLimits(machine, None), [other]) == nothing_known


@pytest.mark.parametrize("overtaken", [1, 10**9])
def test_a_report_is_of_one_pass_though_others_finish_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overtaken: int
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    report, made, inside = PassClock.report, list[PassReport](), list[int]()

    def slow(clock: PassClock) -> PassReport:
        """So slow that passes overtake it, until the thread that runs them is asked."""
        if not inside and len(made) < overtaken:
            inside.append(1)
            for _ in range(4):
                streamer.run_pass(None, nothing)
            inside.clear()
        made.append(report(clock))
        return made[-1]

    with open_checkpoint(None, tmp_path, n_gpu=0) as streamer:
        streamer.run_pass(None, nothing)
        monkeypatch.setattr(PassClock, "report", slow)
        found = streamer.last_pass
        monkeypatch.undo()
        assert found is not None and found is not made[0] and found.seconds > 0
        for step in found.steps.values():
            assert all(span.begin <= span.end for span in step.spans)
