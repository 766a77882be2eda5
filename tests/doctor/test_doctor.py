"""A checkup's screen and its JSON, from facts that are made up: what it says, and that it fits."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from doctoring import (
    CPU,
    DISK,
    FULL,
    GIB,
    GPU,
    MACHINE,
    MEMORY,
    NO_GPUS,
    ONE_GPU,
    VERSIONS,
    check_fits,
    marked,
    model_facts,
    report,
)
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from layer_streamer.doctor import report as doctor
from layer_streamer.doctor.devices import DeviceFacts
from layer_streamer.doctor.disk import DirectTrial, Mount
from layer_streamer.doctor.facts import Fact
from layer_streamer.doctor.gpus import PcieLink, PciGpu
from layer_streamer.doctor.memory import CgroupFact, LockTrial, Ulimits
from layer_streamer.doctor.report import Report, Request, document, screen

MIB = 1 << 20
ON_BUS = PciGpu("0000:17:00.0", "NVIDIA", FULL)
NO_DRIVER = replace(NO_GPUS, pci=(ON_BUS,))
OLD_DRIVER = replace(ONE_GPU, driver=Fact("470.82"), driver_cuda=Fact("11.4"))
BLIND = replace(GPU, gpus=())
"""A CUDA build of torch that sees no GPU."""


def warned(**parts: Any) -> list[str]:
    """The warnings on the screen, which fits."""
    text = screen(report(**parts))
    check_fits(text, 40)
    return marked(text)


def test_a_machine_without_fault_has_no_warnings() -> None:
    for devices in (CPU, GPU):
        assert warned(devices=devices) == []
        assert screen(report(devices=devices)).endswith("\nno warnings")


def test_without_a_gpu_it_says_that_the_cpu_computes() -> None:
    assert "none found: the CPU computes" in screen(report(devices=CPU))


@pytest.mark.parametrize(
    ("devices", "what", "advice"),
    [
        (replace(CPU, system=ONE_GPU), "RTX 4090: torch 2.11.0+cpu is a CPU build",
         "install a CUDA build of torch"),
        (replace(CPU, hip="6.2", system=ONE_GPU), "was built for ROCm 6.2", "a CUDA build"),
        (replace(BLIND, system=OLD_DRIVER), "driver 470.82 supports CUDA 11.4 at most, torch "
         "2.11.0+cu128 was built for CUDA 12.8", "update the driver, or install a torch built for"),
        (replace(BLIND, system=NO_DRIVER), "PCI 0000:17:00.0): no driver is loaded for it "
         "(nvidia-smi is not installed)", "install NVIDIA's driver; a container needs --gpus all"),
        (replace(BLIND, visible=""), "CUDA_VISIBLE_DEVICES='' hides every GPU", "unset it"),
        (replace(BLIND, visible="-1,0"), "CUDA_VISIBLE_DEVICES='-1,0' hides", "unset it"),
        (replace(BLIND, visible="1"), "CUDA_VISIBLE_DEVICES='1' hides every GPU", "unset it"),
        (replace(BLIND, visible="0", torch_said="CUDA unknown error"),
         "torch says: CUDA unknown error", "nvidia-smi"),
        (replace(BLIND, visible="GPU-1"), "torch does not see it", "nvidia-smi"),
        (replace(CPU, cuda="12.8", system=replace(ONE_GPU, hangs=True,
         cards=Fact(None, "nvidia-smi gave no answer within 10 s"))),
         "(/dev/nvidiactl): nvidia-smi gave no answer", "the driver hangs"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_named_with_the_reason_and_a_remedy(
    devices: DeviceFacts, what: str, advice: str
) -> None:
    (warning,) = warned(devices=devices)
    assert what in warning.split(" -> ")[0]
    assert advice in warning.split(" -> ")[1]


def test_a_gpu_of_an_architecture_that_torch_lacks_is_a_warning_of_its_own() -> None:
    trouble = "GTX 1080 has compute capability 6.1, this torch was built for sm_80; install another"
    old = replace(GPU.gpus[0], device="cuda:1", trouble=trouble)
    text = screen(report(devices=replace(GPU, gpus=(GPU.gpus[0], old))))
    (warning,) = marked(text)
    assert warning.startswith("cuda:1")
    assert warning.endswith("built for sm_80 -> install another")
    assert "cuda:0         NVIDIA GeForce RTX 4090 (sm_89)" in text


@pytest.mark.parametrize(
    ("link", "text", "warns"),
    [
        (PcieLink(5, 16, 5, 16), "PCIe gen 5 x16", False),
        (PcieLink(1, 16, 5, 16), "PCIe gen 1 of 5 x16", False),
        (PcieLink(3, 4, 4, 16), "PCIe gen 3 of 4 x4 of 16", True),
        (PcieLink(4, 4, 4, 4), "PCIe gen 4 x4", False),
        (PcieLink(None, None, None, None), "23.0 of 24.0 GiB free", False),
        (PcieLink(None, 8, None, None), "PCIe x8", False),
    ],
)
def test_the_link_is_shown_and_a_narrow_one_is_a_warning(
    link: PcieLink, text: str, warns: bool
) -> None:
    card = replace(ONE_GPU.cards.value[0], link=link)  # type: ignore[index]
    gpu = replace(GPU.gpus[0], card=card)
    shown = screen(report(devices=replace(GPU, gpus=(gpu,))))
    (row,) = (row for row in shown.splitlines() if "cuda:0   " in row)
    assert row.endswith(text)
    assert bool(marked(shown)) == warns


def test_a_container_of_little_memory_says_which_limit_it_is_and_who_sets_it() -> None:
    box = CgroupFact("/sys/fs/cgroup/docker/1234", 512 * MIB, 400 * MIB, 200 * MIB)
    slice_ = CgroupFact("/sys/fs/cgroup/docker", 32 * GIB, GIB, 31 * GIB)
    memory = replace(MEMORY, available=Fact(200 * MIB), cgroups=(box, slice_))
    (warning,) = warned(memory=memory)
    assert "limit 512 MiB, used 400 MiB, 200 MiB can be had: /sys/fs/cgroup/docker/1234" in warning
    assert "docker run --memory" in warning


def test_a_machine_of_little_memory_is_a_warning_of_the_host() -> None:
    (warning,) = warned(memory=replace(MEMORY, available=Fact(GIB)))
    assert warning.startswith("host ") and "1.00 GiB can be had" in warning


def test_little_lockable_memory_is_a_warning_and_how_to_raise_it() -> None:
    trial = LockTrial("mlock", 64 * MIB, 64 << 10, "Cannot allocate memory", False)
    memory = replace(MEMORY, ulimits=Fact(Ulimits(64 << 10, None, 1024)))
    (warning,) = warned(memory=memory, page_locking=(trial,))
    assert "64.0 KiB of 64.0 MiB locked (Cannot allocate memory)" in warning
    assert "ulimit -l unlimited (docker run --ulimit memlock=-1)" in warning
    assert "locked memory 64.0 KiB" in screen(report(memory=memory))


def test_without_a_gpu_a_common_limit_on_locked_memory_is_no_warning() -> None:
    trial = LockTrial("mlock", 64 * MIB, 8 * MIB, "Cannot allocate memory", False)
    assert warned(page_locking=(trial,)) == []


def test_page_locking_that_a_gpu_is_refused_is_a_warning() -> None:
    trial = LockTrial("pages of the mapped file", 64 * MIB, 0, "cudaErrorNotSupported", True)
    (warning,) = warned(devices=GPU, page_locking=(trial,))
    assert "nothing of 64.0 MiB locked (cudaErrorNotSupported)" in warning


@pytest.mark.parametrize(
    ("ulimits", "num_files", "advice"),
    [
        (Ulimits(None, 8 * GIB, 1024), 1, "ulimit -v unlimited"),
        (Ulimits(None, None, 64), 1, "ulimit -n 256"),
    ],
)
def test_low_ulimits_are_warnings(ulimits: Ulimits, num_files: int, advice: str) -> None:
    (warning,) = warned(memory=replace(MEMORY, ulimits=Fact(ulimits)))
    assert advice in warning


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        (Fact("/root/.cache/layer-streamer"), "/root/.cache/layer-streamer: cannot be written: no"),
        (Fact(None, "no home"), "none: no"),
    ],
)
def test_a_cache_folder_that_cannot_be_written_is_one_warning(folder: Fact[str], text: str) -> None:
    (warning,) = warned(disk=replace(DISK, cache_folder=folder, cache_fault="no"))
    assert text in warning and "set XDG_CACHE_HOME" in warning


def test_a_disk_that_refuses_direct_reads_says_when() -> None:
    for at in ("open", "read"):
        trial = DirectTrial(at, "Invalid argument", Fact(None, "old kernel"))
        text = screen(report(disk=replace(DISK, direct=Fact(trial))))
        assert f"refused at {at} (Invalid argument)" in text


def test_a_model_without_a_plan_is_one_warning_and_a_failure() -> None:
    failed = report(model=Fact(None, "/m: no .safetensors or .gguf file in it"))
    (warning,) = marked(screen(failed))
    assert "no .safetensors or .gguf file in it" in warning
    assert failed.failed and not report().failed


def test_a_plan_for_the_cpu_for_want_of_the_gpu_says_so() -> None:
    facts = report(model=Fact(model_facts(MACHINE)), planned_for="torch is a CPU build")
    assert "planned for    the CPU: torch is a CPU build" in screen(facts)


def test_every_layer_is_shown_with_its_tier() -> None:
    facts = model_facts(
        replace(MACHINE, host_available=10 * GIB), device_budget="6GiB", host_budget="4GiB"
    )
    text = screen(report(devices=GPU, model=Fact(facts)))
    (row,) = (row for row in text.splitlines() if "by layer" in row)
    marks = row.split("(")[0].removeprefix("  by layer").replace(" ", "")
    tiers = {"D": "device", "h": "host", ".": "disk"}
    assert [tiers[mark] for mark in marks] == list(facts.plan["tiers"])
    for tier in facts.tiers:
        assert {facts.plan["tiers"][i] for i in tier.layers} == {tier.tier}
    assert "as many as --device-budget 6GiB holds beside 3 slots of 444 MiB" in " ".join(
        text.split()
    )


def test_predicted_seconds_come_with_the_rates_that_they_are_from() -> None:
    text = screen(report(model=Fact(model_facts(MACHINE, device_budget="6GiB"))))
    assert "0.41 s, bound by copy" in text and "copy 25.00 GB/s" in text
    unknown = replace(MACHINE, rates=replace(MACHINE.rates, copy=(None,)))
    assert "`layer-streamer probe MODEL`" in screen(report(model=Fact(model_facts(unknown))))


NASTY = st.text(st.characters(), max_size=300) | st.just("x" * 5000) | st.just("\x1b[31m\udcff\n")
FACTS = st.builds(Fact, st.none() | NASTY, NASTY)


@settings(deadline=None, max_examples=25)
@given(NASTY, FACTS, st.integers(0, 40), st.booleans())
def test_whatever_the_facts_say_the_report_is_one_screen(
    text: str, fact: Fact[str], count: int, with_model: bool
) -> None:
    gpu = replace(GPU.gpus[0], name=text)
    facts = report(
        versions=replace(VERSIONS, kernel=text, distribution=fact, container=fact),
        devices=replace(GPU, cpu=fact, gpus=(gpu,) * count, visible="0", torch_said=text),
        memory=replace(
            MEMORY, huge_pages=fact, cgroups=(CgroupFact(text, 1, 1, 1),) * count,
        ),
        disk=replace(
            DISK, path=text, mount=Fact(Mount(text, text, text, text)), medium=fact,
            cache_folder=fact, cache_fault=text,
        ),
        model=Fact(model_facts(MACHINE, 300 + count)) if with_model else None,
        notices=(text,) * count,
    )  # fmt: skip
    # As much as there can be: a usual machine needs half.
    check_fits(screen(facts), 110)
    assert json.loads(json.dumps(document(facts))) == document(facts)


def test_a_crowded_machine_still_fits() -> None:
    gpus = tuple(replace(GPU.gpus[0], device=f"cuda:{i}") for i in range(8))
    cgroups = tuple(CgroupFact(f"/sys/fs/cgroup/{i}", GIB, 0, GIB) for i in range(5))
    facts = report(devices=replace(GPU, gpus=gpus), memory=replace(MEMORY, cgroups=cgroups))
    check_fits(screen(facts), 40)
    model = Fact(model_facts(MACHINE, 126, device_budget="6GiB"))
    check_fits(screen(replace(facts, model=model)), 55)


def test_json_has_every_group() -> None:
    facts = report(devices=GPU, model=Fact(model_facts(MACHINE, device_budget="6GiB")))
    found = document(facts)
    assert set(found) == {field.name for field in fields(Report)}
    assert found["model"]["value"]["plan"]["tiers"][1] == "device"
    assert found["devices"]["gpus"][0]["card"]["link"]["width"] == 16
    assert found["model"]["value"]["changes"][0]["flag"] == "--device-budget 14GiB"


def test_with_a_driver_that_hangs_no_plan_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path, 2)
    hanging = replace(CPU, system=replace(ONE_GPU, hangs=True, cards=Fact(None, "no answer")))
    monkeypatch.setattr(doctor, "look_at_devices", lambda: hanging)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    found = doctor.examine(Request(tmp_path, {}))
    assert found.model == Fact(None, "no answer")
    assert found.page_locking[0].for_device is False


def test_a_device_with_memory_of_its_own_is_tried_and_planned_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path, 12, hidden=64)
    monkeypatch.setattr(doctor, "open_devices", lambda names: (FakeDevice(seed=1),))
    found = doctor.examine(Request(tmp_path, {"device_budget": "400KiB"}))
    assert [trial.said for trial in found.page_locking] == ["", ""]
    assert found.model is not None and found.model.value is not None
    assert [tier.tier for tier in found.model.value.tiers] == ["device", "host"]
    assert "page-locked" in found.model.value.tiers[1].why
    text = screen(found)
    check_fits(text, 55)
    assert "keeps all 12 layers in device memory: nothing instead of" in text


def test_the_page_shows_a_warning_as_it_is() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    text = screen(report(devices=replace(BLIND, system=OLD_DRIVER)))
    rows = text.splitlines()
    begin = next(number for number, row in enumerate(rows) if row.startswith("! gpu"))
    assert "\n".join(rows[begin : begin + 3]) in page
