"""GGUF headers parsed as the real writer writes them; lazy arrays; split models."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import gguf_bytes, gguf_kv, gguf_string, gguf_tensor, write_gguf
from fetch_model import fetch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.checkpoint.formats import GGUFArray, read_manifest
from layer_streamer.checkpoint.ggml_types import GGML_TYPES
from layer_streamer.checkpoint.gguf import read_gguf
from layer_streamer.checkpoint.manifest import stamp_file
from layer_streamer.errors import CheckpointChangedError, CheckpointError

PACKED = [kind for kind in GGML_TYPES.values() if not kind.is_native and kind.name != "Q8_1"]
NATIVE = [np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64]
LAYER = {"blk.0.w": np.arange(4, dtype=np.float32)}


def assert_equals_reader(path: Path) -> gguf.GGUFReader:
    """Names, types, shapes, offsets and bytes equal what ``gguf.GGUFReader`` finds; that one."""
    specs, reader = dict(read_gguf(path).tensors), gguf.GGUFReader(path)
    assert list(specs) == [tensor.name for tensor in reader.tensors]
    raw = path.read_bytes()
    for tensor in reader.tensors:
        spec = specs[tensor.name]
        assert spec.ggml_type == tensor.tensor_type.name
        assert (spec.offset, spec.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert raw[spec.offset : spec.offset + spec.nbytes] == tensor.data.tobytes()
        if spec.ggml_type != "BF16":  # numpy has none: the reader hands out bytes
            assert spec.shape == tuple(tensor.data.shape)
    return reader


def plain(value: Any) -> Any:
    return value.load() if isinstance(value, GGUFArray) else value


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    oracle = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {type_id: tuple(kind) for type_id, kind in GGML_TYPES.items()}
    # llama.cpp's block_q8_1 shrank to 36 bytes (two f16); the package still lists two f32.
    assert ours.pop(9) == ("Q8_1", 32, 36)
    assert oracle.pop(9) == ("Q8_1", 32, 40)
    assert ours == oracle


def test_native_types_have_a_dtype_of_their_size_and_packed_ones_are_bytes() -> None:
    names = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    assert names == {kind.name for kind in GGML_TYPES.values() if kind.is_native}
    for kind in GGML_TYPES.values():
        if kind.name in names:
            assert (kind.block_elements, kind.block_bytes) == (1, kind.dtype.itemsize)
        else:
            assert kind.dtype == torch.uint8
            assert kind.block_elements > 1


@settings(deadline=None, max_examples=40)
@given(data=st.data(), alignment=st.sampled_from([None, 8, 32, 4096]))
def test_what_the_real_writer_writes_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, alignment: int | None
) -> None:
    names = st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12
    )
    tensors: dict[str, Any] = {}
    for name in data.draw(st.lists(names, min_size=1, max_size=6, unique=True)):
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        kind = data.draw(st.sampled_from([*PACKED, *NATIVE]))
        if isinstance(kind, tuple):
            shape[-1] *= kind.block_bytes
            rows = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            tensors[name] = (rows, GGMLQuantizationType[kind.name])
        else:
            tensors[name] = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    scalars = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | names
    lists = st.lists(names, min_size=1) | st.lists(st.integers(0, 99), min_size=1)
    metadata = data.draw(st.dictionaries(names.map("x.".__add__), scalars | lists, max_size=6))
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tensors, metadata, alignment=alignment)
    assert_equals_reader(path)
    contents = read_gguf(path)
    for name, value in tensors.items():
        expected = value[0] if isinstance(value, tuple) else value
        assert contents.tensors[name].shape == expected.shape
    for key, value in metadata.items():
        assert plain(contents.metadata[key]) == value


def test_bfloat16_and_packed_rows_get_their_shapes(tmp_path: Path) -> None:
    rows = np.zeros((3, 2 * 144), dtype=np.uint8)
    half = np.zeros((5, 2 * 7), dtype=np.uint8)
    tensors = {
        "blk.0.q": (rows, GGMLQuantizationType.Q4_K),
        "blk.0.h": (half, GGMLQuantizationType.BF16),
    }
    layer = read_manifest(write_gguf(tmp_path / "m.gguf", tensors)).layers[0].tensors
    assert (layer["q"].dtype, layer["q"].shape) == (torch.uint8, (3, 288))
    assert (layer["h"].dtype, layer["h"].shape, layer["h"].nbytes) == (torch.bfloat16, (5, 7), 70)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_bytes([], [gguf_tensor("blk.0.w", [4], 0, 0)], bytes(16), version=version)
    )
    assert read_manifest(path).layers[0].tensors["w"].shape == (4,)


def test_a_file_without_suffix_is_known_by_its_magic(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LAYER)
    assert read_manifest(path.rename(tmp_path / "blob")).format == "gguf"


ARRAYS = {
    "uint8": (0, "<3B", [1, 2, 255]),
    "int8": (1, "<3b", [-128, 0, 127]),
    "uint16": (2, "<2H", [0, 65535]),
    "int16": (3, "<2h", [-32768, 5]),
    "uint32": (4, "<2I", [0, 2**32 - 1]),
    "int32": (5, "<2i", [-(2**31), 5]),
    "float32": (6, "<2f", [0.5, -1.0]),
    "bool": (7, "<3B", [True, False, True]),
    "uint64": (10, "<2Q", [0, 2**64 - 1]),
    "int64": (11, "<2q", [-(2**63), 5]),
    "float64": (12, "<2d", [0.1, 1e300]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_type_are_lazy_and_load_exactly(tmp_path: Path, name: str) -> None:
    type_id, form, values = ARRAYS[name]
    payload = struct.pack("<IQ", type_id, len(values)) + struct.pack(form, *values)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([gguf_kv("a", 9, payload), gguf_kv("after", 4, b"\1\0\0\0")]))
    metadata = read_gguf(path).metadata
    array = metadata["a"]
    assert (array.element_type, len(array), metadata["after"]) == (name, len(values), 1)
    loaded = array.load()
    assert loaded == values
    assert [type(value) for value in loaded] == [type(value) for value in values]


def test_an_empty_array_loads_as_an_empty_list(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_bytes([gguf_kv(f"a{t}", 9, struct.pack("<IQ", t, 0)) for t in (0, 7, 8, 12)])
    )
    assert [value.load() for value in read_gguf(path).metadata.values()] == [[], [], [], []]


def test_an_array_of_a_file_that_changed_is_not_loaded(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LAYER, {"a": ["x", "y"]})
    array = read_gguf(path).metadata["a"]
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointChangedError, match=r"m\.gguf: changed"):
        array.load()


def test_a_bad_element_is_an_error_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([gguf_kv("a", 9, struct.pack("<IQ", 7, 1) + b"\2")]))
    array = read_gguf(path).metadata["a"]
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        array.load()


def test_bytes_that_are_no_utf_8_read_as_escapes_wherever_a_string_may_be(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    strings = [b"caf\xe9", "caf\u00e9".encode(), b"\xff\xfe", b"\xe2\x82"]
    kvs = [
        gguf_kv("author", 8, gguf_string(strings[0])),
        gguf_kv(b"k\xff", 8, gguf_string("plain")),
        gguf_kv("tokens", 9, struct.pack("<IQ", 8, 4) + b"".join(map(gguf_string, strings))),
    ]
    path.write_bytes(gguf_bytes(kvs, [gguf_tensor(b"blk.0.\xc3", [4], 0, 0)], bytes(16)))
    contents = read_gguf(path)
    assert contents.metadata["author"] == "caf\\xe9"
    assert contents.metadata["k\\xff"] == "plain"
    assert contents.metadata["tokens"].load() == [
        "caf\\xe9",
        "caf\u00e9",
        "\\xff\\xfe",
        "\\xe2\\x82",
    ]
    assert list(contents.tensors) == ["blk.0.\\xc3"]


def test_a_260k_vocabulary_opens_in_well_under_a_second(tmp_path: Path) -> None:
    tokens = [f"token {i}" for i in range(262_144)]
    merges = [f"left{i} right{i}" for i in range(514_906)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.scores": [0.5] * len(tokens),
    }
    kvs = []
    for key, values in metadata.items():
        if isinstance(values[0], str):
            raw = struct.pack("<IQ", 8, len(values)) + b"".join(map(gguf_string, values))
        else:
            raw = struct.pack(f"<IQ{len(values)}f", 6, len(values), *values)
        kvs.append(gguf_kv(key, 9, raw))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(kvs, [gguf_tensor("blk.0.w", [4], 0, 0)], bytes(16)))
    start = time.process_time()
    manifest = read_manifest(path)
    assert time.process_time() - start < 0.7  # 0.1 s on an idle machine
    assert manifest.metadata["tokenizer.ggml.tokens"].load() == tokens
    assert manifest.metadata["tokenizer.ggml.merges"].load() == merges


class TestSplit:
    """NAME-00001-of-0000N.gguf."""

    @staticmethod
    def write(directory: Path, **lies: int) -> list[Path]:
        """Three parts with two layers each; ``lies`` replace split keys of the second."""
        paths = []
        for k in range(3):
            keys = {"split.no": k, "split.count": 3, "split.tensors.count": 6}
            keys |= {f"split.{key}": value for key, value in lies.items() if k == 1}
            tensors = {f"blk.{2 * k + j}.w": np.full(3, k, dtype=np.float32) for j in (0, 1)}
            path = directory / f"m-{k + 1:05}-of-00003.gguf"
            paths.append(write_gguf(path, tensors, {**keys, "part": f"p{k}"}))
        return paths

    def test_any_part_opens_all(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path)
        for path in [*paths, tmp_path]:
            manifest = read_manifest(path)
            assert manifest.num_layers == 6
            assert list(manifest.files) == paths
            assert manifest.layers[3].tensors["w"].path == paths[1]
            assert manifest.metadata["part"] == "p0"
            assert dict(manifest.files) == {path: stamp_file(path) for path in paths}

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_part_is_named(self, tmp_path: Path, missing: int) -> None:
        paths = self.write(tmp_path)
        paths[missing].unlink()
        with pytest.raises(CheckpointError, match=f"m-0000{missing + 1}-of-00003.gguf: No such"):
            read_manifest(paths[missing - 1])

    @pytest.mark.parametrize("lie", [{"no": 2}, {"count": 4}, {"no": -1}])
    def test_keys_that_contradict_the_name_are_an_error(self, tmp_path: Path, lie: dict) -> None:
        paths = self.write(tmp_path, **lie)
        with pytest.raises(CheckpointError, match=r"m-00002.*its name says part 2 of 3"):
            read_manifest(paths[0])

    def test_a_renamed_part_does_not_pass_for_a_model(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)[0].rename(tmp_path / "model.gguf")
        with pytest.raises(CheckpointError, match=r"part 1 of 1.*split\.count 3"):
            read_manifest(path)

    def test_a_lost_tensor_is_noticed(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        path = tmp_path / "m-00003-of-00003.gguf"
        write_gguf(path, {"blk.4.w": np.zeros(3, dtype=np.float32)})
        with pytest.raises(CheckpointError, match=r"split\.tensors\.count is 6, the parts have 5"):
            read_manifest(path)

    def test_a_name_in_two_parts_is_an_error(self, tmp_path: Path) -> None:
        for k in (1, 2):
            write_gguf(tmp_path / f"m-{k:05}-of-00002.gguf", LAYER)
        with pytest.raises(CheckpointError, match=r"'blk\.0\.w' is also in"):
            read_manifest(tmp_path)

    @pytest.mark.parametrize("name", ["m-00000-of-00002", "m-00003-of-00002", "m-00001-of-99999"])
    def test_impossible_numbers_are_an_error(self, tmp_path: Path, name: str) -> None:
        path = write_gguf(tmp_path / f"{name}.gguf", LAYER)
        with pytest.raises(CheckpointError, match="part"):
            read_manifest(path)


@pytest.mark.slow
def test_the_real_smollm2_file_reads_as_the_gguf_package_reads_it() -> None:
    path = fetch()
    fields = assert_equals_reader(path).fields
    assert len(read_manifest(path).layers) == 30
    for key, value in read_gguf(path).metadata.items():
        assert plain(value) == fields[key].contents()
