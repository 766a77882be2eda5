"""Which device is taken, and what is said of one that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layer_streamer import ConfigError
from layer_streamer.devices import accelerator
from layer_streamer.devices.accelerator import check_architecture, open_device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class FakePath:
    """Stands in for Path: a driver's files that are there, or not."""

    def __init__(self, present: dict[str, str]) -> None:
        self._present = present

    def __call__(self, name: str) -> Any:
        text = self._present.get(name)

        class Entry:
            def exists(self) -> bool:
                return text is not None

            def read_text(self, errors: str = "") -> str:
                return text or ""

        return Entry()


def test_without_a_gpu_the_cpu_is_taken(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "Path", FakePath({}))
    assert open_device(None).torch_device == torch.device("cpu")


@pytest.mark.parametrize(
    ("present", "found"),
    [
        (
            {"/proc/driver/nvidia/version": "NVRM version: NVIDIA 580.159.04 x86_64\nGCC 12"},
            "NVIDIA 580.159.04",
        ),
        ({"/dev/nvidiactl": ""}, "/dev/nvidiactl"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_never_answered_by_the_cpu_in_silence(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, present: dict[str, str], found: str
) -> None:
    monkeypatch.setattr(accelerator, "Path", FakePath(present))
    for device in (None, "cuda"):
        with pytest.raises(ConfigError, match=found) as caught:
            open_device(device)
        assert torch.__version__ in str(caught.value)
    assert open_device("cpu").torch_device == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused_by_name(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "Path", FakePath({}))
    with pytest.raises(ConfigError, match="device='cuda:3': no NVIDIA GPU was found"):
        open_device("cuda:3")
    with pytest.raises(ConfigError, match="device='xpu'"):
        open_device("xpu")


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
        ((10, 0), ["sm_90"], False),
    ],
)
def test_a_gpu_this_torch_has_no_code_for_is_refused_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: list[str], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    if runs:
        check_architecture(0)
    else:
        with pytest.raises(ConfigError, match=rf"Some GPU has .* {capability[0]}\.") as caught:
            check_architecture(0)
        assert archs[0] in str(caught.value)
