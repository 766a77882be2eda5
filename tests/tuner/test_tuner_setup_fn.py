"""Setup functions by name: which ones have one, and how a script's own reach a trial."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreters
import pytest
import tuner_setups
from paths import ROOT
from tuner_support import Marked, checkpoint, marked, run_script

from layer_streamer import ConfigError
from layer_streamer.tuner.trials.record import FunctionName
from layer_streamer.tuner.trials.setup_fn import (
    TRIAL_VARIABLE,
    EndOfImport,
    end_import_in_child,
    load_function,
    name_function,
)

__all__ = ["checkpoint", "marked"]

TUNE = """
import sys
from layer_streamer.tuner.trials.record import TrialLimits, TrialSpec
from layer_streamer.tuner.trials.setup_fn import end_import_in_child, name_function
from layer_streamer.tuner.trials.trial import run_trial

def tune(setup_fn, on_copy=None):
    end_import_in_child()
    spec = TrialSpec(
        model={"path": sys.argv[1], "device": "cpu"}, settings={}, n_runs=2,
        setup_fn=name_function(setup_fn),
        on_copy=None if on_copy is None else name_function(on_copy, "on_copy"),
    )
    record = run_trial(spec, TrialLimits())
    print(record.ending, record.detail)
"""
SETUP = """
COPIED = []

def on_copy(layer_idx, stream):
    COPIED.append(layer_idx)

def setup(streamer):
    def run():
        streamer.run_pass(None, lambda x, w, i: x)
        if not COPIED and on_copy_is_given:
            raise ValueError("on_copy and setup do not share their script's globals")
    return run
"""
UNGUARDED = f"""{TUNE}
assert __name__ in ("__main__", "__mp_main__")
on_copy_is_given = True
{SETUP}
tune(setup, on_copy)
print("the end")
"""
GUARDED = f"""{TUNE}{SETUP}
on_copy_is_given = False
if __name__ == "__main__":
    tune(setup)
"""
SET_UP_TOO_LATE = f"""{TUNE}{SETUP}
on_copy_is_given = False
def first(streamer):
    return setup(streamer)
if __name__ == "__main__":
    def second(streamer):
        return first(streamer)
    tune(second)
