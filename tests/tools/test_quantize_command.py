"""The command line of quantize.py: what it says, and what it refuses in one line."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from gguf_models import write_gguf
from paths import PYTHONPATH
from quantizing import contents, run, save
from zoo import zoo_model

TEXT = "the keeper of the light climbs up the stairs each night, and each night it burns. " * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer, and texts."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        write_gguf(place / "a.gguf", zoo_model("llama"), tokenizer=True)
        save(place / "bare", zoo_model("llama"))
        (place / "text").write_text(TEXT)
        (place / "empty").write_text("")
        (place / "latin").write_bytes("caf\xe9".encode("latin-1"))
        (place / "made").mkdir()
        patch.chdir(place)
        yield place


def refused(capsys, *arguments: object) -> str:
    """The one line that an error is."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.gguf", "out"), "--bits"),
        (("a.gguf", "out", "--bits", 3), "--bits: invalid choice: "),
        (("a.gguf", "out", "--bits", 4, "--group", 16), "--group: invalid choice: '16'"),
        (("a.gguf", "out", "--bits", 4, "--group", 128), "--group 128: does not divide the width"),
        (("a.gguf", "out", "--bits", 4, "--group", 64), "--group 32 divides all widths"),
        (("a.gguf", "out", "--bits", 4, "--tokens", 1), "--tokens 1: must be at least 2"),
        (("a.gguf", "out", "--bits", 4, "--calibrate", "no"), "no: No such file or directory"),
        (("a.gguf", "out", "--bits", 4, "--calibrate", "latin"), "latin: not UTF-8"),
        (("a.gguf", "out", "--bits", 4, "--calibrate", "empty"), "empty: 0 tokens, at least 2"),
        (("a.gguf", "out", "--bits", 4, "--text", "empty"), "empty: 0 tokens, at least 2"),
        (("a.gguf", "made", "--bits", 4), "made: exists"),
        (("a.gguf", "no/out", "--bits", 4), "no"),
        (("no.gguf", "out", "--bits", 4), "no.gguf: no such file"),
        (("bare", "out", "--bits", 4, "--calibrate", "text"), "no tokenizer"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_made(place, capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not list(place.glob("out*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named_with_their_file(tmp_path, capsys, value):
    model = zoo_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = value
    save(tmp_path / "in", model)
    said = refused(capsys, tmp_path / "in", tmp_path / "out", "--bits", 4)
    assert "tensor 'model.layers.1.mlp.up_proj.weight' has weights that are not finite" in said
    assert str(tmp_path / "in" / "model.safetensors") in said
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    save(tmp_path / "in", zoo_model("llama"))
    config = tmp_path / "in" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    assert "'mamba' is not supported" in refused(
        capsys, tmp_path / "in", tmp_path / "out", "--bits", 4
    )


def test_too_little_room_is_said_before_anything_is_written(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    said = refused(capsys, "a.gguf", tmp_path / "out", "--bits", 4)
    assert "GB needed, 0.00 GB free" in said
    assert list(tmp_path.iterdir()) == []


def test_errors_sizes_and_perplexities_are_told_at_the_end(place, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--calibrate", "text", "--text", "text", "--tokens", 100)
    assert run("a.gguf", out, "--bits", 8, *options) == 0
    printed, said = capsys.readouterr()
    assert printed == f"{out}\n"
    assert "text: 100 tokens to calibrate with\n" in said
    assert "groups: q_proj 64, k_proj 64, v_proj 64, o_proj 32, gate_proj 64" in said
    table = re.findall(r"^(\S+) +([\d,]+) +(\d*) +(0\.00\d+) +(\S+)$", said, re.MULTILINE)
    assert [line[0] for line in table][-1] == "all" and len(table) == 8
    counts = [int(line[1].replace(",", "")) for line in table]
    assert sum(counts[:-1]) == counts[-1] == 3 * (64 * (96 + 48 + 48) + 96 * 64 + 3 * 64 * 96)
    nbytes = sum(map(len, contents(out).values()))
    assert f"{nbytes / 1e9:.3f} GB after" in said
    found = re.search(r"text: perplexity (\S+) before, (\S+) after \((\S+)%\) on (\S+) tok", said)
    before, after, change, count = (float(value) for value in found.groups())
    assert after / before - 1 == pytest.approx(change / 100, abs=1e-3)
    assert abs(change) < 5 and count == len(TEXT)


def test_a_terminal_sees_a_progress_bar_with_the_time_left(place, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("a.gguf", tmp_path / "out", "--bits", 4) == 0
    assert re.search(r"\r +\d+%\|.*so far, \S+ left", terminal.getvalue())


@pytest.mark.slow
def test_the_script_runs_by_itself(place, tmp_path):
    command = [
        sys.executable,
        "-m",
        "layer_streamer",
        "quantize",
        "bare",
        str(tmp_path / "out"),
        "--bits",
        "4",
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )
    assert result.stdout == f"{tmp_path / 'out'}\n"


def test_a_polite_end_from_outside_is_an_interrupt(place, tmp_path, monkeypatch, capsys):
    before, fsync = signal.getsignal(signal.SIGTERM), os.fsync

    def sync(file):
        fsync(file)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", sync)
    assert run("a.gguf", tmp_path / "out", "--bits", 4) == 130
    printed, said = capsys.readouterr()
    assert printed == "" and f"{tmp_path / 'out.partial'} is kept: the same command" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
