"""The table of options: an option that is written there is everywhere, with its type and words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from interpreters import run_script
from paths import ROOT

from layer_streamer import LayerStreamer, LayerStreamerTuner, plan_checkpoint
from layer_streamer.checkpoint.manifest import manifest_from_tensor_info
from layer_streamer.planning.options import (
    OPTIONS,
    SEARCHED,
    FixedOptions,
    MoreOptions,
    Options,
    PoolOptions,
)  # fmt: skip
from layer_streamer.tuner.options import TuneKeywords, TuneOptions, TuneValues

TABLES = set(inspect.signature(manifest_from_tensor_info).parameters)
"""Of the published constructor."""
DOORS = [
    (LayerStreamer.from_checkpoint, Options, {"path"}),
    (plan_checkpoint, Options, {"path"}),
    (LayerStreamer, MoreOptions, {*TABLES, *PoolOptions.__annotations__, "track_progress"}),
]


@pytest.mark.parametrize(("door", "keywords", "own"), DOORS)
def test_a_signature_shows_the_tables_options_their_defaults_and_no_others(
    door: Callable[..., Any], keywords: Any, own: set[str]
) -> None:
    parameters = inspect.signature(door).parameters
    assert set(parameters) == {*keywords.__annotations__, *own}
    for name in keywords.__annotations__:
        assert parameters[name].default == OPTIONS[name].default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(("door", "keywords", "own"), DOORS)
def test_the_help_of_what_takes_options_says_what_each_does(
    door: Any, keywords: Any, own: set[str]
) -> None:
    text = " ".join(
        (inspect.getdoc(door.__init__ if inspect.isclass(door) else door) or "").split()
    )
    for name in keywords.__annotations__:
        assert f"`{name}`" in text
        assert OPTIONS[name].meaning in text


def test_the_published_constructor_refuses_what_from_checkpoint_alone_takes() -> None:
    tables: dict[str, Any] = dict.fromkeys(TABLES)
    with pytest.raises(TypeError, match="layer_pattern"):
        LayerStreamer(**tables, layer_pattern="blk.{i}.")


def test_the_keywords_that_the_tuner_has_types_for_are_those_that_it_takes() -> None:
    # Types of lists of values cannot be derived from those of the values: they are written there.
    tune = {field.name for field in fields(TuneOptions)}
    values = {f"{name}_values" for name in SEARCHED}
    fixed = {*FixedOptions.__annotations__, "device"}
    for door, keywords, own in (
        (LayerStreamerTuner, TuneValues, TABLES),
        (LayerStreamerTuner.from_checkpoint, TuneKeywords, {"path", "dtype", "layer_pattern"}),
    ):
        named = {*inspect.signature(door).parameters, *keywords.__annotations__} - {"options"}
        assert named == tune | values | fixed | own | {"setup_fn"}


EVERYWHERE = """
import argparse, importlib.util, inspect, sys
import layer_streamer.planning

spec = importlib.util.find_spec("layer_streamer.planning.options")
text = spec.loader.get_source(spec.name)
for before, new in (
    ("read_mode", 'new_one: Annotated[int | None, Option("what it means", "7", _number(1, 9))]'),
    ("reserve_bytes", 'same_one: Annotated[int | None, Option("the same", "1", _number(1, 9))]'),
):
    line = f"    {before}: Annotated["
    assert text.count(line) == 1
    text = text.replace(line, f"    {new}\\n{line}")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
exec(compile(text, spec.origin, "exec"), vars(module))

from layer_streamer import ConfigError, LayerStreamer, LayerStreamerTuner, plan_checkpoint
from layer_streamer.planning.settings import Settings
from layer_streamer.tools import bench_command, generate_command, plan_command, tune_command
from layer_streamer.tools.command import streamer_options

path, given = sys.argv[1], {"new_one": 3, "device": "cpu"}
for door in (LayerStreamer, LayerStreamer.from_checkpoint, plan_checkpoint):
    assert "new_one" in inspect.signature(door).parameters
assert "what it means" in LayerStreamer.from_checkpoint.__doc__

assert Settings(new_one=3).asked["new_one"] == 3
plan_checkpoint(path, **given)
with LayerStreamer.from_checkpoint(path, **given) as streamer:
    streamer.run_pass(None, lambda x, weights, layer_idx: x)
for call in (lambda: Settings(new_one=10), lambda: plan_checkpoint(path, new_one=10)):
    try:
        call()
    except ConfigError as error:
        assert str(error) == "new_one=10: must be from 1 to 9"
    else:
        raise AssertionError

for command, words in (
    (plan_command, [path]), (bench_command, [path]), (generate_command, [path, "--prompt", "x"]),
):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert "what it means (7)" in parser.format_help()
    assert streamer_options(parser.parse_args([*words, "--new-one", "3"])) == {"new_one": 3}

parser = argparse.ArgumentParser()
tune_command.add_arguments(parser)
words = ["--new-one-values", "3,none", "--same-one", "2"]
values = tune_command.options_of(parser.parse_args([path, *words]))
assert values["new_one_values"] == [3, None]
tuner = LayerStreamerTuner.from_checkpoint(path, device="cpu", **values)
assert tuner._session.axes == {"new_one": (3, None)}
assert tuner._session._model.fixed == {"device": "cpu", "same_one": 2}

assert "| `new_one` | 7 | what it means |" in module.markdown_table()
"""


TYPED = """
import torch

from layer_streamer import LayerStreamer, plan_checkpoint

LayerStreamer.from_checkpoint("m", n_gpu=2, device=["cpu"], dtype=torch.float16, tail=None)
LayerStreamer.from_checkpoint("m", n_gpu="2")  # type: ignore[arg-type]
LayerStreamer.from_checkpoint("m", n_gpus=2)  # type: ignore[call-arg]
LayerStreamer.from_checkpoint("m", read_mode="fast")  # type: ignore[arg-type]
plan_checkpoint("m", device_budget=1.5)  # type: ignore[arg-type]
LayerStreamer("m", {}, {}, [], {}, torch.int8, 3, read_threads="2")  # type: ignore[arg-type]
LayerStreamer("m", {}, {}, [], {}, torch.int8, 3, layer_pattern="a.{i}.")  # type: ignore[call-arg]
streamer: LayerStreamer = LayerStreamer.from_checkpoint("m")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_names_and_types_of_options(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "typed.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_option_that_is_added_to_the_table_alone_is_everywhere(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    done = run_script(EVERYWHERE, tmp_path)
    assert done.returncode == 0, done.stderr