"""


class Setups:
    def method(self, streamer: Any) -> Any: ...

    @classmethod
    def of_class(cls, streamer: Any) -> Any: ...

    @staticmethod
    def static(streamer: Any) -> Any: ...


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def inner(streamer: Any) -> Any:
        return function(streamer)

    return inner


@decorated
def wrapped(streamer: Any) -> Any: ...


def replaced(streamer: Any) -> Any: ...


first_version = replaced


def replaced(streamer: Any) -> Any: ...  # type: ignore[no-redef]


UNNAMED = lambda streamer: None  # noqa: E731


@pytest.mark.parametrize(
    "function",
    [wrapped, Setups.static, Setups.of_class, tuner_setups.healthy],
    ids=["wrapped", "static", "class", "module"],
)
def test_a_function_that_its_module_has_is_named_and_found_again(function: Any) -> None:
    name = name_function(function)
    assert name.qualname == function.__qualname__
    assert Path(name.file).is_absolute()
    assert load_function(name) == function


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (UNNAMED, "setup_fn=<lambda>: is a lambda"),
        (decorated(lambda streamer: None), "is a lambda"),
        (Setups().method, "is a method of an instance"),
        (first_version, "replaced is something else by now"),
        (functools.partial(wrapped), "must be a function that its module has by name"),
        (3, "setup_fn=3: must be a function"),
        (len, "setup_fn=len: module 'builtins' is no file"),
    ],
    ids=["lambda", "decorated", "method", "replaced", "partial", "number", "builtin"],
)
def test_what_a_fresh_process_cannot_import_is_refused_in_one_line(
    function: Any, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        name_function(function)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_option_that_a_refused_function_was_given_as_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^on_copy=<lambda>: is a lambda, so a fresh process"):
        name_function(UNNAMED, "on_copy")
    with pytest.raises(ConfigError, match=r"^on_copy=gone: .*, imported by a trial, has not"):
        load_function(FunctionName(module=__name__, qualname="gone", file="f", option="on_copy"))


def test_a_function_inside_another_is_refused() -> None:
    def inner(streamer: Any) -> Any: ...

    with pytest.raises(ConfigError, match="inner: is defined inside a function"):
        name_function(inner)


def test_a_function_whose_module_is_gone_is_refused() -> None:
    namespace = {"__name__": "a_module_that_is_not_there"}
    exec("def setup(streamer): ...", namespace)
    with pytest.raises(ConfigError, match="'a_module_that_is_not_there' has nothing of that name"):
        name_function(namespace["setup"])  # type: ignore[arg-type]


IN_MAIN = """
from layer_streamer.tuner.trials.setup_fn import name_function
def setup(streamer): ...
try: name_function(setup)
except ValueError as error: print(error)
"""
NO_FILE = "setup_fn=setup: a prompt, -c or stdin is no file"


def test_a_main_without_a_file_is_refused() -> None:
    assert interpreters.run_script(IN_MAIN).stdout.startswith(NO_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("way", [["-c", IN_MAIN], ["-"]], ids=["-c", "stdin"])
def test_a_main_that_python_was_told_in_words_is_refused(way: list[str], marked: Marked) -> None:
    done = subprocess.run(
        [sys.executable, *way], input=IN_MAIN, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(NO_FILE)


@pytest.mark.parametrize(
    "text",
    [UNGUARDED, pytest.param(GUARDED, marks=pytest.mark.slow)],
    ids=["unguarded", "guarded"],
)
def test_a_scripts_own_setup_function_reaches_a_trial(
    text: str, tmp_path: Path, checkpoint: Path, marked: Marked
) -> None:
    script = tmp_path / "a script"
    script.write_text(text)
    done = run_script(script, checkpoint, mark=marked)
    ends = "the end\n" if text is UNGUARDED else ""
    assert (done.stdout, done.stderr) == (f"ok \n{ends}", "")


@pytest.mark.slow
def test_a_setup_function_below_the_guard_is_told_apart(
    tmp_path: Path, checkpoint: Path, marked: Marked
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SET_UP_TOO_LATE)
    done = run_script(script, checkpoint, mark=marked)
    assert done.stdout.startswith(f"exception ConfigError: setup_fn=second: {script}, imported by")
    assert "outside of any __main__ guard" in done.stdout


@pytest.mark.slow
def test_a_module_run_with_m_is_imported_under_its_own_name(
    tmp_path: Path, checkpoint: Path, marked: Marked
) -> None:
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(f"on_copy_is_given = False\n{SETUP}")
    (package / "program.py").write_text(f"{TUNE}\nfrom .parts import setup as inner\n"
        "def setup(streamer): return inner(streamer)\ntune(setup)\n")  # fmt: skip
    done = run_script(Path("-m"), "a_package.program", checkpoint, mark=marked, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("ok \n", "")


def test_only_in_a_trial_does_tune_end_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    end_import_in_child()
    monkeypatch.setenv(TRIAL_VARIABLE, "x")
    with pytest.raises(EndOfImport):
        end_import_in_child()


def test_a_module_that_tunes_when_it_is_imported_keeps_what_it_has_defined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tunes_at_import.py").write_text(
        "from layer_streamer.tuner.trials.setup_fn import end_import_in_child\n"
        "def setup(streamer): return 7\n"
        "end_import_in_child()\n"
        "raise AssertionError('went on')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(TRIAL_VARIABLE, "x")
    name = FunctionName(module="tunes_at_import", qualname="setup", file="")
    try:
        assert load_function(name)(None) == 7
        assert isinstance(sys.modules["tunes_at_import"], ModuleType)
    finally:
        sys.modules.pop("tunes_at_import", None)


def test_a_module_that_is_not_found_is_named() -> None:
    name = FunctionName(module="no_such_module_at_all", qualname="setup", file="")
    with pytest.raises(ConfigError, match="no module 'no_such_module_at_all'"):
        load_function(name)
