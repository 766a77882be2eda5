"""What is no checkpoint is named for what it is, in one line that says what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    gguf_bytes,
    gguf_kv,
    gguf_string,
    gguf_tensor,
    tiny_checkpoint,
    write_gguf,
    write_raw_safetensors,
    write_safetensors,
)
from hostile import rejection
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer import CheckpointError, read_json
from layer_streamer.checkpoint.formats import read_manifest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 4976698672\n" % (
    b"0" * 64
)
AGAIN = "download it again"


def made(write: Callable[[io.BytesIO], object]) -> bytes:
    """The bytes that ``write`` writes into a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.safetensors", b"x")


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model"), io.BytesIO())


CONTENTS: dict[str, tuple[bytes, str, str]] = {
    "pointer": (POINTER, "a Git LFS pointer of 135 bytes", "`git lfs pull`"),
    "old pointer": (POINTER.replace(b"git-lfs", b"hawser"), "a Git LFS pointer", "git lfs pull"),
    "empty": (b"", "0 bytes, an empty file", AGAIN),
    "page": (b"<!DOCTYPE html><html><body>401</body></html>", "an HTML page", AGAIN),
    "marked page": (b"\xef\xbb\xbf\r\n<HTML>" + bytes(900), "an HTML page", AGAIN),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document", AGAIN),
    "refusal": (b'{"error":"Repository not found"}', '{"error":"Repository not found"}', AGAIN),
    "sentence": ("Accès refusé à ce modèle".encode(), "'Accès refusé à ce modèle'", AGAIN),
    "zeros": (bytes(4096), "begins with zeros", AGAIN),
    "torch zip": (made(lambda f: torch.save({"w": torch.zeros(3)}, f)), "pickled PyTorch", "conv"),
    "torch old": (
        made(lambda f: torch.save({"w": 1}, f, _use_new_zipfile_serialization=False)),
        "pickled PyTorch weights are not read",
        "convert them to safetensors",
    ),
    "pickle": (pickle.dumps({"w": 1}, 4), "pickled PyTorch", "convert"),
    "zip": (made(zipped), "an archive", "unpack it"),
    "tar": (made(tarred), "an archive", "unpack it"),
    "gzip": (gzip.compress(b"model"), "an archive", "unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "in safetensors"),
    "numpy": (made(lambda f: np.save(f, np.zeros(3))), "a NumPy array", "in safetensors"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99), "an ONNX model", "safetensors"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite", "in safetensors"),
    "ggml": (b"tjgg\3\0\0\0" + bytes(99), "from before GGUF", "take a GGUF file"),
    "utf-16": ("{}".encode("utf-16"), "text in UTF-16", "save it as UTF-8"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "blob"])
@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_holds_something_else_is_named_for_it(
    tmp_path: Path, case: str, name: str
) -> None:
    content, what, to_do = CONTENTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    said = rejection(path)
    assert f"{path}: " in said
    assert what in said
    assert to_do in said
    if name != "blob":
        assert rejection(tmp_path) == said


def test_content_decides_where_a_name_says_another_format(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.gguf", {"blk.0.w": torch.zeros(2)})
    write_gguf(tmp_path / "b.safetensors", {"blk.0.w": np.zeros(4, np.float32)})
    assert read_manifest(tmp_path / "a.gguf").format == "safetensors"
    assert read_manifest(tmp_path / "b.safetensors").format == "gguf"
    assert "a GGUF file by its content: name it .gguf" in rejection(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("case", ["pointer", "page", "empty", "sentence", "zip"])
def test_json_that_is_something_else_is_named_for_it(tmp_path: Path, case: str, name: str) -> None:
    content, what, _ = CONTENTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        (read_json if name == "config.json" else read_manifest)(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert what in str(caught.value)


def test_a_file_beside_the_weights_that_is_named_for_them_points_to_its_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "name the folder that it is in" in rejection(tmp_path / "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda some: st.lists(some) | st.dictionaries(st.text(), some),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(value=JSON, coding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), crlf=st.booleans())
def test_json_is_read_with_every_mark_and_line_end(
    tmp_path_factory: pytest.TempPathFactory, value: Any, coding: str, crlf: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    text = json.dumps(value, indent=1)
    path.write_bytes((text.replace("\n", "\r\n") if crlf else text).encode(coding))
    assert read_json(path) == value


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes().replace(b" ", b"\r\n"))
    assert read_manifest(tmp_path).num_layers == 4


@pytest.mark.parametrize("text", ["{", '{"a": tru}', "[1, 2", '{"a": "\xff"}', "[" * 100_000])
def test_json_with_a_fault_in_it_says_where(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON: .") as caught:
        read_json(path)
    assert "begins with" not in str(caught.value)
    assert "\n" not in str(caught.value)


FOLDERS: dict[str, tuple[list[str], list[str]]] = {
    "pickles": (["pytorch_model-00001-of-00002.bin", "config.json"], ["convert them to safeten"]),
    "meta": (["consolidated.00.pth", "params.json"], ["convert them to safetensors"]),
    "checkpoint": (["model.pt"], ["convert them to safetensors"]),
    "pipeline": (
        ["model_index.json", "vae/diffusion.safetensors", "transformer/model.safetensors"],
        ["a diffusers pipeline", "transformer, vae"],
    ),
    "pipeline with a file": (
        ["model_index.json", "flux.safetensors", "transformer/model.safetensors"],
        ["a diffusers pipeline", "name the folder of one of them", "transformer"],
    ),
    "cache": (["refs/main", "snapshots/0a1b/model.safetensors"], ["snapshots/0a1b"]),
    "parent": (["checkpoint-500/model.safetensors"], ["checkpoints in checkpoint-500"]),
    "onnx": (["model.onnx", "tokenizer.json"], ["weights of another kind"]),
    "flax": (["flax_model.msgpack"], ["weights of another kind"]),
    "keras": (["tf_model.h5"], ["weights of another kind"]),
    "archive": (["model.tar.gz"], ["unpack it"]),
    "unfinished": (["model.safetensors.incomplete"], ["was not finished"]),
    "pieces": (["m.gguf-split-a", "m.gguf-split-b"], ["join them in order"]),
    "nothing": (["README.md"], ["no .safetensors or .gguf file in it"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_a_checkpoint_is_named_for_what_it_is(tmp_path: Path, case: str) -> None:
    names, words = FOLDERS[case]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"{}")
    said = rejection(tmp_path)
    assert said.startswith(f"{tmp_path}: ")
    assert [word for word in words if word not in said] == []


LORA = [f"base_model.model.model.layers.{i}.q_proj.lora_{k}.weight" for i in (0, 1) for k in "AB"]
ADAPTERS = {
    "peft": LORA,
    "with a head": [*LORA, "base_model.model.lm_head.weight"],
    "without a prefix": [name.removeprefix("base_model.model.") for name in LORA],
    "dora": [*LORA, "base_model.model.model.layers.0.q_proj.lora_magnitude_vector"],
    "prompt": ["prompt_embeddings"],
}


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_names_its_base_and_says_to_merge_it(
    tmp_path: Path, case: str, config: bool
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    write_safetensors(path, {name: torch.zeros(2) for name in ADAPTERS[case]})
    if config:
        fields = {"peft_type": "LORA", "base_model_name_or_path": "someone/base\x1b[2J"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    for named in (tmp_path, path):
        said = rejection(named)
        assert "an adapter (LoRA) of " in said
        assert ("'someone/base\\x1b[2J'" in said) == config
        assert "merge it" in said


def test_an_adapter_in_pickles_or_gguf_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    assert "an adapter (LoRA) of 'a/b'" in rejection(tmp_path)
    kvs = [gguf_kv("general.base_model.0.name", 8, gguf_string("Base 1B"))]
    names = [f"blk.0.attn_q.weight.lora_{k}" for k in "ab"]
    tensors = [gguf_tensor(name, [4], 0, 32 * i) for i, name in enumerate(names)]
    path = tmp_path / "lora.gguf"
    path.write_bytes(gguf_bytes(kvs, tensors, bytes(48)))
    assert "an adapter" in rejection(path)


def test_an_adapter_beside_its_base_is_left_alone(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path, num_shards=2, index=False)
    write_safetensors(
        tmp_path / "adapter_model.safetensors", {name: torch.zeros(2) for name in LORA}
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    manifest = read_manifest(tmp_path)
    assert manifest.num_layers == 4
    assert len(manifest.files) == 2
    assert {*manifest.static} <= {*tensors}


def test_a_matrix_of_importance_is_no_model(tmp_path: Path) -> None:
    kvs = [gguf_kv("general.type", 8, gguf_string("imatrix"))]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(kvs, [gguf_tensor("blk.0.w.in_sum2", [4], 0, 0)], bytes(16)))
    assert "an importance matrix" in rejection(path)


@pytest.mark.parametrize("cut", [9, 40, 300])
def test_a_file_that_was_cut_off_says_to_copy_it_again(tmp_path: Path, cut: int) -> None:
    write_gguf(tmp_path / "m.gguf", {"blk.0.w": np.zeros(99, np.float32)}, {"a": "b" * 99})
    write_safetensors(tmp_path / "m.safetensors", {"blk.0.w": torch.zeros(99)})
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:cut])
        assert "truncated? download or copy it again" in rejection(path)


HEADERS = {
    "null": '{"__metadata__":null,"blk.0.w":%s}}',
    "extra": '{"blk.0.w":%s,"strides":[1],"note":{"a":[null]}}}',
    "both": ' {"__metadata__" : null , "blk.0.w":%s,"device":"cpu"}}'[1:],
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_taken_as_the_real_library_takes_it(tmp_path: Path, case: str) -> None:
    from safetensors import safe_open

    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]'
    path = write_raw_safetensors(tmp_path / "m.safetensors", HEADERS[case] % entry, bytes(8))
    manifest = read_manifest(path)
    with safe_open(path, "pt") as opened:
        assert [spec.name for spec in manifest.layers[0].tensors.values()] == list(opened.keys())
        assert dict(manifest.metadata) == (opened.metadata() or {})
