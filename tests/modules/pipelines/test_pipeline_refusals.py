"""What a pipeline with streamed components is not: one line each, and nothing is half-done."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import one_torch_thread
from recipes import quiet
from tiny_models import tiny_model
from tiny_pipelines import picture, streamed

from layer_streamer import CheckpointError, ConfigError, StreamerError, stream
from layer_streamer.modules.hub import local_folder

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)


@pytest.fixture
def copy(flux: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    shutil.copytree(flux, tmp_path / "flux")
    return tmp_path / "flux"


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to half": (lambda p: p.to(torch.float16), "transformer: .*cannot be moved or cast"),
    "to meta": (lambda p: p.to("meta"), "transformer: .*cannot be moved or cast"),
    "to device and dtype": (lambda p: p.to("cpu", torch.float16), "cannot be moved or cast"),
    "by keywords": (lambda p: p.to(device="meta"), "cannot be moved or cast"),
    "model offload": (lambda p: p.enable_model_cpu_offload(), "stream already"),
    "sequential offload": (lambda p: p.enable_sequential_cpu_offload(device="cpu"), "already"),
    "group offload": (lambda p: p.enable_group_offload("cpu"), "stream already"),
    "a component's": (lambda p: p.transformer.enable_group_offload("cpu"), "^transformer.*already"),
    "saving": (lambda p: p.save_pretrained("/nowhere"), "nothing to save"),
    "fusing": (lambda p: p.fuse_lora(), "cannot be changed"),
    "a component's fusing": (lambda p: p.transformer.fuse_lora(), "cannot be changed"),
    "state": (lambda p: p.transformer.state_dict(), "no state_dict"),
}


def test_what_streamed_components_cannot_do_is_one_line_and_changes_nothing(flux: Path) -> None:
    with streamed(flux) as pipe:
        before = picture(pipe)
        devices = {p.device for p in pipe.vae.parameters()}
        for action, words in REFUSED.values():
            with pytest.raises(StreamerError, match=words) as raised:
                action(pipe)
            assert "\n" not in str(raised.value)
            assert {p.device for p in pipe.vae.parameters()} == devices
            assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
        assert torch.equal(picture(pipe), before)


def test_a_pipeline_is_where_it_was_asked_to_be_and_may_be_moved_there(flux: Path) -> None:
    with streamed(flux) as pipe:
        assert pipe.device == pipe._execution_device == torch.device("cpu")
        assert pipe.dtype is torch.float32
        for same in ("cpu", torch.device("cpu"), torch.float32):
            assert pipe.to(same) is pipe
        assert pipe.to("cpu", torch.float32) is pipe
        assert pipe.to(device="cpu", dtype=torch.float32) is pipe


def _without(name: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for path in [*folder.glob(f"{name}/*.safetensors")]:
            path.unlink()

    return remove


def _entry(name: str, value: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, name: value}))

    return change


def _spoil_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, path)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "encoder without weights": (_without("text_encoder_2"), r"^text_encoder_2: "),
    "transformer without weights": (_without("transformer"), r"^transformer: "),
    "vae without weights": (_without("vae"), r"^vae: "),
    "no config": (
        lambda f: (f / "transformer" / "config.json").unlink(),
        r"^transformer: .*no con",
    ),
    "no folder": (lambda f: shutil.rmtree(f / "text_encoder_2"), r"^text_encoder_2: "),
    "a parameter missing": (_spoil_tensor, r"^transformer: .*transformer_blocks\.1\.attn\.to_q"),
    "no such class": (
        _entry("transformer", ["diffusers", "NoSuchModel"]),
        r"^transformer: diffusers .* has no class 'NoSuchModel'",
    ),
    "another class": (_entry("text_encoder_2", ["transformers", "BertModel"]), "^text_encoder_2: "),
    "no such pipeline": (_entry("_class_name", "NoSuchPipeline"), "has no class 'NoSuchPipeline'"),
    "a component too few": (_entry("scheduler", [None, None]), "FluxPipeline cannot be made of it"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_folder_that_lacks_something_is_told_so_by_component(copy: Path, what: str) -> None:
    before = threading.active_count()
    spoil, words = SPOILED[what]
    spoil(copy)
    with quiet(), pytest.raises(StreamerError, match=words) as raised:
        stream(copy, device="cpu")
    assert "\n" not in str(raised.value)
    assert threading.active_count() <= before


def test_a_budget_below_the_slots_of_all_is_refused_and_nothing_is_open(flux: Path) -> None:
    before = threading.active_count()
    with quiet(), pytest.raises(ConfigError, match=r"device_budget=.*: needs at least .* of slots"):
        stream(flux, device="cpu", device_budget=1000)
    assert threading.active_count() <= before


@pytest.mark.parametrize("name", ["device_map", "quantization_config", "torch_dtype", "variant"])
def test_what_is_no_component_is_no_option(flux: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name!r} is none of what FluxPipeline is made of: sche"
    ):
        stream(flux, device="cpu", model_options={name: "x"})


def test_classes_and_folders_of_different_kinds_are_told_apart(flux: Path, tmp_path: Path) -> None:
    import diffusers
    import transformers

    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no model_index\.json: FluxPipeline is a pipeline"):
        stream(diffusers.FluxPipeline, tmp_path)
    with pytest.raises(ConfigError, match="a pipeline, and LlamaModel is no class of pipelines"):
        stream(transformers.LlamaModel, flux)
    with pytest.raises(ConfigError, match=r"stream\(FluxPipeline, path\): say where"):
        stream(diffusers.FluxPipeline)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="stacks=: not with a pipeline"):
        stream(flux, stacks=["blocks.{i}."])
    model = stream(transformers.LlamaForCausalLM, tmp_path, device="cpu")
    assert type(model) is transformers.LlamaForCausalLM
    model.layer_streamer.close()


def test_a_pipeline_without_enough_blocks_is_told_to_load_as_ever(flux: Path) -> None:
    given = {"transformer": None, "text_encoder": None, "text_encoder_2": None}
    with pytest.raises(ConfigError, match="no component of FluxPipeline has enough blocks"):
        stream(flux, device="cpu", model_options=given)


def test_a_failure_after_all_are_open_closes_them(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    before = threading.active_count()
    monkeypatch.setattr(diffusers.AutoencoderKL, "to", full)
    with quiet(), pytest.raises(torch.OutOfMemoryError):
        stream(flux, device="cpu")
    assert threading.active_count() <= before


def test_of_a_repository_the_components_files_are_downloaded_without_variants(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repository, cache = tmp_path / "repository", tmp_path / "cache"
    shutil.copytree(flux, repository)
    weights = repository / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(weights, repository / "flux1-dev.safetensors")

    def download(
        name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        assert name == "owner/flux"
        for path in repository.rglob("*"):
            place = path.relative_to(repository).as_posix()
            wanted = any(fnmatch.fnmatch(place, pattern) for pattern in allow_patterns)
            if any(fnmatch.fnmatch(place, pattern) for pattern in ignore_patterns or ()):
                wanted = False
            if path.is_file() and wanted:
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/flux") == cache
    assert {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()} == {
        p.relative_to(flux).as_posix() for p in flux.rglob("*") if p.is_file()
    }
    with one_torch_thread(), quiet():
        pipe: Any = stream("owner/flux", device="cpu")
        assert next(iter(pipe.layer_streamer.components)) == "transformer"
        pipe.layer_streamer.close()


def test_a_repository_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"owner/flux: cannot be had from the hub: no network$"
    ):
        stream("owner/flux")
