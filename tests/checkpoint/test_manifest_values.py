"""A manifest as a value: pickled, copied, compared, opened again; and never changed."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import smollm2
from checkpoints import tiny_checkpoint, tiny_tensors, write_gguf, write_safetensors
from interpreters import run_script

from layer_streamer import (
    CheckpointChangedError,
    ConfigError,
    LayerStreamer,
    Manifest,
    plan_checkpoint,
    read_manifest,
)
from layer_streamer.checkpoint.manifest import FrozenMapping, manifest_from_tensor_info

PATTERN = "h.{i}.mlp."


def of_safetensors(directory: Path) -> Manifest:
    tensors = tiny_tensors(3, dtype=torch.bfloat16)
    names = list(tensors)
    for part, some in enumerate((names[::2], names[1::2])):
        metadata = {"format": "pt"}
        path = directory / f"model-{part}.safetensors"
        write_safetensors(path, {name: tensors[name] for name in some}, metadata=metadata)
    return read_manifest(directory)


def of_gguf(directory: Path) -> Manifest:
    tensors = {f"h.{i}.mlp.w": np.full(3, i, dtype=np.float32) for i in range(3)}
    keys = {"words": ["a", "\N{SNOWMAN}", ""], "scores": [0.5, -1.0], "flag": True, "text": "x"}
    return read_manifest(write_gguf(directory / "m.gguf", tensors, keys), PATTERN)


def of_tables(directory: Path) -> Manifest:
    tiny_checkpoint(directory, 2)
    parsed = read_manifest(directory)
    specs = [spec for layer in parsed.layers for spec in layer.tensors.values()]
    info = {spec.name: (spec.path.name, spec.offset, spec.shape) for spec in specs}
    keys = list(parsed.layers[0].tensors)
    sizes = {key: spec.nbytes // 4 for key, spec in parsed.layers[0].tensors.items()}
    offsets = {"model.safetensors": 0}
    return manifest_from_tensor_info(directory, info, offsets, keys, sizes, torch.float32, 2)


def of_real_gguf(directory: Path) -> Manifest:
    return read_manifest(smollm2())


@pytest.fixture(params=[of_safetensors, of_gguf, of_tables, of_real_gguf])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    made: Manifest = request.param(tmp_path)
    return made


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES: list[Callable[[Any], Any]] = [
    pickled,
    *(lambda value, p=p: pickle.loads(pickle.dumps(value, p)) for p in (2, 3)),
    copy.copy,
    copy.deepcopy,
    replace,
]


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_is_equal(manifest: Manifest, make: Callable[[Any], Any]) -> None:
    copied = make(manifest)
    assert copied == manifest
    assert copied.num_layers == manifest.num_layers
    assert copied.nbytes == manifest.nbytes
    assert copied.tensor(name := next(iter(manifest.layers[1].tensors.values())).name).name == name


def test_a_part_of_it_is_copied_as_well(manifest: Manifest) -> None:
    layer = manifest.layers[0]
    for part in (layer, layer.tensors, manifest.static, manifest.files, manifest.metadata):
        assert pickled(part) == part
        assert copy.deepcopy(part) == part


def test_one_that_differs_in_anything_is_not_equal(manifest: Manifest) -> None:
    assert manifest != replace(manifest, layers=manifest.layers[:1])
    assert manifest != replace(manifest, metadata={"a": 1})
    assert manifest != replace(manifest, layer_pattern="x.{i}.")


@pytest.mark.parametrize("make", [lambda value: value, pickled, copy.deepcopy])
def test_it_cannot_be_changed_by_whoever_has_it(
    manifest: Manifest, make: Callable[[Any], Any]
) -> None:
    manifest = make(manifest)
    mappings = (manifest.static, manifest.files, manifest.metadata, manifest.layers[0].tensors)
    for mapping in mappings:
        assert isinstance(mapping, Mapping)
        for change in (
            lambda m: m.__setitem__("a", 1),
            lambda m: m.__delitem__(next(iter(m), "a")),
            lambda m: m.update(a=1),
            lambda m: m.clear(),
            lambda m: setattr(m, "a", 1),
        ):
            with pytest.raises((TypeError, AttributeError)):
                change(mapping)
    with pytest.raises(FrozenInstanceError):
        manifest.path = Path()  # type: ignore[misc]


def test_a_mapping_takes_no_part_in_changes_of_what_it_was_made_from() -> None:
    given = {"a": 1}
    frozen = FrozenMapping(given)
    given["b"] = 2
    assert frozen == {"a": 1}
    assert repr(frozen) == "FrozenMapping({'a': 1})"


def test_arrays_of_a_gguf_file_are_loaded_from_it_when_a_copy_is_asked(tmp_path: Path) -> None:
    manifest = of_gguf(tmp_path)
    for copied in (pickled(manifest), copy.deepcopy(manifest)):
        assert copied.metadata["words"].load() == ["a", "\N{SNOWMAN}", ""]
        assert copied.metadata["scores"].load() == [0.5, -1.0]
        assert len(copied.metadata["words"]) == 3
    with (tmp_path / "m.gguf").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointChangedError, match="changed since it was opened"):
        copied.metadata["words"].load()


def test_a_real_vocabulary_comes_through_a_pickle_without_being_in_it() -> None:
    manifest = read_manifest(smollm2())
    raw = pickle.dumps(manifest)
    assert len(raw) < 60_000  # of 49,152 tokens
    tokens = pickle.loads(raw).metadata["tokenizer.ggml.tokens"].load()
    assert tokens == manifest.metadata["tokenizer.ggml.tokens"].load()
    assert len(tokens) == 49_152


def test_another_process_opens_what_it_is_sent(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 3)
    (tmp_path / "sent").write_bytes(pickle.dumps(read_manifest(tmp_path)))
    code = (
        "import pickle, sys\nfrom layer_streamer import LayerStreamer\n"
        "manifest = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with LayerStreamer.from_checkpoint(manifest, device='cpu') as streamer:\n"
        "    print(sum(float(w['mlp.up_proj.weight'].sum()) for _, w in streamer.sweep()))\n"
    )
    done = run_script(code, tmp_path / "sent")
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu") as streamer:
        total = sum(float(weights["mlp.up_proj.weight"].sum()) for _, weights in streamer.sweep())
    assert (float(done.stdout), done.stderr) == (total, "")


def test_the_pattern_by_which_layers_were_found_is_kept(tmp_path: Path) -> None:
    assert of_gguf(tmp_path).layer_pattern == PATTERN


class TestDoors:
    """What takes a path takes a manifest."""

    def test_headers_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = of_gguf(tmp_path)

        def refuse(*arguments: Any) -> None:
            pytest.fail("headers were read again")

        monkeypatch.setattr("layer_streamer.checkpoint.formats.read_gguf", refuse)
        plan = plan_checkpoint(manifest, device="cpu")
        with LayerStreamer.from_checkpoint(manifest, device="cpu") as streamer:
            assert streamer.manifest is manifest
            assert streamer.plan.tiers == plan.tiers
            for layer_idx, weights in streamer.sweep():
                assert weights["w"].tolist() == [layer_idx] * 3

    @pytest.mark.parametrize("open_it", [LayerStreamer.from_checkpoint, plan_checkpoint])
    def test_a_pattern_beside_a_manifest_is_refused(
        self, tmp_path: Path, open_it: Callable[..., Any]
    ) -> None:
        for pattern in (PATTERN, ""):
            with pytest.raises(ConfigError, match=r"layer_pattern=.*: not beside a Manifest"):
                open_it(of_gguf(tmp_path), layer_pattern=pattern, device="cpu")

    @pytest.mark.parametrize("change", ["longer", "shorter", "later", "gone"])
    @pytest.mark.parametrize("open_it", [LayerStreamer.from_checkpoint, plan_checkpoint])
    def test_a_file_that_has_changed_since_its_header_was_read_is_not_opened(
        self, tmp_path: Path, open_it: Callable[..., Any], change: str
    ) -> None:
        manifest = of_gguf(tmp_path)
        path = tmp_path / "m.gguf"
        raw, info = path.read_bytes(), path.stat()
        if change == "gone":
            path.unlink()
        elif change == "later":
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
        else:
            path.write_bytes(raw + b"x" if change == "longer" else raw[:-1])
        error = "No such file" if change == "gone" else r"m\.gguf: changed since it was opened"
        with pytest.raises(CheckpointChangedError.__bases__[0], match=error):
            open_it(manifest, device="cpu")
