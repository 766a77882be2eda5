"""Facts of a checkup as they are gathered, from files and programs that say odd things."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from disks import open_descriptors, refuse
from doctoring import ONE_GPU
from fake_device import FakeDevice

from layer_streamer import ConfigError, read_manifest
from layer_streamer.devices.device import CpuDevice
from layer_streamer.doctor import devices as doctor_devices
from layer_streamer.doctor import disk as doctor_disk
from layer_streamer.doctor import gpus as doctor_gpus
from layer_streamer.doctor import memory as doctor_memory
from layer_streamer.doctor import versions as doctor_versions
from layer_streamer.doctor.devices import explain, look_at_devices
from layer_streamer.doctor.disk import look_at_disk, mount_of, try_direct
from layer_streamer.doctor.facts import Fact, learn, notices, one_line
from layer_streamer.doctor.gpus import PcieLink, look_at_gpus
from layer_streamer.doctor.memory import look_at_memory, try_page_locking
from layer_streamer.doctor.versions import look_at_versions
from layer_streamer.machine import identity

CARD = "GPU-aa, 00000000:17:00.0, NVIDIA L4, 550.54, 23034, 22500, 1, 16, 4, 16"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any GPU, nvidia-smi or driver; its folder."""
    monkeypatch.setattr(doctor_gpus, "NODES", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(doctor_gpus, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(doctor_gpus, "WSL_SMI", tmp_path / "missing")
    monkeypatch.setattr(doctor_gpus, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(doctor_gpus, "_driver_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "pci").mkdir()
    (tmp_path / "bin").mkdir()
    return tmp_path


def install_smi(system: Path, script: str) -> None:
    """An nvidia-smi that does this."""
    program = system / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def plug_in(system: Path, vendor: str = "0x10de", **files: str) -> None:
    """A GPU on the bus."""
    folder = system / "pci" / "0000:17:00.0"
    folder.mkdir()
    for name, text in {"vendor": vendor, "class": "0x030000", **files}.items():
        (folder / name).write_text(f"{text}\n")


def test_nothing_at_all_is_no_gpu_and_no_error(system: Path) -> None:
    found = look_at_gpus()
    assert not found.has_nvidia
    assert (found.cards.value, found.cards.reason) == (None, "nvidia-smi is not installed")
    assert explain(look_at_devices()) is None


def test_a_gpu_that_nvidia_smi_lists_is_read_as_it_says(system: Path) -> None:
    install_smi(system, f"echo '{CARD}'")
    found = look_at_gpus()
    (card,) = found.cards.value or ()
    assert (card.uuid, card.bus, card.name) == ("GPU-aa", "0000:17:00.0", "NVIDIA L4")
    assert (card.total, card.free) == (23034 << 20, 22500 << 20)
    assert card.link == PcieLink(1, 16, 4, 16)
    assert found.driver == Fact("550.54")


def test_what_nvidia_smi_does_not_know_of_the_link_comes_from_the_bus(system: Path) -> None:
    link = {
        "current_link_speed": "8.0 GT/s PCIe", "current_link_width": "8",
        "max_link_speed": "16.0 GT/s PCIe", "max_link_width": "16",
    }  # fmt: skip
    plug_in(system, **link)
    install_smi(system, "echo 'GPU-aa, 00000000:17:00.0, L4, 550.54, 1, 1" + ", [N/A]" * 4 + "'")
    (card,) = look_at_gpus().cards.value or ()
    assert card.link == PcieLink(3, 8, 4, 16)


@pytest.mark.parametrize("speed", ["Unknown", "", "x GT/s", "3.0 GT/s", "0"])
def test_a_link_that_says_nothing_sensible_is_none(system: Path, speed: str) -> None:
    plug_in(system, current_link_speed=speed, current_link_width="255")
    (gpu,) = look_at_gpus().pci
    assert str(gpu.link) == ""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'NVIDIA-SMI has failed'; exit 9", "nvidia-smi: NVIDIA-SMI has failed"),
        ("exit 4", "nvidia-smi: exit code 4"),
        ("echo a, b, c", "nvidia-smi: a, b, c"),
    ],
)
def test_an_nvidia_smi_that_fails_says_so_in_one_line(
    system: Path, script: str, reason: str
) -> None:
    install_smi(system, script)
    assert look_at_gpus().cards == Fact(None, reason)


def test_a_driver_that_hangs_is_not_asked_again_by_torch(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_smi(system, "exec sleep 30")
    (system / "nvidiactl").touch()
    monkeypatch.setattr(doctor_gpus, "SMI_SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    monkeypatch.setattr(doctor_devices, "this_machine", lambda: pytest.fail("asked"))
    found = look_at_devices()
    assert found.system.hangs
    assert "gave no answer" in (explain(found) or ("",))[0]


def test_a_gpu_on_the_bus_without_a_driver_is_seen(system: Path) -> None:
    plug_in(system)
    assert look_at_gpus().has_nvidia
    what, advice = explain(look_at_devices()) or ("", "")
    assert ("CPU build" in what) == (torch.version.cuda is None)
    assert advice


@pytest.mark.parametrize(("vendor", "kind"), [("0x1002", "0x030000"), ("0x10de", "0x040300")])
def test_other_devices_on_the_bus_are_no_nvidia_gpu(system: Path, vendor: str, kind: str) -> None:
    plug_in(system, vendor, **{"class": kind})
    assert not look_at_gpus().has_nvidia


@pytest.fixture
def one_gpu(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees the GPU that nvidia-smi lists."""
    install_smi(system, f"echo '{CARD}'")
    properties = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, total_memory=22 << 30, uuid="aa"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: pytest.fail("a context"))


@pytest.mark.usefixtures("one_gpu")
def test_of_a_gpu_that_the_driver_lists_no_context_is_made() -> None:
    (gpu,) = look_at_devices().gpus
    assert (gpu.name, gpu.architecture, gpu.trouble) == ("NVIDIA L4", "sm_89", "")
    assert gpu.free == Fact(22500 << 20)


@pytest.mark.usefixtures("one_gpu")
def test_an_architecture_that_torch_lacks_is_the_gpus_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "compute_90"])
    (gpu,) = look_at_devices().gpus
    assert "compute capability 8.9" in gpu.trouble and "sm_90" in gpu.trouble


@pytest.mark.usefixtures("system")
def test_what_torch_warns_of_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn("CUDA initialization: too old (found version 11040).\nMore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert look_at_devices().torch_said == "CUDA initialization: too old (found version 11040)."


@pytest.mark.usefixtures("one_gpu")
def test_a_driver_that_fails_later_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = look_at_devices()
    assert found.torch_said == "CUDA error: unspecified launch failure"
    assert explain(found) is not None or torch.version.cuda is None


def test_memory_that_cannot_be_looked_at_is_unknown_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> None:
        raise PermissionError(13, "Permission denied", "/proc/meminfo")

    monkeypatch.setattr(doctor_memory.psutil, "virtual_memory", broken)
    monkeypatch.setattr(doctor_memory, "HUGE_PAGES", tmp_path / "missing")
    found = look_at_memory()
    assert found.total == Fact(None, "/proc/meminfo: Permission denied")
    assert found.huge_pages.reason.endswith("missing: No such file or directory")


def test_locking_for_a_device_locks_memory_and_mapped_pages_and_gives_them_back(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, 2)
    file = tmp_path / "model.safetensors"
    device = FakeDevice(seed=1)
    trials = try_page_locking([device], file)
    assert [(trial.said, trial.locked) for trial in trials][1] == ("", file.stat().st_size)
    assert trials[0].locked == trials[0].asked > 0
    assert device._pinned == set()


def test_what_a_device_refuses_is_said_with_its_reason(tmp_path: Path) -> None:
    class Refusing(FakeDevice):
        def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
            logging.getLogger("layer_streamer.devices").warning("refused (801)")
            return False

    tiny_checkpoint(tmp_path, 2)
    for trial in try_page_locking([Refusing(seed=1)], tmp_path / "model.safetensors"):
        assert (trial.locked, trial.said) == (0, "refused (801)")
    missing = try_page_locking([FakeDevice(seed=1)], tmp_path / "missing")[1]
    assert missing.said.endswith("missing: No such file or directory")


def test_without_a_gpu_the_largest_size_that_the_system_locks_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        doctor_memory, "_lock", lambda size: "" if size <= 65536 else "Cannot allocate memory"
    )
    (trial,) = try_page_locking([CpuDevice()], None)
    assert (trial.locked, trial.said) == (65536, "Cannot allocate memory")
    monkeypatch.setattr(doctor_memory, "_lock", lambda size: "Operation not permitted")
    assert try_page_locking([], None)[0].locked == 0


def test_a_mount_points_name_may_hold_any_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a\u2028 b"
    place.mkdir()
    escaped = str(place).replace(" ", "\\040")
    table = f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\nodd\n2 1 0:9 / {escaped} rw - 9p host rw\n"
    (tmp_path / "mountinfo").write_text(table)
    monkeypatch.setattr(identity, "MOUNTS", tmp_path / "mountinfo")
    found = mount_of(place)
    assert found is not None
    assert (found.point, found.type, found.source) == (str(place), "9p", "host")


@pytest.mark.parametrize(
    ("kind", "medium", "slow"),
    [
        ("tmpfs", "in memory", False), ("nfs4", "not a local disk", True),
        ("fuse.sshfs", "not a local disk", True), ("9p", "not a local disk", True),
        ("overlay", "layers of a container", False), ("ext4", "a rotating disk (sdx)", True),
    ],
)  # fmt: skip
def test_what_a_file_system_is_on_follows_from_its_type_and_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, medium: str, slow: bool
) -> None:
    (tmp_path / "mountinfo").write_text(f"1 0 8:1 / / rw - {kind} /dev/sdx1 rw\n")
    monkeypatch.setattr(identity, "MOUNTS", tmp_path / "mountinfo")
    partition = tmp_path / "sdx" / "sdx1"
    (tmp_path / "sdx" / "queue").mkdir(parents=True)
    (tmp_path / "sdx" / "queue" / "rotational").write_text("1\n")
    partition.mkdir()
    (partition / "partition").write_text("1\n")
    (tmp_path / "sdx1").symlink_to(partition)
    monkeypatch.setattr(doctor_disk, "BLOCKS", tmp_path)
    tiny_checkpoint(tmp_path, 2)
    found = look_at_disk(read_manifest(tmp_path / "model.safetensors"))
    assert (found.medium.value or "").startswith(medium)
    assert bool(found.slow) == slow
    assert found.cached.value is not None and found.free.value


@pytest.mark.parametrize(("name", "at"), [("open_direct", "open"), ("read_direct", "read")])
def test_a_direct_read_that_is_refused_says_at_which_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(5000))
    monkeypatch.setattr(doctor_disk, "open_direct", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(doctor_disk, name, lambda *arguments: refuse())
    before = open_descriptors()
    assert (try_direct(file).refused_at, try_direct(file).said) == (at, "Invalid argument")
    assert open_descriptors() == before


def test_the_cache_folder_is_tried_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep" / "cache"))
    found = look_at_disk(None)
    assert (found.cache_fault, found.path) == ("", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "deep").touch()
    assert look_at_disk(None).cache_fault == f"{tmp_path / 'deep'} is not a directory"


def test_without_a_home_there_is_no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    found = look_at_disk(None)
    assert found.cache_folder.value is None
    assert found.cache_fault == "there is no home directory"


@pytest.mark.parametrize(
    ("environment", "files", "kind"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [], "kubernetes"),
        ({}, [".dockerenv"], "docker"),
        ({"container": "lxc"}, [], "lxc"),
        ({}, ["kubepods"], "kubepods"),
        ({}, [], None),
    ],
)
def test_a_container_is_known_by_its_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Any, files: Any, kind: str | None
) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cgroup").write_text("".join(f"0::/{name}\n" for name in files))
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor_versions, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(doctor_versions, "CONTAINER_FILES", ((tmp_path / ".dockerenv", "docker"),))
    assert look_at_versions().container.value == kind


def test_versions_are_those_that_are_installed() -> None:
    found = look_at_versions()
    assert found.torch == torch.__version__
    assert set(found.packages) <= set(doctor_versions.PACKAGES)
    assert "gguf" in found.packages


def test_whatever_is_raised_becomes_a_reason_of_one_line() -> None:
    def fail(error: Exception) -> Any:
        raise error

    for error, reason in (
        (ValueError("a\nb"), "a"), (ConfigError("a\nb"), "a\\nb"),
        (KeyError("x"), "KeyError: 'x'"), (ValueError(), "ValueError"),
        (OSError(2, "No such file", "/x"), "/x: No such file"), (MemoryError(), "MemoryError"),
    ):  # fmt: skip
        assert learn(lambda error=error: fail(error)) == Fact(None, reason)
        assert one_line(error) == reason
    with pytest.raises(KeyboardInterrupt):
        learn(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_notices_are_collected_once_and_logged_no_more(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("layer_streamer.anything")
    with notices() as said:
        for _ in range(2):
            logger.warning("a %s", "b")
        logger.info("no")
    assert said == ["a b"]
    assert caplog.records == []
    logger.warning("later")
    assert [record.getMessage() for record in caplog.records] == ["later"]


def test_a_gpu_that_can_be_used_needs_no_explanation() -> None:
    assert explain(SimpleNamespace(gpus=(1,), system=ONE_GPU)) is None  # type: ignore[arg-type]
