"""``doctor``: the screen, the JSON, exit codes; real machines that lack something."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from cgroups import real_cgroup
from checkpoints import tiny_checkpoint, write_raw_safetensors
from doctoring import check_fits, marked
from interpreters import run_script

from layer_streamer.__main__ import main
from layer_streamer.doctor import report as doctor

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder without records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", 30, hidden=40)
    return tmp_path / "model"


def examined(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What is printed; nothing goes to stderr."""
    assert main(["doctor", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.removesuffix("\n")


def test_without_a_model_the_machine_is_one_screen(capsys: Any) -> None:
    text = examined(capsys, "--device", "cpu")
    check_fits(text, 40)
    titles = [row for row in text.splitlines() if row[0] not in " !"]
    assert titles[:4] == ["versions", "devices", "memory", "disk"]
    assert f"torch {torch.__version__}" in text


def test_with_a_model_its_plan_and_what_would_change_it_follow(model: Path, capsys: Any) -> None:
    text = examined(capsys, model, "--device", "cpu")
    check_fits(text, 55)
    assert "30 layers of 0.02 MB" in text and "stored as      90 float32" in text
    assert "on disk        30 layers (0-29)" in text
    assert "`layer-streamer probe MODEL` measures them" in text
    assert "--host-budget" in text.split("what would change that")[1]


def test_json_is_one_document_of_the_same(model: Path, capsys: Any) -> None:
    options = ["--device", "cpu", "--device-budget", "400KiB", "--n-gpu", 1, "--json"]
    found = json.loads(examined(capsys, model, *options))
    plan = found["model"]["value"]["plan"]
    assert set(plan["tiers"]) == {"device", "disk"}
    assert sum(plan["device_bytes"]) <= 400 << 10
    assert found["versions"]["torch"] == torch.__version__
    assert found["disk"]["direct"]["value"] is not None
    assert 0 <= found["disk"]["cached"]["value"] <= 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("missing", "No such file or directory"),
        ("empty", "no .safetensors or .gguf file in it"),
        ("text.gguf", "GGUF"),
        ("lies.safetensors", "lies.safetensors"),
        ("\x1b[31mred.gguf", "\\x1b[31mred.gguf"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_warning_and_code_2(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    write_raw_safetensors(tmp_path / "lies.safetensors", "{}", length=1 << 60)
    text = examined(capsys, name, "--device", "cpu", code=2)
    check_fits(text, 45)
    (warning,) = [w for w in marked(text) if w.startswith("no plan")]
    # Long paths are broken in two.
    assert "".join(fault.split()) in "".join(warning.split())
    found = json.loads(examined(capsys, name, "--device", "cpu", "--json", code=2))
    assert found["model"]["value"] is None and found["model"]["reason"]


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "cuda:99"], ["--device", "nonsense"], ["--device-budget", "1KiB"],
        ["--host-budget", "much"], ["--n-gpu", "-1"], ["--layer-pattern", "none"],
        ["--layer-pattern", "h.{i}."],
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_one_warning_and_code_2(
    model: Path, capsys: Any, options: list[str]
) -> None:
    text = examined(capsys, model, "--device", "cpu", *options, code=2)
    assert any(w.startswith("no plan") for w in marked(text))


def test_other_layers_are_found_by_their_pattern(tmp_path: Path, capsys: Any) -> None:
    tiny_checkpoint(tmp_path, 3)
    text = examined(capsys, tmp_path, "--device", "cpu", "--layer-pattern", "model.layers.{i}.mlp.")
    assert "3 layers of" in text and "stored as      3 float32" in text


def test_a_gpu_that_is_there_but_not_for_torch_leaves_a_plan_for_the_cpu(
    model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "layer_streamer.devices.accelerator._unusable_gpu", lambda: "an NVIDIA GPU is present"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = examined(capsys, model)
    (warning,) = [w for w in marked(text) if w.startswith("planned for")]
    assert "the CPU: an NVIDIA GPU is present" in warning


def test_a_record_of_limits_that_is_broken_is_a_warning_and_no_traceback(
    model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, **options: Any) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("layer_streamer.assembly.load_limits", broken)
    text = examined(capsys, model, "--device", "cpu", code=2)
    assert any("Could not determine home" in warning for warning in marked(text))


def test_an_interrupt_ends_it(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "look_at_disk", lambda manifest: interrupt())
    assert main(["doctor", "--device", "cpu"]) == 130


def test_a_terminal_that_lacks_a_character_gets_its_escape(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "_encoding", "ascii", raising=False)
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["doctor", str(tmp_path / "modèle"), "--device", "cpu"]) == 2
    assert "mod\\xe8le" in (tmp_path / "out").read_text(encoding="ascii")


REAL = """
import json, os, resource, sys
from pathlib import Path
from layer_streamer.__main__ import main
import layer_streamer.doctor.report

def memlock():
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))

def no_environment():
    os.environ.clear()

def file_for_a_home():
    os.environ.clear()
    os.environ["HOME"] = "/etc/passwd"

def no_home():
    os.environ.clear()
    os.setresuid(54321, 54321, 54321)

def container():
    Path(sys.argv[1], "cgroup.procs").write_text("0")

for scene in sys.argv[2:]:
    pid = os.fork()
    if not pid:
        globals()[scene]()
        print("scene", scene, flush=True)
        os._exit(main(["doctor", "--device", "cpu"]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("code", code, flush=True)
"""


@pytest.fixture(scope="module")
def scenes() -> dict[str, str]:
    """What is printed on machines that lack something, by what they lack."""
    asked = ["memlock", "no_environment", "file_for_a_home"]
    with ExitStack() as stack:
        folder = Path()
        try:
            folder = stack.enter_context(real_cgroup(512 * MIB))
            asked.append("container")
        except pytest.skip.Exception:
            pass
        if os.getuid() == 0:
            asked.append("no_home")
        done = run_script(REAL, folder, *asked, environment={"XDG_CACHE_HOME": ""})
    assert done.stderr == ""
    found = {}
    for part in done.stdout.split("scene ")[1:]:
        name, _, rest = part.partition("\n")
        text, _, code = rest.rpartition("\ncode ")
        assert code.strip() == "0"
        check_fits(text, 40)
        found[name] = text
    assert set(found) == set(asked)
    return found


def test_64_kib_of_memlock_are_said(scenes: dict[str, str]) -> None:
    text = scenes["memlock"]
    assert "locked memory 64.0 KiB" in text
    if "MiB locked, as asked" in text:
        pytest.skip("this system does not limit what a process locks")
    (warning,) = [w for w in marked(text) if w.startswith("page-locking")]
    assert "ulimit -l unlimited" in warning


def test_an_empty_environment_is_no_obstacle(scenes: dict[str, str]) -> None:
    assert "versions" in scenes["no_environment"]


def test_a_home_that_is_a_file_is_one_warning(scenes: dict[str, str]) -> None:
    (warning,) = [w for w in marked(scenes["file_for_a_home"]) if w.startswith("cache folder")]
    assert "/etc/passwd" in warning and "set XDG_CACHE_HOME" in warning


def test_no_home_at_all_is_one_warning(scenes: dict[str, str]) -> None:
    if "no_home" not in scenes:
        pytest.skip("only root can become a user that has no home")
    (warning,) = [w for w in marked(scenes["no_home"]) if w.startswith("cache folder")]
    assert "home directory" in warning


def test_in_a_real_container_of_512_mib_its_limit_is_a_warning(scenes: dict[str, str]) -> None:
    if "container" not in scenes:
        pytest.skip("no cgroup can be made here")
    warnings = [w for w in marked(scenes["container"]) if w.startswith("cgroup")]
    assert "limit 512 MiB" in warnings[0] and "docker run --memory" in warnings[0]


@pytest.mark.gpu
def test_on_a_gpu_its_memory_link_and_page_locking_are_said(model: Path, capsys: Any) -> None:
    text = examined(capsys, model)
    check_fits(text, 55)
    assert "cuda:0" in text and "GiB free" in text
    assert not [w for w in marked(text) if w.startswith(("cuda", "gpu"))]
    locking = [row for row in text.splitlines() if "page-locking" in row]
    assert len(locking) == 2 and all("locked" in row for row in locking)
    assert "on the host" in text and "--device-budget" in text
