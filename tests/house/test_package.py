"""What is built of this repository, and that it works from any folder."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

import layer_streamer

BUILD = "from setuptools import build_meta as b; import sys; getattr(b, sys.argv[1])(sys.argv[2])"
LINKS = {"tuner": "tuner", "llm": "examples/llm"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, a source distribution, and in ``again`` the wheel that is built of that one."""
    place = tmp_path_factory.mktemp("built")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    source = place / "source"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # not removed since the last commit
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    build(source, place, "build_wheel")
    build(source, place, "build_sdist")
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place / "sdist", filter="data")
    build(next((place / "sdist").iterdir()), place / "again", "build_wheel")
    return place


def build(source: Path, out: Path, what: str) -> None:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, what, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def files(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        yield from (name for name in archive.namelist() if ".dist-info/" not in name)


def wheel(place: Path) -> Path:
    (found,) = place.glob("*.whl")
    return found


def test_a_wheel_has_the_modules_of_every_folder_and_nothing_else(built: Path) -> None:
    folders = [ROOT / "layer_streamer", *(ROOT / "layer_streamer" / name for name in LINKS)]
    there = {
        path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")
    }
    data = {"layer_streamer/py.typed", "layer_streamer/llm/serving/page.html"}
    kernels = "layer_streamer/llm/host_kernels"
    data |= {
        f"{kernels}/{name}" for name in ("products.cpp", "tokens.cpp", "threads.h", "vectors.h")
    }
    assert set(files(wheel(built))) == there | data


def test_a_wheel_out_of_the_source_distribution_is_the_same(built: Path) -> None:
    assert set(files(wheel(built / "again"))) == set(files(wheel(built)))


def test_the_source_distribution_carries_no_tests(built: Path) -> None:
    """They need helpers and data; the repository is the place to run them."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.split("/") for name in archive.getnames()]
    assert {parts[1] for parts in names if len(parts) > 1} == {
        "LICENSE", "PKG-INFO", "README.md", "layer_streamer", "layer_streamer.egg-info",
        "pyproject.toml", "setup.cfg",
    }  # fmt: skip


@pytest.fixture(scope="module")
def installed(built: Path) -> dict[str, str]:
    """The environment of a process that finds the wheel's files, and not the repository."""
    with zipfile.ZipFile(wheel(built)) as archive:
        archive.extractall(built / "installed")
    return os.environ | {"PYTHONPATH": str(built / "installed"), "PYTHONSAFEPATH": "1"}


def python(code: str, environment: dict[str, str], cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow  # make test-package installs it, and does the same
def test_the_installed_engine_is_imported_from_an_empty_folder(
    installed: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "from layer_streamer.llm import StreamingEngine\n"
        "from layer_streamer import LayerStreamer, LayerStreamerTuner\n"
        "import layer_streamer; print(layer_streamer.__file__)"
    )
    assert str(ROOT) not in python(code, installed, tmp_path)


def test_nothing_else_is_installed_under_a_name_of_its_own(
    installed: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('tuner', 'llm', 'examples', 'tests', 'make') if u.find_spec(n)])"
    )
    path = {"PYTHONPATH": installed["PYTHONPATH"]}
    # -S: without what the environment of these tests has on its path.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_the_command_is_declared_and_starts(installed: dict[str, str], tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["layer-streamer"].partition(":")
    code = f"import sys; from {module} import {function} as f; sys.exit(f(['--version']))"
    assert python(code, installed, tmp_path) == f"layer-streamer {layer_streamer.__version__}\n"


def test_metadata_has_the_version_and_links_that_lead_somewhere_from_any_page(built: Path) -> None:
    with zipfile.ZipFile(wheel(built)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == layer_streamer.__version__
    assert len(metadata.get_all("Project-URL") or ()) >= 3
    page = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", page) + re.findall(r"(?m)^\[[^\]]+\]: (.*)$", page)
    assert links and all(link.startswith(("https://", "#")) for link in links), links


@pytest.mark.parametrize(("name", "target"), LINKS.items())
def test_folders_outside_the_package_are_linked_into_it(name: str, target: str) -> None:
    link = ROOT / "layer_streamer" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / target


@pytest.mark.slow
def test_a_users_type_checker_sees_types_in_an_editable_install(tmp_path: Path) -> None:
    """Such an install is a path: of the root (package-dir in pyproject.toml)."""
    (tmp_path / "users.py").write_text(
        "from layer_streamer import LayerStreamer, LayerStreamerTuner\n"
        "from layer_streamer.llm import StreamingEngine\n"
        "plan: int = LayerStreamer.from_checkpoint('x').plan\n"
        "engine: int = StreamingEngine('x').max_length\n"
        "best: int = LayerStreamerTuner.from_checkpoint('x').tune()\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "users.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    wrong = re.findall(r"users.py:(\d+): error: Incompatible types", done.stdout)
    assert wrong == ["3", "5"], done.stdout
