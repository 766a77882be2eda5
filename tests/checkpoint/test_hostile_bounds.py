"""Hostile checkpoints that claim, or really hold, very much: rejected in under 1 s and 100 MB."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import gguf_bytes, gguf_kv, write_raw_safetensors
from hostile import array, entry, record, rejection

from layer_streamer.checkpoint.header import MAX_FILE_TENSORS, MAX_WALKED

SECONDS, BYTES = 1.0, 100_000_000


def assert_cheap(path: Path, match: str) -> None:
    """Rejected with ``match``, within the bounds; large files are removed afterwards."""
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.process_time()
        assert match in rejection(path)
        seconds.append(time.process_time() - start)
        if seconds[-1] < SECONDS:
            break
    tracemalloc.start()
    try:
        rejection(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    path.unlink()
    assert min(seconds) < SECONDS
    assert peak < BYTES


def sparse(path: Path, raw: bytes, size: int) -> Path:
    """A file that begins with ``raw`` and goes on with zeros that take no disk."""
    path.write_bytes(raw)
    os.truncate(path, len(raw) + size)
    return path


def full_of(pattern: str) -> Callable[[], str]:
    """Header text of nearly 100 MB: what is before ``*``, and repetitions of what is behind."""
    head, _, tail = pattern.partition("*")
    return lambda: head + tail * ((99_900_000 - len(head)) // len(tail.encode()))


LARGE = {
    "spaces": (full_of("{* "), "ends too early"),
    "tiny_objects": (full_of('{*"a":{},'), "expected dtype"),
    "tiny_entries": (full_of("{*" + f'"a":{entry("[0]", "[0,0]")},'), "header: more than 65536 t"),
    "shape_of_zeros": (full_of('{"a":{"shape":[*0,'), "not valid JSON"),
    "lists_in_metadata": (full_of('{"__metadata__":{"a":[*[],'), "expected a string"),
    "empty_metadata": (full_of('{"__metadata__":{*"a":"",'), "appears twice"),
    "metadata_text": (full_of('{"__metadata__":{"a":"*xxxxxxxx'), "longer than 4000000"),
    "metadata_wide_text": (full_of('{"__metadata__":{"a":"*\U0001f600xx'), "longer than 4000000"),
    "deep": (full_of('{"a":*['), "nested too deep"),
    "one_long_name": (full_of('{"*n'), "longer than"),
    "digits": (full_of('{"a":*9'), "not valid JSON"),
}  # fmt: skip


TELLING = ("tiny_entries", "metadata_wide_text", "deep", "digits")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in TELLING else pytest.mark.slow) for c in LARGE]
)
def test_100_mb_of_json_is_rejected_within_the_bounds(tmp_path: Path, case: str) -> None:
    make, match = LARGE[case]
    assert_cheap(write_raw_safetensors(tmp_path / "m.safetensors", make()), match)


def test_many_different_metadata_keys_are_rejected_within_the_bounds(tmp_path: Path) -> None:
    text = '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(2_000_000)) + "}}"
    path = write_raw_safetensors(tmp_path / "m.safetensors", text)
    assert_cheap(path, "__metadata__ takes more than")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["{i}", "{i:0>900}\U0001f600"])
def test_a_fault_behind_as_many_tensors_as_allowed_is_found_within_the_bounds(
    tmp_path: Path, name: str
) -> None:
    entries = (
        f'"{name.format(i=i)}":{entry(f"[{i % 300 + 1},{i // 300},0]", "[0,0]")}'
        for i in range(MAX_FILE_TENSORS - 1)
    )
    text = "{" + ",".join(entries) + ',"fault":' + entry(dtype='"F7"') + "}"
    path = write_raw_safetensors(tmp_path / "m.safetensors", text, bytes(8))
    assert_cheap(path, "m.safetensors: tensor ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["{i}." * 160 + "w", "{i:0>900}.w", "a.{i}.b.{i}.c"])
def test_names_without_layers_are_looked_through_within_the_bounds(
    tmp_path: Path, name: str
) -> None:
    entries = (f'"{name.format(i=i + 1)}":{entry("[0]", "[0,0]")}' for i in range(MAX_FILE_TENSORS))
    text = "{" + ",".join(entries) + "}"
    path = write_raw_safetensors(tmp_path / "m.safetensors", text, bytes(8))
    assert_cheap(path, "no prefix in it is numbered from 0 on")


def test_zeros_for_a_header_are_rejected_at_once(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.safetensors", struct.pack("<Q", 99_999_999) + b"{", 10**8)
    assert_cheap(path, "expected a key")


SPARSE = {
    "billion_strings": ([array(8, 10**9)], 10**10, "strings"),
    "empty_strings": ([array(8, MAX_WALKED + 1)], 10**8, f"more than {MAX_WALKED} in all"),
    "walked_strings": ([array(8, MAX_WALKED)], 10**8, "a name of 0 characters"),
    "huge_array": ([array(10, 10**9)], 10**10, "goes on beyond"),
    "huge_string": ([gguf_kv("k", 8, struct.pack("<Q", 10**10))], 10**11, "string of 10000000000"),
    "far_string": ([array(8, 2, struct.pack("<Q", 10**10))], 10**11, "goes on beyond"),
}


LONG = "walked_strings"
"""All that may be walked is walked, under the eyes of tracemalloc."""


@pytest.mark.parametrize(
    "case",
    [*(case for case in SPARSE if case != LONG), pytest.param(LONG, marks=pytest.mark.slow)],
)
def test_counts_that_a_sparse_file_can_hold_are_rejected(tmp_path: Path, case: str) -> None:
    kvs, size, match = SPARSE[case]
    path = sparse(tmp_path / "m.gguf", gguf_bytes(kvs, num_tensors=1), size)
    assert_cheap(path, match)


@pytest.mark.slow
def test_a_fault_behind_as_many_gguf_tensors_as_allowed_is_found_within_the_bounds(
    tmp_path: Path,
) -> None:
    names = (f"blk.{i // 500}.ffn_gate.{i % 500}.weight" for i in range(MAX_FILE_TENSORS - 1))
    records = [record([i + 1, 0], name=name) for i, name in enumerate(names)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([], [*records, record([1], kind=5)], bytes(8)))
    assert_cheap(path, "unknown GGML type 5")


def test_names_of_one_large_header_cost_no_more_than_one_header(tmp_path: Path) -> None:
    blob = write_raw_safetensors(tmp_path / "blob", "{" + " " * 60_000_000 + "}")
    for i in range(100):
        (tmp_path / f"{i}.safetensors").hardlink_to(blob)
    start = time.process_time()
    assert "headers of all files together" in rejection(tmp_path)
    assert time.process_time() - start < 5 * SECONDS


def keys(count: int) -> bytes:
    return gguf_bytes([gguf_kv(chr(0x4E00 + i), 0, b"\1") for i in range(count)])


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (keys(16_384), "keys (at most"),
        (gguf_bytes([gguf_kv("k", 8, struct.pack("<Q", 3_000_000) + bytes(3_000_000))]), "string"),
        (gguf_bytes([array(8, 500_000, bytes(8 * 500_000))]), "more than 2500000 in all"),
        (gguf_bytes([array(0, 30_000_000, b"")], num_kvs=1), "in all"),
    ],
    ids=["keys", "text", "strings", "bytes"],
)
def test_limits_are_those_of_all_parts_of_a_split_model_together(
    tmp_path: Path, part: bytes, match: str
) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(part)
    os.truncate(blob, max(len(part), 31_000_000))
    for k in range(1, 41):
        (tmp_path / f"m-{k:05}-of-00040.gguf").hardlink_to(blob)
    assert match in rejection(tmp_path)


def test_very_many_complete_models_in_one_folder_are_told_apart_soon(tmp_path: Path) -> None:
    blob = write_raw_safetensors(tmp_path / "blob", "{}")
    for i in range(4000):
        (tmp_path / f"{i}-1-of-1.safetensors").hardlink_to(blob)
    start = time.process_time()
    assert "no layers found" in rejection(tmp_path)
    assert time.process_time() - start < 5 * SECONDS
