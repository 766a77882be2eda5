"""The command as a whole: what it lists, how it ends, and how soon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from paths import PYTHONPATH, ROOT

import layer_streamer
from layer_streamer.tools import cli
from layer_streamer.tools.cli import COMMANDS, main

COMMAND = [sys.executable, "-m", "layer_streamer"]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_help_lists_every_command_that_there_is(capsys: Any) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    modules = (ROOT / "layer_streamer" / "tools").glob("*_command.py")
    assert {path.name.removesuffix("_command.py") for path in modules} == set(COMMANDS)
    for name, text in COMMANDS.items():
        assert f"  {name}" in listed and text in listed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_that_begins_with_an_example(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"\n    layer-streamer {name}" in capsys.readouterr().out


def test_no_help_and_no_refusal_waits_for_torch() -> None:
    script = (
        "import contextlib, sys\n"
        "from layer_streamer.tools.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit): main([name, '--help'])\n"
        "    assert main([name, '--no-such-option']) == 2\n"
        "assert main(['generate', 'nowhere.gguf', '--prompt', 'x', '--output', 'y']) == 2\n"
        "large = {'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules)\n"
        "assert not large, large\n"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)


def test_without_a_command_the_list_is_printed_and_it_is_an_error(capsys: Any) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_a_mistyped_command_is_one_line_with_the_one_that_was_meant(capsys: Any) -> None:
    assert main(["generat"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no command 'generat', did you mean generate? (see layer-streamer --help)"
    ]


def test_the_version_is_the_packages(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"layer-streamer {layer_streamer.__version__}\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command = import_module("layer_streamer.tools.inspect_command")
    monkeypatch.setattr(command, "run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        main(["inspect", "x"])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframe #0"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        MemoryError(),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception
) -> None:
    def refuse(args: Any) -> None:
        raise error

    monkeypatch.setattr("layer_streamer.tools.inspect_command.run", refuse)
    assert cli.main(["inspect", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err) > 10 and err.count("\n") == 1


def test_sigterm_ends_a_command_as_ctrl_c_does_and_the_handler_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    command = import_module("layer_streamer.tools.inspect_command")
    monkeypatch.setattr(command, "run", lambda args: signal.raise_signal(signal.SIGTERM))
    assert main(["inspect", "x"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, 3, hidden=8)
    return tmp_path


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_json_is_for_programs_and_the_table_for_people(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--device", "cpu"] if command == "plan" else []
    assert main([command, str(model), *options]) == 0
    *table, document = capsys.readouterr().out.splitlines()
    assert table and json.loads(document)
    assert main([command, str(model), *options, "--json"]) == 0
    assert capsys.readouterr().out == f"{document}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main([command, str(model), *options]) == 0
    assert capsys.readouterr().out.splitlines() == table


@pytest.mark.parametrize(("options", "lines"), [([], 0), (["-v"], 1)])
def test_what_is_only_of_interest_is_said_when_asked_for(options: list[str], lines: int) -> None:
    script = (
        "import logging, sys\n"
        "from layer_streamer.tools import cli, inspect_command\n"
        "inspect_command.run = lambda args: logging.getLogger('layer_streamer.x').info('detail')\n"
        "sys.exit(cli.main(['inspect', 'x', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", script, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "detail\n" * lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_without_the_package_says_what_to_install(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(script)]  # -S: no installed package is found
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "pip install" in line


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem in COMMANDS], ids=lambda p: p.stem)
def test_a_script_is_the_command_of_its_name(script: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert f"layer-streamer {script.stem}" in done.stdout


def test_an_engine_command_without_what_it_needs_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("layer_streamer.tools.command.find_spec", lambda name: None)
    assert main(["generate", "x.gguf", "--prompt", "Hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'layer-streamer[llm]'" in line


def test_commands_are_found_by_their_names_alone() -> None:
    for name in COMMANDS:
        command = import_module(f"layer_streamer.tools.{name}_command")
        assert callable(command.add_arguments) and callable(command.run), cli.__doc__
