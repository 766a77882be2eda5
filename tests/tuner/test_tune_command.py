"""``layer-streamer tune``: what its options become, and the call that it prints."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from assets import tiny_checkpoint, tiny_model
from tuner_support import Marked, marked

from layer_streamer.llm import StreamingEngine
from layer_streamer.tools.cli import main
from layer_streamer.tools.tune_command import ENGINES, add_arguments, format_call, options_of

__all__ = ["marked"]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", *argv])


def test_the_printed_call_says_0_for_a_pool_that_is_not_there() -> None:
    assert format_call("a model", {"device": "cpu", "n_gpu": 2, "n_cpu_pinned": 0}) == (
        "streamer = LayerStreamer.from_checkpoint(\n"
        '    "a model",\n    device="cpu",\n    n_gpu=2,\n    n_cpu_pinned=0,\n)'
    )


def test_defaults_that_are_the_best_make_a_call_without_options() -> None:
    assert format_call("m", {}, ENGINES) == 'engine = StreamingEngine(\n    "m",\n)'


def test_the_streamers_options_reach_the_tuner_as_they_were_named() -> None:
    args = parse("--layer-pattern", "a.{i}.", "--tail", "x", "--tail", "y", "--device", "cpu")
    options = options_of(args)
    assert options == {
        "layer_pattern": "a.{i}.", "tail": ["x", "y"], "device": "cpu",
        "margin": 0.1, "cache": "warm",
    }  # fmt: skip


def test_the_engines_options_reach_the_tuner_and_are_refused_without_it() -> None:
    named = ("--prompt-tokens", "9", "--new-tokens", "3", "--max-length", "64")
    options = options_of(parse("--engine", *named))
    assert [options[name] for name in ("prompt_tokens", "new_tokens", "max_length")] == [9, 3, 64]
    with pytest.raises(ValueError, match=r"^--prompt-tokens: only with --engine or --modules$"):
        options_of(parse(*named))
    assert options_of(parse("--modules", *named[:4]))["prompt_tokens"] == 9
    with pytest.raises(ValueError, match=r"^--max-length: only with --engine$"):
        options_of(parse("--modules", *named))


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["tune", str(tmp_path / "nothing"), "--engine"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_call_that_is_printed_for_an_engine_opens_it(tmp_path: Path, marked: Marked) -> None:
    model = tiny_checkpoint(tmp_path / "model", tiny_model("llama"))
    done = subprocess.run(
        [
            sys.executable, "-m", "layer_streamer", "tune", str(model), "--engine",
            "--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "3", "--max-length", "64",
            "--n-gpu-values", "1", "--read-mode-values", "buffered", "--n-runs", "2",
            "--read-threads-values", "1", "--read-chunk-values", "none", "--n-cpu-values", "none",
        ],
        env=os.environ | marked.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "default settings: 0." in done.stderr
    assert "max_length=64,\n" in done.stdout
    names: dict[str, Any] = {"StreamingEngine": StreamingEngine}
    exec(done.stdout, names)
    names["engine"].close()
