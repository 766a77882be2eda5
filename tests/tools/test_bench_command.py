"""``python -m layer_streamer bench``: figures, JSON, progress, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import one_torch_thread
from checkpoints import random_tensor, tiny_checkpoint, write_safetensors
from interpreters import COMMAND, Fork
from routes import RING
from support import make_device, open_checkpoint
from test_plan_command import BAD

from layer_streamer import LayerStreamer, read_manifest
from layer_streamer.__main__ import main
from layer_streamer.measuring import bench as bench_module
from layer_streamer.measuring import footprint
from layer_streamer.measuring.bench import Bench, Outcome, run_bench
from layer_streamer.measuring.limit_set import open_limits
from layer_streamer.measuring.probe_copy import RawCopies
from layer_streamer.measuring.rawspeed import Load, RawReads
from layer_streamer.planning.layout import Read

CPU = ["--device", "cpu"]
FEW = [*CPU, "--passes", "2"]
FIGURES = {
    "seconds_per_pass", "limit_seconds", "share_of_limit", "bound_by", "peak_device_bytes",
    "peak_host_bytes", "disk_bytes_per_pass",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_threads(tmp_path_factory: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("layer_streamer.measuring.rawspeed.READ_GRID", ((1, 8192), (2, 4096)))
    monkeypatch.setattr(bench_module, "MOST_TRIES", 1)  # small passes drift
    monkeypatch.setattr(bench_module, "REST_SECONDS", 0.01)
    with one_torch_thread():
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, 6, hidden=40)
    return tmp_path


def benched(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, Any]:
    """The table and the document."""
    assert main(["bench", *map(str, arguments)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return "\n".join(table), json.loads(last)


def test_the_last_line_is_json_with_every_figure(model: Path, capsys: Any) -> None:
    table, document = benched(capsys, model, *FEW, "--tokens", 2)
    assert set(document) >= FIGURES
    assert (document["path"], document["passes"]) == (str(model), 2)
    assert (document["tokens"], document["cold"]) == (2, False)
    assert len(document["pass_seconds"]) == 2
    assert {name: len(values) for name, values in document["limits"].items()} == {
        "compute": 3, "read": 3
    }  # fmt: skip
    assert document["bound_by"] in document["limits"]
    ((name, spread),) = document["comparisons"].items()
    assert len(spread) == 3 and f"{name} alone" in table
    assert min(document["pass_seconds"]) <= document["seconds_per_pass"]
    assert document["limit_seconds"] > 0
    assert len(document["shares"]) + document["dropped"] == 2
    assert document["peak_device_bytes"] == 0
    assert document["peak_host_bytes"] > 10 << 20
    assert f"{document['seconds_per_pass']:.4f} s a pass" in table
    assert f"bound by {document['bound_by']}" in table
    assert "pass of 6 layers" in table


def test_without_tokens_nothing_is_computed(model: Path, capsys: Any) -> None:
    _, document = benched(capsys, model, *FEW, "--tokens", 0)
    assert set(document["limits"]) == {"read"}
    assert document["bound_by"] == "read"


def test_with_everything_resident_and_no_tokens_there_is_no_limit(model: Path, capsys: Any) -> None:
    options = ["--tokens", 0, "--device-budget", "1GiB"]
    _, document = benched(capsys, model, *FEW, *options)
    assert (document["limits"], document["bound_by"]) == ({}, "none")
    assert document["comparisons"] == {}
    assert document["limit_seconds"] == document["share_of_limit"] == 0.0


@pytest.mark.parametrize(("cold", "discarded"), [([], 0), (["--cold"], 2)])
def test_a_cold_pass_begins_with_nothing_prefetched(
    model: Path, monkeypatch: Any, capsys: Any, cold: list[str], discarded: int
) -> None:
    times = []
    real = bench_module.discard_prefetched
    monkeypatch.setattr(
        bench_module, "discard_prefetched", lambda streamer: (times.append(1), real(streamer))
    )
    _, document = benched(capsys, model, *FEW, *cold)
    assert len(times) == discarded
    assert document["cold"] is bool(cold)


class Clock:
    """Stands for the module ``time``: seconds pass when they are slept or said to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_disk_rests_as_long_before_cold_passes_as_before_raw_reads(
    model: Path, monkeypatch: Any
) -> None:
    clock, rests, ended = Clock(), list[float](), [0.0]

    def read(raw: RawReads) -> float:
        rests.append(clock.now - ended[0])
        clock.sleep(5.0)
        ended[0] = clock.now
        return 5.0

    def run_pass(streamer: LayerStreamer, *args: Any) -> None:
        streamer_pass(streamer, *args)
        clock.sleep(7.0)
        ended[0] = clock.now

    def copy(copies: RawCopies) -> float:
        clock.sleep(0.25)
        return 0.25

    def discard(streamer: LayerStreamer) -> None:
        rests.append(clock.now - ended[0])

    streamer_pass = LayerStreamer.run_pass
    monkeypatch.setattr(LayerStreamer, "run_pass", run_pass)
    monkeypatch.setattr(RawReads, "seconds", read)
    monkeypatch.setattr(RawCopies, "seconds", copy)
    monkeypatch.setattr(bench_module, "discard_prefetched", discard)
    monkeypatch.setattr(bench_module, "time", clock)
    monkeypatch.setattr(bench_module, "REST_SECONDS", 1.0)
    monkeypatch.setattr(bench_module, "SETTLE_SECONDS", 0.0)
    run_bench(
        lambda: open_checkpoint(make_device("fake"), model, read_mode="direct", **RING),
        Bench(passes=2, tokens=1, cold=True),
    )
    assert rests[1:] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("mode", "direct"), [("direct", [True]), ("buffered", [False]), ("mapped", [])]
)
def test_the_raw_reads_are_of_the_kind_that_the_streamer_does(
    model: Path, monkeypatch: Any, capsys: Any, mode: str, direct: list[bool]
) -> None:
    kinds = []
    real = RawReads.__init__

    def begin(self: RawReads, manifest: Any, reads: Any, **options: Any) -> None:
        kinds.append(options["direct"])
        real(self, manifest, reads, **options)

    monkeypatch.setattr(RawReads, "__init__", begin)
    _, document = benched(capsys, model, *FEW, "--read-mode", mode, "--n-cpu", 1)
    # A CPU that takes mapped pages in may be faster than one that reads them: no limit then.
    assert kinds == direct
    assert ("read" in document["limits"]) is bool(direct)
    assert f"reads: {mode}: as asked" in document["plan"]


