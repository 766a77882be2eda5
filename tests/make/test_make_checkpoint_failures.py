"""Random checkpoints that are not made: all or nothing is there, and one line says why."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import make_checkpoint
import pytest
from assets import tiny_checkpoint, tiny_model
from fabricated import TINY, UNTIED, add_tiny_shapes, contents, main, make
from paths import PYTHONPATH
from random_values import RandomValues
from shapes import SHAPES, tensor_shapes
from shards import plan_shards


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    add_tiny_shapes(monkeypatch)


@pytest.fixture
def place(tmp_path):
    """An empty directory, for OUT."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refused(capsys, *arguments: object) -> str:
    """The one line that an error is."""
    capsys.readouterr()
    assert main(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def bar_that(monkeypatch, action) -> None:
    """``action(bytes written so far)`` is called at each progress, on the writer's thread."""

    class Bar(make_checkpoint.tqdm):
        written = 0

        def update(self, n=1):
            Bar.written += n
            action(Bar.written)

    monkeypatch.setattr(make_checkpoint, "tqdm", Bar)


@pytest.mark.parametrize("after", [0, 200_000, 390_000])
@pytest.mark.parametrize("shard_gb", [5, 1e-5])
def test_an_interrupt_of_a_writer_ends_with_130_and_leaves_nothing(
    place, capsys, monkeypatch, after, shard_gb
):
    def interrupt(written):
        if written > after:
            raise KeyboardInterrupt

    bar_that(monkeypatch, interrupt)
    assert main(place / "out", "--shape", UNTIED, "--shard-gb", shard_gb) == 130
    assert list(place.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("layer-streamer")
    ]


def interrupted_at_line(number: int, monkeypatch, *arguments: object) -> tuple[int, bool]:
    """Exit code of a run with SIGINT at that line that its main thread comes to; was there one?"""
    run, left = make_checkpoint.run, number

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename != make_checkpoint.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    def traced(args):
        sys.settrace(trace)
        try:
            run(args)
        finally:
            sys.settrace(None)

    with monkeypatch.context() as patch:
        patch.setattr(make_checkpoint, "run", traced)
        return main(*arguments), left <= 0


def test_after_an_interrupt_of_one_writer_the_others_stop_at_their_next_piece(place):
    calls = []

    def on_written(nbytes):
        calls.append(nbytes)
        if len(calls) == 1:
            raise KeyboardInterrupt
        assert writer._stopped.wait(60)

    shapes = dict(tensor_shapes(SHAPES[UNTIED]))
    shards = plan_shards(shapes, dtype="bfloat16", shard_nbytes=1e5)
    writer = make_checkpoint.Writer(RandomValues("bfloat16", 0, 1), on_written)
    with pytest.raises(KeyboardInterrupt):
        writer.write(place, shards)
    assert len(shards) > 4 and len(calls) <= make_checkpoint.NUM_WRITERS + 1


# At the line before the cleaning up, which a real signal cannot hit, tempfile's finalizer does it.
@pytest.mark.filterwarnings("ignore:.*finalize object.*")
def test_an_interrupt_at_any_line_leaves_all_or_nothing(place, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", lambda file: None)  # sixty runs would wait for the disk
    monkeypatch.setitem(SHAPES, UNTIED, SHAPES[UNTIED] | {"vocab_size": 50})
    options = ("--shape", UNTIED, "--layers", 1, "--shard-gb", 1e-4)
    complete = set(contents(make(place / "0", *options[2:])))
    number, fired, outcomes = 0, True, set()
    while fired:
        number += 1
        out = place / str(number)
        code, fired = interrupted_at_line(number, monkeypatch, out, *options)
        assert not list(place.glob(".*")), number
        assert not out.exists() or set(contents(out)) == complete, number
        outcomes.add((code, out.exists()))
    assert {(130, False), (0, True)} <= outcomes and number > 40


HELD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import make_checkpoint

class Bar(make_checkpoint.tqdm):
    def update(self, n=1):
        print("writing", flush=True)
        sys.stdin.read()

make_checkpoint.tqdm = Bar
make_checkpoint.SHAPES["tiny"] = make_checkpoint.SHAPES["llama3-8b"] | {TINY}
sys.exit(make_checkpoint.main(sys.argv[1:] + ["--shape", "tiny"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_file_ends_with_130_and_leaves_nothing(place, number):
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", HELD, str(place / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert list(place.rglob("model.safetensors"))
        process.send_signal(number)
        out, err = process.communicate()  # which lets the writer go on
    assert (process.returncode, out.replace(b"writing\n", b""), err.strip()) == (130, b"", b"")
    assert list(place.iterdir()) == []


def test_a_second_interrupt_does_not_stop_the_cleaning_up(place, monkeypatch):
    clean = tempfile.TemporaryDirectory.cleanup
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def cleanup(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        clean(self)

    def interrupt(written):
        raise KeyboardInterrupt

    bar_that(monkeypatch, interrupt)
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", cleanup)
    assert main(place / "out", "--shape", UNTIED) == 130
    assert list(place.iterdir()) == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_write_that_the_system_refuses_is_one_line_with_the_files_name(place, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = refused(capsys, place / "out", "--shape", UNTIED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "model.safetensors: File too large" in message
    assert list(place.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(place, capsys, monkeypatch):
    needed = sum(map(len, contents(make(place / "out", "--shard-gb", 1e-4)).values()))
    shutil.rmtree(place / "out")

    def with_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return (place / "out", "--shape", UNTIED, "--shard-gb", 1e-4)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", None)
        message = refused(capsys, *with_free(needed - 1))
    assert f"{place}/out: 0.00 GB needed, 0.00 GB free" in message
    assert main(*with_free(needed)) == 0


def test_the_message_on_room_has_both_numbers(place, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_340_000_000))
    message = refused(capsys, place / "out", "--shape", "qwen2.5-7b")
    assert message == f"error: {place}/out: 15.23 GB needed, 2.34 GB free\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-5"], "invalid choice: 'gpt-5'"),
        ([], "required: --shape"),
        (["--shape", UNTIED, "--layers", "0"], "--layers 0: must be from 1 to 1000"),
        (["--shape", UNTIED, "--layers", "1001"], "--layers 1001: must be from 1 to 1000"),
        (["--shape", UNTIED, "--layers", "x"], "--layers: invalid int value: 'x'"),
        (["--shape", UNTIED, "--shard-gb", "0"], "--shard-gb 0: must be above 0"),
        (["--shape", UNTIED, "--shard-gb", "nan"], "--shard-gb nan: must be above 0"),
        (["--shape", UNTIED, "--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--shape", UNTIED, "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line(place, capsys, arguments, message):
    assert message in refused(capsys, place / "out", *arguments)
    assert list(place.iterdir()) == []


def test_a_parent_that_is_not_there_is_named_and_not_made(place, capsys):
    assert f"{place}/no: " in refused(capsys, place / "no" / "out", "--shape", UNTIED)
    assert list(place.iterdir()) == []


def test_force_replaces_a_checkpoint_of_this_script_and_nothing_is_left_of_it(place):
    make(place / "out", "--shard-gb", 1e-4)
    make(place / "out", "--force", "--seed", 3)
    assert contents(place / "out") == contents(make(place / "other", "--seed", 3))
    assert names(place) == ["other", "out"]


def test_force_through_a_link_replaces_what_it_leads_to(place):
    make(place / "out")
    (place / "link").symlink_to("out")
    make(place / "link", "--force", "--seed", 3)
    assert (place / "link").is_symlink()
    assert json.loads((place / "out" / "config.json").read_text())["random_values"]["seed"] == 3


def test_force_fills_an_empty_directory(place):
    (place / "out").mkdir()
    make(place / "out", "--force")


@pytest.mark.parametrize("kind", ["empty", "own", "file", "dangling"])
def test_what_exists_is_not_replaced_without_force(place, capsys, kind):
    out = place / "out"
    if kind == "own":
        make(out)
    elif kind == "empty":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("out")  # to itself: there is no place that it leads to
    before = names(place)
    expected = "exists (--force" if out.is_dir() else "not a directory"
    assert f"{out}: {expected}" in refused(capsys, out, "--shape", UNTIED)
    assert names(place) == before


def foreign_file(out: Path) -> str:
    make(out)
    (out / "model-finetuned.safetensors").write_text("mine")
    return "has 'model-finetuned.safetensors', which this script did not write"


def foreign_directory(out: Path) -> str:
    make(out)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").mkdir()
    return "has 'model.safetensors', which this script did not write"


def real_model(out: Path) -> str:
    tiny_checkpoint(out, tiny_model())
    (out / "generation_config.json").unlink()
    return "config.json has no 'random_values'"


def broken_config(out: Path) -> str:
    make(out)
    (out / "config.json").write_text("[")
    return "config.json has no 'random_values'"


def plain_file(out: Path) -> str:
    out.write_text("mine")
    return "not a directory"


@pytest.mark.parametrize(
    "kind", [foreign_file, foreign_directory, real_model, broken_config, plain_file]
)
def test_force_does_not_replace_what_this_script_did_not_write(place, capsys, kind):
    message = kind(place / "out")
    before = sorted(place.rglob("*"))
    assert message in refused(capsys, place / "out", "--shape", UNTIED, "--force")
    assert sorted(place.rglob("*")) == before


def test_a_mount_point_is_refused(capsys):
    assert "/proc: a mount point" in refused(capsys, "/proc", "--shape", UNTIED, "--force")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_comes_to_the_place_in_the_meantime_is_kept(place, capsys, monkeypatch, force):
    def arrive(written):
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / "thesis.txt").write_text("mine")

    bar_that(monkeypatch, arrive)
    assert f"{place}/out: " in refused(capsys, place / "out", "--shape", UNTIED, *force)
    assert [path.name for path in place.rglob("*")] == ["out", "thesis.txt"]


def test_the_old_checkpoint_comes_back_if_the_new_cannot_get_its_name(place, capsys, monkeypatch):
    before = contents(make(place / "out"))
    rename = Path.rename

    def refuse(self, target):
        if self.name == "made":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    refused(capsys, place / "out", "--shape", UNTIED, "--force", "--seed", 3)
    assert contents(place / "out") == before
    assert names(place) == ["out"]
