"""The cache directory: the user's, or a temporary one where there is none that can be written."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from layer_streamer import cache_path
from layer_streamer.machine import cache as cache_module
from layer_streamer.machine.cache import NAME, user_cache


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; no home, and nothing that was said before."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(cache_module, "_refused", set())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def without_home(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)


def home_is_a_file(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    (place / "file").touch()
    monkeypatch.setenv("HOME", str(place / "file"))


def home_is_a_device(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("HOME", os.devnull)


def home_in_proc(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/nothing")


def home_is_relative(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("HOME", "some/where")


def cache_is_a_file(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    (place / "cache").mkdir()
    (place / "cache" / NAME).touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def name_is_too_long(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 300}")


def disk_is_full(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(cache_module, "_make", _only_below("temporary", cache_module._make))


def _only_below(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def refuse(folder: Path) -> None:
        if name not in folder.parts:
            raise OSError(28, "No space left on device")
        make(folder)

    return refuse


BAD = [
    without_home, home_is_a_file, home_is_a_device, home_in_proc, home_is_relative, cache_is_a_file,
    name_is_too_long, disk_is_full,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_where_the_cache_cannot_be_written_a_temporary_one_is_used_and_said_once(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, bad: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:  # fmt: skip
    bad(monkeypatch, tmp_path)
    assert not cache_path("limits").exists()
    assert not caplog.records
    folder = cache_path("limits", make=True)
    assert folder.is_dir()
    assert folder.is_relative_to(temporary)
    (folder / "record").write_text("kept")
    assert cache_path("limits", make=True) == folder
    assert cache_path("limits", "record").read_text() == "kept"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "XDG_CACHE_HOME" in caplog.text


def test_the_temporary_one_is_the_owners_alone_and_is_found_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_home(monkeypatch, tmp_path)
    folder = cache_path("a", make=True)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(cache_module, "_refused", set())  # as in another process
    assert cache_path("a") == folder


@pytest.mark.parametrize("kind", ["link", "writable", "file"])
def test_what_another_user_may_have_put_in_its_place_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    without_home(monkeypatch, tmp_path)
    trap = temporary / f"{NAME}-{os.geteuid()}"
    (tmp_path / "theirs").mkdir()
    if kind == "link":
        trap.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        trap.touch()
    else:
        trap.mkdir()
        trap.chmod(0o777)
    folder = cache_path("a", make=True)
    assert not folder.is_relative_to(trap)
    assert not list((tmp_path / "theirs").iterdir())


def test_a_cache_that_was_filled_and_is_read_only_now_is_still_read(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cache_path("tokenizers", make=True) / "a"
    kept.mkdir()
    assert kept.is_relative_to(tmp_path / "home")
    disk_is_full(monkeypatch, tmp_path)
    assert cache_path("tokenizers", "a") == kept
    assert cache_path("tokenizers", make=True).is_relative_to(temporary)
    assert cache_path("tokenizers", "a") == kept


def test_to_ask_for_a_path_makes_nothing(tmp_path: Path, temporary: Path) -> None:
    assert cache_path("limits", "record") == tmp_path / "home" / ".cache" / NAME / "limits/record"
    assert not (tmp_path / "home").exists()
    assert not list(temporary.iterdir())


def test_without_a_home_and_without_temporary_files_nothing_is_found_and_the_place_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_home(monkeypatch, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    assert user_cache() is None
    assert not cache_path("limits").exists()
    with pytest.raises(FileNotFoundError, match="nothing"):
        cache_path("limits", make=True)
