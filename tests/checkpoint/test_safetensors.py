"""Safetensors headers parsed as the real library writes them, sharded and indexed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import (
    SAFETENSORS_NAMES,
    random_tensor,
    tensor_bytes,
    tiny_checkpoint,
    write_index,
    write_raw_safetensors,
    write_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.checkpoint.manifest import TensorSpec, stamp_file
from layer_streamer.checkpoint.safetensors import read_safetensors
from layer_streamer.errors import CheckpointError


def stored_bytes(spec: TensorSpec) -> bytes:
    """What the file holds where the manifest says that the tensor lies."""
    with spec.path.open("rb") as file:
        file.seek(spec.offset)
        return file.read(spec.nbytes)


def assert_equal(specs: dict[str, TensorSpec], tensors: dict[str, torch.Tensor]) -> None:
    assert specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        spec = specs[name]
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert stored_bytes(spec) == tensor_bytes(tensor)


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        random_tensor,
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from(list(SAFETENSORS_NAMES)),
        st.integers(0, 99),
    ),
    max_size=8,
)
METADATA = st.none() | st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])))
# The installed library does not write every dtype that the format (and this parser) has.
ORACLE_DTYPES = set(safetensors.torch._TYPES.values())


@settings(deadline=None, max_examples=60)
@given(tensors=TENSORS, metadata=METADATA)
def test_what_the_real_library_saves_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
) -> None:
    tensors = {name: t for name, t in tensors.items() if t.dtype in ORACLE_DTYPES}
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    if not tensors:
        metadata = None  # here safetensors 0.8 writes '{},"__metadata__":{}}', which is no JSON
    safetensors.torch.save_file(tensors, path, metadata)
    contents = read_safetensors([path])
    assert_equal(dict(contents.tensors), tensors)
    assert dict(contents.metadata) == (metadata or {})


@settings(deadline=None, max_examples=60)
@given(
    tensors=TENSORS, metadata=METADATA, padding=st.integers(0, 9), gap=st.integers(0, 3),
    data=st.data(),
)  # fmt: skip
def test_padding_gaps_and_byte_order_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    padding: int,
    gap: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    order = data.draw(st.permutations(list(tensors)))
    write_safetensors(path, tensors, metadata=metadata, padding=padding, gap=gap, order=order)
    assert_equal(dict(read_safetensors([path]).tensors), tensors)


@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES, ids=str)
def test_every_dtype_is_known_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"model.layers.0.w": random_tensor((3, 5), dtype)}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    assert_equal(dict(read_safetensors([path]).tensors), tensors)


def test_four_bit_floats_are_pairs_along_the_last_dimension(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}
    path = write_raw_safetensors(tmp_path / "f.safetensors", json.dumps({"w": entry}), bytes(12))
    spec = read_safetensors([path]).tensors["w"]
    assert (spec.dtype, spec.shape, spec.nbytes) == (torch.float4_e2m1fn_x2, (3, 4), 12)
    entry = {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}
    write_raw_safetensors(path, json.dumps({"w": entry}), bytes(3))
    with pytest.raises(CheckpointError, match="whole bytes"):
        read_safetensors([path])


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("index", [True, False])
def test_a_sharded_directory_reads_like_one_file(
    tmp_path: Path, num_shards: int, index: bool
) -> None:
    tensors = tiny_checkpoint(tmp_path, num_shards=num_shards, index=index, padding=1)
    manifest = read_manifest(tmp_path)
    assert (manifest.format, manifest.num_layers, len(manifest.files)) == (
        "safetensors",
        4,
        num_shards,
    )
    specs = {s.name: s for layer in manifest.layers for s in layer.tensors.values()}
    assert_equal(specs | dict(manifest.static), tensors)


def test_the_index_file_itself_may_be_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_shards=2)
    assert read_manifest(tmp_path / "model.safetensors.index.json").num_layers == 4


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: No such file"):
        read_manifest(tmp_path)


def test_a_missing_numbered_file_is_named_without_an_index_too(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_shards=3, index=False)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: missing"):
        read_manifest(tmp_path)


def test_a_listed_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"blk.0.w": torch.zeros(2)})
    write_index(tmp_path, {"blk.0.w": "a.safetensors", "blk.1.w": "a.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: has no tensor 'blk\.1\.w', which .*index"
    ):
        read_manifest(tmp_path)


def test_a_name_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"blk.0.w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.w' is also in .*a\.safetensors"):
        read_manifest(tmp_path)


def test_without_an_index_model_safetensors_is_the_whole_model(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    assert list(read_manifest(tmp_path).files) == [tmp_path / "model.safetensors"]


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """The hub's cache: names in snapshots/ link to nameless files in blobs/ above."""
    tiny_checkpoint(tmp_path / "blobs", num_shards=2)
    (tmp_path / "snap").mkdir()
    for i, file in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = file.rename(tmp_path / "blobs" / f"{i:064x}")
        (tmp_path / "snap" / file.name).symlink_to(os.path.relpath(blob, tmp_path / "snap"))
    assert read_manifest(tmp_path / "snap").num_layers == 4


