"""quantize.py interrupted, killed, refused by the disk, and started again."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from gguf_models import write_gguf
from paths import PYTHONPATH, ROOT
from quantizing import contents, interrupt_at, run
from zoo import zoo_model

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.quantize import shards
from layer_streamer.llm.quantize.unfinished import INDEX, OPTIONS, Unfinished

OPTS = ("--bits", 4, "--dtype", "float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with a tokenizer, a text, and what an uninterrupted run makes of them."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        write_gguf(place / "a.gguf", zoo_model("llama"), tokenizer=True)
        (place / "text").write_text("a ship that sees the light turns away from the rocks " * 4)
        yield place


@pytest.fixture(scope="module", params=["plain", "calibrated"])
def case(request, made):
    """Arguments of a run, and the files that it makes if nobody disturbs it."""
    calibrate = () if request.param == "plain" else ("--calibrate", made / "text")
    arguments = (*OPTS, *calibrate)
    out = made / request.param
    assert run(made / "a.gguf", out, *arguments) == 0
    return made / "a.gguf", arguments, contents(out)


def looks_unfinished(out) -> bool:
    """True if there is nothing at OUT, and what is beside it is not taken for a model."""
    partial = out.with_name(out.name + ".partial")
    if out.exists() or (partial / "config.json").exists() or (partial / INDEX).exists():
        return False
    if partial.exists():
        with pytest.raises(ValueError, match=r"no config\.json"):
            load_config(partial)
    return True


def some_of(numbers, count):
    """Every so many-th is quick enough for always."""
    return [pytest.param(n, marks=[] if n % count == 1 else pytest.mark.slow) for n in numbers]


@pytest.mark.parametrize("number", some_of(range(1, 6), 2))
def test_an_interrupted_run_is_gone_on_with_at_every_file(
    case, tmp_path, monkeypatch, capsys, number
):
    source, arguments, expected = case
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, number)
        assert run(source, out, *arguments) == 130
    assert looks_unfinished(out)
    done = contents(tmp_path / "out.partial")
    assert len(done) == number  # the files before, and the options
    assert not [name for name in done if name.endswith(shards.TEMPORARY)]
    times = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in done}
    capsys.readouterr()
    assert run(source, out, *arguments) == 0
    said = capsys.readouterr().err
    assert ("going on: " in said) == (number > 2)
    assert contents(out) == expected
    for name in set(done) - {OPTIONS}:
        assert (out / name).stat().st_mtime_ns == times[name]  # nothing is done twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupt_at_any_line_leaves_all_or_nothing_that_looks_finished(case, tmp_path):
    source, arguments, expected = case
    folder, outcomes = str(ROOT / "layer_streamer" / "llm" / "quantize"), set()
    for number in (1, 30, 200, 700, 1500, 2600, 100_000):
        out, left = tmp_path / str(number), number

        def trace(frame, event, arg):
            nonlocal left
            if not frame.f_code.co_filename.startswith(folder):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            code = run(source, out, *arguments)
        finally:
            sys.settrace(None)
        assert code == 130 or left > 0
        assert looks_unfinished(out) or contents(out) == expected, number
        if not out.exists():
            assert run(source, out, *arguments) == 0
        assert contents(out) == expected, number
        outcomes.add(code)
    assert outcomes == {0, 130}


@pytest.mark.parametrize("number", some_of(range(1, 8), 3))
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    case, tmp_path, monkeypatch, capsys, number
):
    source, arguments, expected = case
    left, fsync = number, os.fsync

    def sync(file):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        assert run(source, tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {tmp_path / 'out.partial'}: No space left on device"
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", *arguments) == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 8, "--dtype", "float32"), "was begun with bits 4, not 8"),
        ((*OPTS, "--group", 32), "was begun with groups {'self_attn.q_proj': 64"),
        (("--bits", 4), "was begun with dtype 'float32', not 'bfloat16'"),
        ((*OPTS, "--calibrate", "text"), "was begun with calibration 'none', not '"),
    ],
)
def test_other_options_do_not_go_on_with_it(
    made, tmp_path, monkeypatch, capsys, arguments, message
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(made / "a.gguf", out, *OPTS) == 130
    before = contents(tmp_path / "out.partial")
    monkeypatch.chdir(made)
    assert run(made / "a.gguf", out, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path / "out.partial") == before and not out.exists()


def test_another_source_does_not_go_on_with_it(made, tmp_path, monkeypatch, capsys):
    source = tmp_path / "a.gguf"
    source.write_bytes((made / "a.gguf").read_bytes())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(source, tmp_path / "out", *OPTS) == 130
    os.utime(source, ns=(1, 1))
    assert run(source, tmp_path / "out", *OPTS) == 2
    assert "was begun with source {'a.gguf': [" in capsys.readouterr().err


def test_a_file_that_lost_its_end_is_made_anew(made, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert run(made / "a.gguf", out, *OPTS) == 130
    name = sorted(partial.glob("*.safetensors"))[1]
    whole = name.read_bytes()
    name.write_bytes(whole[:-1])
    assert run(made / "a.gguf", out, *OPTS) == 0
    assert (out / name.name).read_bytes() == whole


def test_two_processes_do_not_write_one_model(made, tmp_path, capsys):
    options = {"bits": 4}
    with Unfinished(tmp_path / "out", [], options):
        assert run(made / "a.gguf", tmp_path / "out", *OPTS) == 2
    assert "out.partial: another process is writing it" in capsys.readouterr().err


def test_what_somebody_else_made_is_left_alone(made, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    assert run(made / "a.gguf", tmp_path / "out", *OPTS) == 2
    assert f"has files, but no {OPTIONS}" in capsys.readouterr().err
    assert contents(tmp_path / "out.partial") == {"mine": b"x"}
    (tmp_path / "there").mkdir()
    assert run(made / "a.gguf", tmp_path / "there", *OPTS) == 2
    assert "there: exists" in capsys.readouterr().err


KILLED = """
import os, random, signal, sys
from pathlib import Path
from layer_streamer.tools import cli
from quantizing import contents
from layer_streamer.llm.quantize.unfinished import OPTIONS

