"""Records of a manifest, and the tables of the published constructor."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import tiny_checkpoint, write_safetensors

from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.checkpoint.manifest import (
    TensorSpec,
    check_extents,
    checked_nbytes,
    manifest_from_tensor_info,
    stamp_file,
)
from layer_streamer.errors import CheckpointError, ConfigError

HERE = Path("model.safetensors")


def spec(name: str, offset: int = 0, nbytes: int = 1) -> TensorSpec:
    return TensorSpec(name, torch.uint8, (nbytes,), HERE, offset, nbytes)


@pytest.mark.parametrize(
    ("shape", "bits", "nbytes"),
    [([], 32, 4), ([0], 64, 0), ([3, 5], 16, 30), ([2**20, 2**20], 8, 2**40), ([2], 4, 1)],
)
def test_bytes_follow_from_shape_and_bits(shape: list[int], bits: int, nbytes: int) -> None:
    assert checked_nbytes(shape, bits, "t") == nbytes


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ([2**63], "overflows"),
        ([2**40, 2**40], "overflows"),
        ([2**40, 2**40, 0], "overflows"),
        ([0, 2**62, 2**62], "overflows"),
        ([4, -1], "negative"),
        ([-1, 0], "negative"),
    ],
)
def test_shapes_that_torch_cannot_express_are_rejected(shape: list[int], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        checked_nbytes(shape, 8, "t")


def test_tensors_that_touch_do_not_overlap() -> None:
    check_extents([spec("b", 4, 4), spec("a", 0, 4), spec("empty", 4, 0)], 8, HERE)


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ([spec("a", 0, 5), spec("b", 4, 4)], "'a' and 'b' overlap"),
        ([spec("a", 2, 2), spec("b", 2, 2)], "overlap"),
        ([spec("big", 0, 8), spec("small", 2, 1), spec("c", 4, 2)], "'big' and 'small' overlap"),
        ([spec("a", 7, 2)], "ends at byte 9, the file has 8"),
        ([spec("empty", 9, 0)], "ends at byte 9"),
        ([spec("a", -1, 2)], "begins at byte -1"),
    ],
)
def test_overlapping_and_outlying_tensors_are_rejected(specs: list[TensorSpec], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        check_extents(specs, 8, HERE)


def test_a_manifest_counts_its_bytes_and_finds_tensors_by_name(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path / "m", num_layers=3)
    manifest = read_manifest(tmp_path / "m")
    assert manifest.num_layers == 3
    assert manifest.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert manifest.layers[1].nbytes == (8 + 64 + 128) * 4
    assert all(manifest.tensor(name).name == name for name in tensors)
    with pytest.raises(CheckpointError, match="no tensor named 'nope'"):
        manifest.tensor("nope")


def test_a_stamp_of_a_missing_file_or_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        stamp_file(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a regular file"):
        stamp_file(tmp_path)


class TestTensorInfo:
    """The published constructor's tables."""

    KEYS = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight")
    SIZES: ClassVar = dict(zip(KEYS, (8, 64, 128), strict=True))

    def tables(self, directory: Path, num_layers: int = 2) -> dict:
        tiny_checkpoint(directory, num_layers=num_layers)
        parsed = read_manifest(directory)
        specs = [s for layer in parsed.layers for s in layer.tensors.values()]
        specs += parsed.static.values()
        start = min(s.offset for s in specs)
        return {
            "model_dir": directory,
            "tensor_info": {s.name: (s.path.name, s.offset - start, s.shape) for s in specs},
            "shard_offsets": {"model.safetensors": start},
            "block_keys": list(self.KEYS),
            "block_sizes": dict(self.SIZES),
            "dtype": torch.float32,
            "num_layers": num_layers,
        }

    def test_gives_the_same_layers_as_the_header(self, tmp_path: Path) -> None:
        tables = self.tables(tmp_path / "m")
        parsed, built = read_manifest(tmp_path / "m"), manifest_from_tensor_info(**tables)
        assert [dict(a.tensors) for a in built.layers] == [dict(b.tensors) for b in parsed.layers]
        assert dict(built.static) == dict(parsed.static)
        assert dict(built.files) == dict(parsed.files)

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"num_layers": 0}, ConfigError, "num_layers=0"),
            ({"num_layers": 3}, CheckpointError, r"model\.layers\.2\..* is missing"),
            ({"block_keys": []}, ConfigError, "block_keys is empty"),
            ({"block_keys": ["x"]}, ConfigError, "no size for"),
            ({"block_sizes": {**SIZES, KEYS[0]: 9}}, CheckpointError, "expected 9 elements, got 8"),
            ({"shard_offsets": {}}, CheckpointError, "not in shard_offsets"),
            ({"shard_offsets": {"model.safetensors": -9}}, CheckpointError, "begins at byte -9"),
            ({"shard_offsets": {"model.safetensors": 10**6}}, CheckpointError, "truncated"),
            ({"dtype": torch.float64}, CheckpointError, "overlap"),
        ],
    )
    def test_contradictions_are_named(
        self, tmp_path: Path, change: dict, error: type[Exception], match: str
    ) -> None:
        tables = self.tables(tmp_path / "m") | change
        with pytest.raises(error, match=match):
            manifest_from_tensor_info(**tables)


def test_thousands_of_shards_and_tensors_are_checked_in_linear_time(tmp_path: Path) -> None:
    shards = [f"{k}.safetensors" for k in range(300)]
    for shard in shards:
        write_safetensors(tmp_path / shard, {"x": torch.zeros(64, dtype=torch.uint8)})
    info = {f"model.layers.{i}.w": (shards[i % 300], i // 300, (1,)) for i in range(300 * 64)}
    manifest = manifest_from_tensor_info(
        tmp_path, info, dict.fromkeys(shards, 8), ["w"], {"w": 1}, torch.uint8, len(info)
    )
    assert manifest.num_layers == 19_200