def test_several_devices_share_the_layers(model: Path, capsys: Any) -> None:
    _, document = benched(capsys, model, *FEW, *CPU)
    assert document["plan"].count("memory on cpu") == 2


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.int8, torch.bool, torch.float64])
def test_layers_of_any_dtype_are_benched(tmp_path: Path, capsys: Any, dtype: torch.dtype) -> None:
    tensors = {f"model.layers.{i}.w": random_tensor((9, 7), dtype, seed=i) for i in range(2)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    _, document = benched(capsys, tmp_path, *FEW)
    assert document["disk_bytes_per_pass"] is None or document["disk_bytes_per_pass"] >= 0


@pytest.mark.parametrize("text", [None, "", "read_bytes: many\n", "rchar: 5\n", "nonsense\n"])
def test_a_system_that_does_not_tell_what_came_from_disk_gives_no_figure(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "io").write_text(text)
    monkeypatch.setattr(footprint, "IO_COUNTERS", tmp_path / "io")
    table, document = benched(capsys, model, *CPU, "--passes", 1, "--tokens", 0)
    assert document["disk_bytes_per_pass"] is None
    assert "disk: unknown a pass" in table


def test_packed_layers_are_said_to_be_no_work_for_the_stand_in(tmp_path: Path, capsys: Any) -> None:
    packed = {f"model.layers.{i}.w": torch.zeros(64, 64, dtype=torch.uint8) for i in range(3)}
    write_safetensors(tmp_path / "model.safetensors", packed)
    assert main(["bench", str(tmp_path), *map(str, FEW)]) == 0
    assert "100% of the layers' bytes are packed" in capsys.readouterr().err


def test_bytes_from_disk_are_those_of_one_pass(model: Path, monkeypatch: Any, capsys: Any) -> None:
    counters = iter([1000, 1000 + 2 * 777])
    monkeypatch.setattr(bench_module, "bytes_from_disk", lambda: next(counters))
    _, document = benched(capsys, model, *FEW, "--tokens", 0)
    assert document["disk_bytes_per_pass"] == 777


def test_pairs_whose_limit_drifted_are_left_out() -> None:
    limits = {"a": [1.0, 1.0, 1.2, 1.2], "b": [0.5, 0.5, 0.5, 0.5]}
    shares, dropped = bench_module._pair([2.0, 2.0, 2.4], limits)
    assert (shares, dropped) == ([0.5, 0.5], 1)


def drifting_reads(monkeypatch: Any, seconds: list[float]) -> None:
    """Raw reads that take so long, one after the other."""
    taken = iter([s for s in seconds for _ in range(2)])  # the second of two counts
    monkeypatch.setattr(RawReads, "seconds", lambda self: next(taken))


def test_a_pass_whose_limit_drifted_is_followed_by_another(
    model: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(bench_module, "MOST_TRIES", 3)
    drifting_reads(monkeypatch, [1.0, 2.0, 2.0, 3.0, 3.0])
    _, document = benched(capsys, model, *FEW, "--tokens", 0)
    assert len(document["pass_seconds"]) == 4
    assert (len(document["shares"]), document["dropped"]) == (2, 2)
    assert document["shares"][0] == 2.0 / document["pass_seconds"][1]


def test_of_passes_that_drift_no_more_than_so_many_are_timed(
    model: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(bench_module, "MOST_TRIES", 3)
    drifting_reads(monkeypatch, [float(2**i) for i in range(7)])
    _, document = benched(capsys, model, *FEW, "--tokens", 0)
    assert (len(document["pass_seconds"]), document["dropped"]) == (6, 6)


@pytest.mark.parametrize(("options", "compared"), [({"n_cpu_pinned": 2}, True), (RING, False)])
def test_reads_into_as_much_memory_are_measured_where_there_are_pools_of_it(
    model: Path, options: dict[str, Any], compared: bool
) -> None:
    with ExitStack() as stack:
        streamer = stack.enter_context(
            open_checkpoint(make_device("fake"), model, read_mode="direct", **options)
        )
        limits, comparisons = open_limits(streamer, Load(0), stack, cold=True)
        assert set(limits) == {"copy", "read"}
        assert [bool(measure() > 0) for measure in comparisons.values()] == [True] * compared


def test_if_every_pair_drifted_the_share_is_of_all_together(
    model: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(bench_module, "_pair", lambda seconds, limits: ([], 2))
    _, document = benched(capsys, model, *FEW, "--tokens", 0)
    expected = document["limit_seconds"] / document["seconds_per_pass"]
    assert (document["share_of_limit"], document["dropped"]) == (expected, 2)


def test_progress_over_the_measurements_is_on_stderr_by_name(model: Path, capsys: Any) -> None:
    assert main(["bench", str(model), *FEW]) == 0
    printed = capsys.readouterr()
    for name in ("warming up", "alone: read", "alone: compute", "pass 1", "pass 2"):
        assert name in printed.err
        assert f"{name}:" not in printed.out
    # 3 preparations, 2 passes, 2 limits and 1 comparison before them and after each.
    assert "/14" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD,
        ([".", *CPU, "--passes", "0"], "passes=0: must be at least 1"),
        ([".", *CPU, "--tokens", "-1"], "tokens=-1: must be at least 0"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(
    model: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(model)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_file_that_changes_during_the_bench_is_an_error(
    model: Path, monkeypatch: Any, capsys: Any
) -> None:
    real = bench_module.discard_prefetched

    def change(streamer: Any) -> None:
        real(streamer)
        (model / "model.safetensors").write_bytes(b"gone")

    monkeypatch.setattr(bench_module, "discard_prefetched", change)
    assert main(["bench", str(model), *FEW, "--cold"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: " in printed.err.splitlines()[-1]
    assert "model.safetensors" in printed.err.splitlines()[-1]


@pytest.mark.parametrize("at", [0, 1, 3, 4, 9])
def test_an_interrupt_at_any_measurement_ends_with_130_and_prints_nothing(
    model: Path, monkeypatch: Any, capsys: Any, at: int
) -> None:
    from layer_streamer.measuring import bench

    real = bench.run_bench

    def run(open_streamer: Any, bench: Any, show: Any) -> Outcome:
        numbers = iter(range(100))

        def interrupted(name: str, total: int | None) -> None:
            show(name, total)
            if next(numbers) == at:
                raise KeyboardInterrupt

        return real(open_streamer, bench, interrupted)

    monkeypatch.setattr(bench, "run_bench", run)
    assert main(["bench", str(model), *FEW]) == 130
    assert capsys.readouterr().out == ""


def test_ctrl_c_in_the_terminal_ends_a_real_bench(model: Path) -> None:
    command = ["bench", model, *CPU, "--passes", "1000000", "--tokens", "0"]
    with Fork(COMMAND, *command) as running:
        said = b""
        while b"bytes from disk" not in said:
            more = running.stderr.read1()
            assert more, "it ended by itself"
            said += more
        running.send_signal(signal.SIGINT)
        done = running.wait()
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


def test_spread_reads_go_round_through_the_memory_that_was_said(model: Path) -> None:
    manifest = read_manifest(model)
    reads = [Read(next(iter(manifest.files)), 4096 * i, 0, 4096) for i in range(6)]
    with closing(RawReads(manifest, reads, direct=False, spread_nbytes=4 << 20)) as raw:
        raw.chunk, raw._slots = 4096, 6
        memory = raw._arena.memory
        memory.zero_()
        raw.seconds()
        beyond = raw.threads * raw.chunk
        assert not memory[beyond:].any()
        raw.spread_seconds()
        path = reads[0].path
        expected = path.read_bytes()[: 6 * 4096]
        assert bytes(memory[: len(expected)].numpy()) == expected
