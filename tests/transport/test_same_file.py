"""What is a changed file, what is the same under another name, and what opening needs."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, write_gguf, write_safetensors
from disks import open_descriptors, stamp, warnings_of
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer import CheckpointChangedError, CheckpointError, LayerStreamer, read_manifest
from layer_streamer.checkpoint.formats import GGUFArray
from layer_streamer.machine.descriptors import open_regular
from layer_streamer.tools.cli import main
from layer_streamer.transport.files import OpenFiles, open_direct


def backed_up(path: Path) -> None:
    """Read, and its time of access put back."""
    info = path.stat()
    path.read_bytes()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def moved_and_back(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.with_suffix(".moved").rename(path)


def deduplicated(path: Path) -> None:
    """Replaced by a link to a file of equal bytes, as tools do that save space."""
    info, twin = path.stat(), path.with_suffix(".twin")
    twin.write_bytes(path.read_bytes())
    os.utime(twin, ns=(info.st_atime_ns, info.st_mtime_ns))
    twin.rename(path)


def linked(path: Path) -> None:
    path.with_suffix(".link").unlink(missing_ok=True)
    path.with_suffix(".link").hardlink_to(path)


HARMLESS: dict[str, Callable[[Path], object]] = {
    "link": linked,
    "chmod": lambda path: path.chmod(0o440),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "backup": backed_up,
    "rename": lambda path: path.rename(path.with_suffix(".moved")),
    "moved and back": moved_and_back,
    "removed": lambda path: path.unlink(),
    "deduplicated": deduplicated,
    "read": lambda path: path.read_bytes(),
}


def replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(new, ns=(0, 0))
    new.rename(path)


def rewritten(path: Path) -> None:
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewritten,
    "replaced": replaced,
    "touched": lambda path: os.utime(path, ns=(0, 0)),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "shrunk": lambda path: os.truncate(path, path.stat().st_size - 1),
}


def total(streamer: LayerStreamer) -> float:
    x = streamer.run_pass(torch.zeros(1), lambda x, w, i: x + w["mlp.up_proj.weight"].sum())
    return float(x.item())


@pytest.mark.parametrize("read_mode", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("change", HARMLESS)
def test_what_leaves_the_bytes_alone_ends_no_pass_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, read_mode: str
) -> None:
    tiny_checkpoint(tmp_path, num_shards=2)
    paths = sorted(tmp_path.glob("*.safetensors"))
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu", read_mode=read_mode) as streamer:
        before = total(streamer)
        for path in paths:
            HARMLESS[change](path)
        assert [total(streamer) for _ in range(3)] == [before] * 3
    said = [text for text in warnings_of(caplog) if "reading on" in text]
    assert len(said) <= 1
    # Any of the files: several threads look at them.
    assert change in ("read", "chown") or any(str(path) in said[0] for path in paths)


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_have_changed_bytes_ends_every_pass(tmp_path: Path, change: str) -> None:
    tiny_checkpoint(tmp_path)
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu") as streamer:
        total(streamer)
        CHANGES[change](tmp_path / "model.safetensors")
        for _ in range(2):
            with pytest.raises(CheckpointChangedError, match=r"model\.safetensors: changed since"):
                total(streamer)


@settings(deadline=None, max_examples=30)
@given(harmless=st.lists(st.sampled_from(sorted(HARMLESS)), max_size=4), change=st.booleans())
def test_a_change_is_found_behind_any_number_of_harmless_ones(
    tmp_path_factory: pytest.TempPathFactory, harmless: list[str], change: bool
) -> None:
    path = tmp_path_factory.mktemp("changes") / "file"
    path.write_bytes(bytes(100))
    opened = OpenFiles({path: stamp(path)})
    with path.open("r+b") as held, closing(opened):  # whatever its name becomes
        for kind in harmless:
            if path.exists():
                HARMLESS[kind](path)
            opened.check_unchanged()
        if change:
            os.utime(held.fileno(), ns=(0, 0))
            with pytest.raises(CheckpointChangedError):
                opened.check_unchanged()


@pytest.mark.parametrize("change", ["link", "chmod", "backup"])
def test_a_manifest_and_its_arrays_outlive_a_change_of_names(tmp_path: Path, change: str) -> None:
    tensors = {f"blk.{i}.w": torch.ones(8).numpy() for i in range(2)}
    path = write_gguf(tmp_path / "m.gguf", tensors, {"tokens": ["a", "b"]})
    manifest = read_manifest(path)
    HARMLESS[change](path)
    array = manifest.metadata["tokens"]
    assert isinstance(array, GGUFArray)
    assert array.load() == ["a", "b"]
    with LayerStreamer.from_checkpoint(manifest, device="cpu") as streamer:
        streamer.run_pass(None, lambda x, w, i: x)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """In a folder that has a model; call it to go to another one."""
    tiny_checkpoint(tmp_path / "here" / "model")
    tensors = {f"blk.{i}.w": torch.ones(8).numpy() for i in range(2)}
    write_gguf(tmp_path / "here" / "m.gguf", tensors, {"tokens": ["a", "b"]})
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda: monkeypatch.chdir(tmp_path / "there")


@pytest.mark.parametrize("read_mode", ["buffered", "direct", "mapped"])
def test_a_relative_path_means_the_same_when_the_process_has_changed_its_folder(
    elsewhere: Callable[[], None], read_mode: str
) -> None:
    manifest, gguf = read_manifest("model"), read_manifest(Path("./m.gguf"))
    with LayerStreamer.from_checkpoint("model", device="cpu", read_mode=read_mode) as streamer:
        before = total(streamer)
        elsewhere()
        assert total(streamer) == before
    with LayerStreamer.from_checkpoint(manifest, device="cpu", read_mode=read_mode) as streamer:
        assert total(streamer) == before
    assert gguf.metadata["tokens"].load() == ["a", "b"]


def test_tables_of_a_relative_folder_are_read_after_a_change_of_folder(
    elsewhere: Callable[[], None],
) -> None:
    write_safetensors(Path("w.safetensors"), {"model.layers.0.w": torch.full((4,), 3.0)})
    raw = Path("w.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    with LayerStreamer(
        model_dir=".",
        tensor_info={"model.layers.0.w": ("w.safetensors", 0, [4])},
        shard_offsets={"w.safetensors": start},
        block_keys=["w"],
        block_sizes={"w": 4},
        dtype=torch.float32,
        num_layers=1,
        device="cpu",
    ) as streamer:
        elsewhere()
        assert streamer.run_pass(torch.zeros(1), lambda x, w, i: x + w["w"].sum()).item() == 12.0


NAMES = [b"caf\xe9", b"\xff\xfe", "\u6a21\u578b".encode(), b"a\nb", b"\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_opened_and_its_name_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    try:
        tiny_checkpoint(folder)
    except OSError as error:
        pytest.skip(f"the file system does not take it: {error}")
    with LayerStreamer.from_checkpoint(folder, device="cpu") as streamer:
        total(streamer)
        os.utime(folder / "model.safetensors", ns=(0, 0))
        with pytest.raises(CheckpointChangedError) as caught:
            total(streamer)
    message = str(caught.value)
    assert message.isprintable()
    assert message.encode().decode() == message
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder / "missing")]) == 2
    for text in capsys.readouterr():
        assert all(line.isprintable() for line in text.splitlines())
        assert folder.name in text or f"{folder.name!r}"[1:-1].lstrip("\\") in text


def test_a_fifo_that_takes_a_files_place_is_an_error_and_no_wait(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    manifest = read_manifest(tmp_path)
    path.unlink()
    os.mkfifo(path)
    outcomes: list[Any] = []

    def attempt() -> None:
        for open_it in (lambda: OpenFiles(manifest.files), lambda: open_direct(path)):
            try:
                outcomes.append(open_it())
            except (CheckpointError, OSError) as error:
                outcomes.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    before = open_descriptors()
    thread.start()
    thread.join(20)
    assert len(outcomes) == 2
    assert "not a regular file" in outcomes[0]
    assert open_descriptors() == before


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets how many descriptors there may be beside those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(beside: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + beside, before[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def shards(directory: Path, count: int) -> Path:
    for i in range(count):
        name = f"m-{i + 1:05}-of-{count:05}.safetensors"
        write_safetensors(directory / name, {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(9)})
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
@pytest.mark.parametrize("read_mode", ["buffered", "direct"])
def test_a_soft_limit_on_descriptors_is_raised_and_every_file_is_read_as_asked(
    tmp_path: Path, limit: Callable[[int], None], read_mode: str
) -> None:
    shards(tmp_path, 20)
    allowed = read_mode
    try:
        os.close(open_direct(tmp_path / "m-00001-of-00020.safetensors"))
    except OSError:
        allowed = "buffered"
    limit(10)
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu", read_mode=read_mode) as streamer:
        assert set(streamer.read_modes.values()) == {allowed}
        assert total(streamer) == 20 * 9


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_limit_that_stays_is_an_error_that_names_it_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    shards(tmp_path, 2)
    manifest, real, calls = read_manifest(tmp_path), os.open, iter(range(99))

    def open_few(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).endswith(".safetensors") and next(calls) >= at:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **named)

    before = open_descriptors()
    monkeypatch.setattr(os, "open", open_few)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with pytest.raises(CheckpointError, match=r"m-0.*limit"):
            LayerStreamer.from_checkpoint(manifest, device="cpu", read_mode="direct")
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_descriptors() == before


def test_a_descriptor_of_what_is_no_file_is_closed_again(tmp_path: Path) -> None:
    before = open_descriptors()
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
    assert open_descriptors() == before