source, place, *arguments = sys.argv[1:]
place, generator, ended = Path(place), random.Random(0), []
run = lambda out: cli.main(["quantize", source, str(out), *arguments, "--device", "cpu"])
assert run(place / "whole") == 0  # which imports everything
expected = contents(place / "whole")
out, partial = place / "out", place / "out.partial"
for _ in range(60):
    child = os.fork()
    if child == 0:  # the system ends it after so much of the processor's time
        signal.setitimer(signal.ITIMER_PROF, generator.uniform(0.001, 0.06))
        os._exit(run(out))
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    # One that was ended between its last rename and its exit leaves a finished model as well.
    assert out.exists() or ended[-1] != 0, ended
    found = contents(partial) if partial.exists() else {}
    assert "config.json" not in found or expected.items() <= found.items(), sorted(found)
    if out.exists():
        left = contents(out)
        if ended[-1]:
            left.pop(OPTIONS, None)  # which is deleted last of all
        assert left == expected, (ended, left.keys() ^ expected.keys())
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
print(ended.count(-signal.SIGPROF), ended.count(0))
"""


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_are_gone_on_with(case, tmp_path):
    source, arguments, _ = case
    command = [sys.executable, "-c", KILLED, source, tmp_path, *arguments]
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    kills, finished = map(int, result.stdout.splitlines()[-1].split())
    assert kills > 10 and finished > 2


def test_options_are_kept_as_json_that_says_them(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run(made / "a.gguf", tmp_path / "out", *OPTS) == 130
    kept = json.loads((tmp_path / "out.partial" / OPTIONS).read_text())
    assert (kept["bits"], kept["dtype"], kept["calibration"]) == (4, "float32", "none")