def test_a_file_without_a_suffix_is_known_by_its_content(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "blob", {"blk.0.w": torch.zeros(2)})
    assert read_manifest(path).format == "safetensors"


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / "._model.safetensors").write_bytes(b"resource fork")
    assert read_manifest(tmp_path).num_layers == 4


def test_files_are_stamped_as_they_were_when_opened(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_shards=2)
    manifest = read_manifest(tmp_path)
    assert dict(manifest.files) == {path: stamp_file(path) for path in manifest.files}


def test_a_file_swapped_while_its_header_is_read_shows_in_the_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"blk.0.w": torch.zeros(2)})
    other = write_safetensors(tmp_path / "n.safetensors", {"blk.0.w": torch.ones(2)})
    os.utime(other, ns=(0, 0))
    pread, opened = os.pread, stamp_file(path)

    def swap_then_read(fd: int, count: int, offset: int) -> bytes:
        if other.exists():
            other.rename(path)
        return pread(fd, count, offset)

    monkeypatch.setattr(os, "pread", swap_then_read)
    stamp = read_safetensors([path]).files[path]
    assert stamp.mtime_ns == opened.mtime_ns
    assert stamp != stamp_file(path)


def test_a_header_of_many_windows_is_read_whole(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.\u00e9.weight" for i in range(20_000)]
    tensors = {name: torch.full((1,), i % 251, dtype=torch.uint8) for i, name in enumerate(names)}
    metadata = {"log": "x\u00e9\U0001f600" * 150_000}
    path = write_safetensors(tmp_path / "m.safetensors", tensors, metadata=metadata)
    contents = read_safetensors([path])
    assert dict(contents.metadata) == metadata
    data = path.read_bytes()
    assert all(data[spec.offset] == tensors[name].item() for name, spec in contents.tensors.items())
    assert len(contents.tensors) == 20_000


def test_a_15_gb_checkpoint_opens_in_well_under_a_second(tmp_path: Path) -> None:
    header, offset = {}, 0
    for i in range(400):
        name = f"model.layers.{i // 10}.{i % 10}.weight"
        header[name] = {"dtype": "BF16", "shape": [5120, 3662], "data_offsets": [offset, offset]}
        offset += 5120 * 3662 * 2
        header[name]["data_offsets"][1] = offset
    path = write_raw_safetensors(tmp_path / "m.safetensors", json.dumps(header))
    os.truncate(path, path.stat().st_size + offset)  # sparse: no byte of it is read
    start = time.process_time()
    manifest = read_manifest(path)
    assert time.process_time() - start < 0.5
    assert manifest.nbytes == offset > 14_900_000_000


@pytest.mark.slow
def test_an_index_as_large_as_the_largest_published_is_read(tmp_path: Path) -> None:
    count = 200_000
    shards = [f"model-{k + 1:05}-of-00004.safetensors" for k in range(4)]
    names = [f"model.layers.{i // 4000}.experts.{i % 4000}.w" for i in range(count)]
    for k, shard in enumerate(shards):
        entry = '"dtype":"U8","shape":[1],"data_offsets":'
        mine = enumerate(names[k::4])
        text = ",".join(f'"{name}":{{{entry}[{i},{i + 1}]}}' for i, name in mine)
        write_raw_safetensors(tmp_path / shard, "{" + text + "}", bytes(count // 4))
    write_index(tmp_path, {name: shards[i % 4] for i, name in enumerate(names)})
    assert read_manifest(tmp_path).num_layers == count // 4000
