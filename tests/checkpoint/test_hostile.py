"""Hostile checkpoints: whatever is wrong ends in a CheckpointError, soon and in little memory."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    gguf_bytes,
    gguf_kv,
    gguf_string,
    random_tensor,
    tiny_checkpoint,
    write_index,
    write_raw_safetensors,
    write_safetensors,
)
from hostile import array, entry, record, rejection
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.checkpoint.formats import GGUFArray, read_manifest
from layer_streamer.errors import CheckpointError

HEADERS = {
    "not_json": ("{not json}", "expected a key"),
    "not_an_object": ("[1, 2]", "does not begin with '{'"),
    "number": ("17", "does not begin with '{'"),
    "empty": ("", "begins with zeros"),
    "leading_space": (' {"a":1}', "does not begin with '{'"),
    "unclosed": ('{"a":' + entry(), "ends too early"),
    "key_without_value": ('{"a"}', "expected ':'"),
    "trailing_comma": ('{"a":' + entry() + ",}", "expected a key"),
    "leading_comma": ('{,"a":' + entry() + "}", "expected a key"),
    "no_comma": ('{"a":' + entry() + '"b":' + entry() + "}", "expected ',' or '}'"),
    "data_after": ('{"a":' + entry() + "} x", "unexpected data"),
    "two_objects": ("{}{}", "unexpected data"),
    "invalid_utf8": (b'{"\xff":1}', "not valid UTF-8"),
    "cut_utf8": (b'{"a\xe2\x82', "not valid UTF-8"),
    "lone_surrogate": ('{"\\ud800":' + entry() + "}", "not valid Unicode"),
    "control_character": ('{"a\n":' + entry() + "}", "Invalid control character"),
    "empty_name": ('{"":' + entry() + "}", "a name of 0 characters"),
    "long_name": ('{"' + "n" * 5000 + '":' + entry() + "}", "a name of 5000 characters"),
    "huge_name": ('{"' + "n" * 10**6 + '":' + entry() + "}", "characters"),
    "twice": ('{"a":' + entry() + ',"a":' + entry() + "}", "'a' appears twice"),
    "twice_escaped": ('{"a":' + entry() + ',"\\u0061":' + entry() + "}", "'a' appears twice"),
    "key_twice": ('{"a":{"dtype":"F32","dtype":"F32"}}', "a key appears twice"),
    "metadata_twice": ('{"__metadata__":{},"__metadata__":{}}', "appears twice"),
    "metadata_key_twice": ('{"__metadata__":{"a":"","a":""}}', "appears twice"),
    "metadata_no_object": ('{"__metadata__":[]}', "expected an object"),
    "metadata_no_string": ('{"__metadata__":{"a":1}}', "expected a string"),
    "entry_null": ('{"a":null}', "expected dtype, shape and data_offsets"),
    "entry_list": ('{"a":[1]}', "expected dtype, shape and data_offsets"),
    "entry_incomplete": ('{"a":{"dtype":"F32"}}', "expected dtype, shape and data_offsets"),
    "dtype_unknown": ('{"a":' + entry(dtype='"Q17"') + "}", "unknown dtype 'Q17'"),
    "dtype_six_bits": ('{"a":' + entry(dtype='"F6_E2M3"') + "}", "unknown dtype 'F6_E2M3'"),
    "dtype_number": ('{"a":' + entry(dtype="1") + "}", "dtype 1"),
    "dtype_list": ('{"a":' + entry(dtype="[]") + "}", "dtype"),
    "shape_negative": ('{"a":' + entry("[-2]") + "}", "negative"),
    "shape_minus_twice": ('{"a":' + entry("[-2,-1]") + "}", "negative"),
    "shape_float": ('{"a":' + entry("[2.0]") + "}", "shape"),
    "shape_bool": ('{"a":' + entry("[true]", "[0,4]") + "}", "shape"),
    "shape_text": ('{"a":' + entry('"2"') + "}", "shape"),
    "shape_nan": ('{"a":' + entry("[NaN]") + "}", "NaN is no JSON number"),
    "shape_nested": ('{"a":' + entry("[[2]]") + "}", "shape"),
    "shape_overflows": ('{"a":' + entry(f"[{2**62},4]") + "}", "overflows"),
    "shape_overflows_with_zero": ('{"a":' + entry(f"[0,{2**62},4]", "[0,0]") + "}", "overflows"),
    "shape_64_bits": ('{"a":' + entry(f"[{2**64}]") + "}", "overflows"),
    "shape_wraps": ('{"a":' + entry(f"[{2**64 + 2}]") + "}", "overflows"),
    "shape_4000_digits": ('{"a":' + entry(f"[{'9' * 4000}]") + "}", "overflows"),
    "shape_9000_digits": ('{"a":' + entry(f"[{'9' * 9000}]") + "}", "not valid JSON"),
    "shape_long": ('{"a":' + entry(f"[{'1,' * 99}2]") + "}", "shape"),
    "offsets_float": ('{"a":' + entry(offsets="[0,8.0]") + "}", "data_offsets"),
    "offsets_nan": ('{"a":' + entry(offsets="[NaN,8]") + "}", "NaN is no JSON number"),
    "offsets_infinite": ('{"a":' + entry(offsets="[0,1e999]") + "}", "data_offsets"),
    "offsets_negative": ('{"a":' + entry(offsets="[-8,0]") + "}", "data_offsets"),
    "offsets_reversed": ('{"a":' + entry(offsets="[8,0]") + "}", "needs 8"),
    "offsets_short": ('{"a":' + entry(offsets="[0,7]") + "}", "hold 7 bytes, F32 of shape [2]"),
    "offsets_one": ('{"a":' + entry(offsets="[0]") + "}", "data_offsets"),
    "offsets_three": ('{"a":' + entry(offsets="[0,8,8]") + "}", "data_offsets"),
    "offsets_bool": ('{"a":' + entry("[1]", "[false,4]") + "}", "data_offsets"),
    "offsets_outside": ('{"a":' + entry(offsets="[16,24]") + "}", "the file has"),
    "offsets_4000_digits": ('{"a":' + entry(offsets=f"[{10**4000},9]") + "}", "offsets"),
    "overlap": ('{"a":' + entry() + ',"b":' + entry(offsets="[4,12]") + "}", "overlap"),
    "same_bytes": ('{"a":' + entry() + ',"b":' + entry() + "}", "overlap"),
    "deep_list": ('{"a":' + "[" * 100_000, "nested too deep"),
    "deep_object": ('{"a":' * 100_000, "nested too deep"),
    "deep_metadata": ('{"__metadata__":{"a":' + "[" * 100_000, "expected a string"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_safetensors_header_is_rejected(tmp_path: Path, case: str) -> None:
    header, match = HEADERS[case]
    path = write_raw_safetensors(tmp_path / "m.safetensors", header, bytes(16))
    assert match in rejection(path)


@pytest.mark.parametrize("length", [17, 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_rejected(tmp_path: Path, length: int) -> None:
    path = write_raw_safetensors(tmp_path / "m.safetensors", "{}", bytes(8), length=length)
    assert "header" in rejection(path)


INDEXES = {
    "parent": ({"blk.0.w": "../m.safetensors"}, "not below the model's directory"),
    "parent_inside": ({"blk.0.w": "a/../../m.safetensors"}, "not below the model's directory"),
    "absolute": ({"blk.0.w": "/etc/passwd"}, "not below the model's directory"),
    "itself": ({"blk.0.w": "."}, "not below the model's directory"),
    "nothing": ({"blk.0.w": ""}, "not below the model's directory"),
    "backslash": ({"blk.0.w": "..\\m.safetensors"}, "backslash"),
    "nul": ({"blk.0.w": "a\0b"}, "NUL"),
    "surrogate": ({"blk.0.w": "a\ud800"}, "not valid Unicode"),
    "endless": ({"blk.0.w": "a" * 5000}, "too long"),
    "too_long_for_a_file": ({"blk.0.w": "a" * 300}, "File name too long"),
    "number": ({"blk.0.w": 3}, "expected a string"),
    "null": ({"blk.0.w": None}, "expected a string"),
    "empty": ({}, "no weight_map"),
    "a_directory": ({"blk.0.w": "sub"}, "not a regular file"),
    "the_index": ({"blk.0.w": "model.safetensors.index.json"}, "JSON, no weights"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_malformed_index_is_rejected(tmp_path: Path, case: str) -> None:
    weight_map, match = INDEXES[case]
    (tmp_path / "sub").mkdir()
    write_safetensors(tmp_path.parent / "m.safetensors", {"blk.0.w": torch.zeros(1)})
    assert match in rejection(write_index(tmp_path, weight_map))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": []}', "expected an object"),
        ('{"weight_map": {"a": "f", "a": "f"}}', "listed twice"),
        ('{"weight_map": {"a": "f"}, "weight_map": {}}', "appears twice"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"metadata": ' + "[" * 10**5, "nested too deep"),
        ("[]", "expected an object"),
        ("", "0 bytes, an empty file"),
        ('{"metadata": {}', "ends too early"),
        ("{" + ",".join(f'"{i}":0' for i in range(99)) + "}", "keys beside weight_map"),
    ],
)
def test_an_index_that_is_none_is_rejected(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert match in rejection(path)


def number(key: str, value: int) -> bytes:
    return gguf_kv(key, 4, struct.pack("<I", value))


def tensor_file(*records: bytes) -> bytes:
    return gguf_bytes([], records, bytes(64))


GGUFS = {
    "magic": (b"GGML" + bytes(60), "wrong magic"),
    "empty": (b"", "0 bytes, an empty file"),
    "version_1": (gguf_bytes(version=1), "GGUF version 1"),
    "version_4": (gguf_bytes(version=4), "GGUF version 4"),
    "big_endian": (gguf_bytes(version=3 << 24), "big endian?"),
    "key_count": (gguf_bytes(num_kvs=2**63), "keys (at most"),
    "key_count_small": (gguf_bytes(num_kvs=100), "keys (at most"),
    "tensor_count": (gguf_bytes(num_tensors=2**64 - 1), "tensors (at most"),
    "tensor_count_small": (gguf_bytes(num_tensors=100), "tensors (at most"),
    "one_key_too_many": (gguf_bytes([number("a", 1)], num_kvs=2), "a name of 0"),
    "key_length": (gguf_bytes([struct.pack("<Q", 2**64 - 1) + bytes(32)]), "string of 1844674"),
    "key_empty": (gguf_bytes([gguf_kv("", 4, bytes(4))]), "a name of 0 characters"),
    "key_twice": (gguf_bytes([number("a", 1), number("a", 1)]), "'a' appears twice"),
    "value_type": (gguf_bytes([gguf_kv("a", 13, bytes(8))]), "unknown value type 13"),
    "value_bool": (gguf_bytes([gguf_kv("a", 7, b"\2")]), "a bool of 2"),
    "value_string": (gguf_bytes([gguf_kv("a", 8, struct.pack("<Q", 2**63))]), "string of 92233"),
    "array_nested": (gguf_bytes([array(9, 1, struct.pack("<IQ", 9, 1))]), "array of arrays"),
    "array_type": (gguf_bytes([array(99, 1)]), "unknown element type 99"),
    "array_count": (gguf_bytes([array(4, 2**62)]), "array of 4611686018427387904 uint32"),
    "array_wraps": (gguf_bytes([array(4, 2**62 + 1, bytes(4))]), "uint32"),
    "array_strings": (gguf_bytes([array(8, 10**9)]), "array of 1000000000 strings"),
    "array_string": (gguf_bytes([array(8, 1, struct.pack("<Q", 2**64 - 9))]), "truncated?"),
    "align_0": (gguf_bytes([number("general.alignment", 0)]), "general.alignment 0"),
    "align_3": (gguf_bytes([number("general.alignment", 24)]), "general.alignment 24"),
    "align_2_31": (gguf_bytes([number("general.alignment", 2**31)]), "general.alignment 2147"),
    "align_bool": (gguf_bytes([gguf_kv("general.alignment", 7, b"\1")]), "alignment True"),
    "name_twice": (tensor_file(record(), record(offset=32)), "'a' appears twice"),
    "name_empty": (tensor_file(record(name="")), "a name of 0 characters"),
    "dims_5": (tensor_file(record([1] * 5)), "5 dimensions"),
    "dims_many": (tensor_file(gguf_string("a") + struct.pack("<I", 2**32 - 1)), "4294967295 dim"),
    "dims_overflow": (tensor_file(record([2**40, 2**40])), "overflows"),
    "dims_wrap": (tensor_file(record([2**32, 2**32, 2**32, 0])), "overflows"),
    "dim_64_bits": (tensor_file(record([2**64 - 1])), "overflows"),
    "type": (tensor_file(record(kind=77)), "unknown GGML type 77"),
    "type_removed": (tensor_file(record(kind=4)), "unknown GGML type 4"),
    "block": (tensor_file(record([33], kind=3)), "rows of 33 elements, Q4_1 packs 32"),
    "block_scalar": (tensor_file(record([], kind=3)), "rows of 1 elements"),
    "offset_outside": (tensor_file(record(offset=64)), "the file has"),
    "offset_huge": (tensor_file(record(offset=2**64 - 32)), "the file has"),
    "offset_unaligned": (tensor_file(record(offset=4)), "no multiple of the alignment 32"),
    "overlap": (tensor_file(record([12]), record(offset=32, name="b")), "overlap"),
    "too_long": (tensor_file(record([17])), "the file has"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_a_malformed_gguf_header_is_rejected(tmp_path: Path, case: str) -> None:
    raw, match = GGUFS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert match in rejection(path)


def small_safetensors(path: Path) -> Path:
    tensors = {
        "blk.0.a": random_tensor((3,), torch.bfloat16),
        "blk.0.b": random_tensor((2, 1), torch.bool),
        "x": random_tensor((), torch.float64),
    }
    return write_safetensors(path, tensors, metadata={"format": "pt"})


def small_gguf(path: Path) -> Path:
    kvs = [number("general.alignment", 32), array(8, 2, gguf_string("ab") * 2), number("n", 3)]
    tensors = [record(name="blk.0.a"), record([32, 2], kind=3, offset=32, name="blk.0.q")]
    path.write_bytes(gguf_bytes(kvs, tensors, bytes(32 + 40)))
    return path


SMALL = {"safetensors": small_safetensors, "gguf": small_gguf}


@pytest.mark.parametrize("kind", SMALL)
def test_truncation_at_every_byte_is_rejected(tmp_path: Path, kind: str) -> None:
    path = SMALL[kind](tmp_path / f"m.{kind}")
    read_manifest(path)
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        rejection(path)


def test_an_index_truncated_at_every_byte_is_rejected(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, num_layers=1, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    for size in reversed(range(index.stat().st_size)):
        os.truncate(index, size)
        rejection(index)


@pytest.mark.parametrize("kind", SMALL)
@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_random_changes_parse_or_are_rejected(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = SMALL[kind](tmp_path_factory.getbasetemp() / f"mutated.{kind}")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(st.binary(max_size=9))
        raw[at : at + data.draw(st.integers(0, 9))] = piece
        raw = raw or bytearray(b"\0")
    path.write_bytes(raw)
    try:
        manifest = read_manifest(path)
        for value in manifest.metadata.values():
            if isinstance(value, GGUFArray):
                value.load()
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return
    for spec in [*manifest.static.values(), *manifest.layers[0].tensors.values()]:
        assert 0 <= spec.offset <= spec.offset + spec.nbytes <= len(raw)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "no .safetensors or .gguf file in it"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.write_bytes(b""), "0 bytes, an empty file"),
    ],
    ids=["missing", "directory", "fifo", "loop", "device", "empty"],
)
def test_what_is_no_file_is_rejected(
    tmp_path: Path, make: Callable[[Path], object], match: str
) -> None:
    make(tmp_path / "m.safetensors")
    assert match in rejection(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["a\0b.gguf", "a" * 5000, "a\ud800.gguf"])
def test_paths_that_cannot_exist_are_rejected(tmp_path: Path, name: str) -> None:
    rejection(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_rejected(tmp_path: Path) -> None:
    path = small_safetensors(tmp_path / "m.safetensors")
    path.chmod(0)
    assert "Permission denied" in rejection(path)


def test_a_directory_of_pickles_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "convert them to safetensors" in rejection(tmp_path)
    assert "neither a safetensors nor a GGUF" in rejection(tmp_path / "pytorch_model.bin")


def test_a_directory_prefers_safetensors_and_asks_between_two_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        small_gguf(tmp_path / name)
    assert "several GGUF models (a.gguf, b.gguf)" in rejection(tmp_path)
    small_safetensors(tmp_path / "m.safetensors")
    assert read_manifest(tmp_path).format == "safetensors"


def test_two_indexes_ask_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    assert "several index files" in rejection(tmp_path)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("fault", ["shrinks", "fails"])
def test_a_file_that_fails_while_its_header_is_read_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    path = SMALL[kind](tmp_path / f"m.{kind}")
    pread = os.pread

    def failing(fd: int, count: int, offset: int) -> bytes:
        if offset + count < 10:
            return pread(fd, count, offset)
        if fault == "fails":
            raise OSError(5, "Input/output error")
        return b""

    monkeypatch.setattr(os, "pread", failing)
    assert ("Input/output" if fault == "fails" else "shrank") in rejection(path)


def test_the_header_module_maps_nothing() -> None:
    """A mapped file that shrinks is a SIGBUS; headers are read by position."""
    modules = [
        m for name, m in sys.modules.items() if name.startswith("layer_streamer.checkpoint.")
    ]
    assert len(modules) >= 6
    assert not any(hasattr(module, "mmap") for module in modules)


def test_a_wrong_json_library_cannot_hide_a_duplicate(tmp_path: Path) -> None:
    """json.loads keeps the last of two equal keys, silently."""
    text = json.dumps({"blk.0.w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    doubled = text[:-1] + "," + text[1:]
    path = write_raw_safetensors(tmp_path / "m.safetensors", doubled, bytes(1))
    assert json.loads(doubled)
    assert "appears twice" in rejection(path)
