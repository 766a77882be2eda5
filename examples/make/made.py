"""A made-up checkpoint, planned: its files, and what they are filled with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import made_formats
import made_gguf
from random_packed import Fill, PackedValues
from random_values import RandomValues
from shapes import tensor_shapes
from shards import BLOCK_NBYTES, Shard, plan_entries, plan_shards, shard_index

from layer_streamer.llm.quantize.shards import INDEX

FORMATS = (*made_gguf.FORMATS, *made_formats.FORMATS, "bf16")
MARK = "random_values"
"""What says that such a checkpoint was made up, and from what: a key of config.json, or a word in
a GGUF file's metadata."""


class Values(Protocol):
    """Where the bytes of tensors come from. Shared by all threads."""

    def tensor(self, name: str, count: int, begin: int) -> Iterator[memoryview]:
        """Of a tensor of ``count`` elements that is to begin at that byte, in pieces."""


@dataclass(frozen=True, slots=True)
class Made:
    """What is to be written."""

    shards: Sequence[Shard]
    texts: Mapping[str, str]
    """Files beside them; none where the one shard is all of it."""
    dtype: str
    """Of what is not packed."""
    fills: Mapping[str, Fill]
    """Of what is packed."""

    @property
    def nbytes(self) -> int:
        """Of the shards."""
        return sum(shard.nbytes for shard in self.shards)

    def values(self, seed: int) -> Values:
        """What the shards are filled with."""
        last = self.shards[-1]
        num_blocks = math.ceil((last.begin + last.nbytes) / BLOCK_NBYTES)
        plain = RandomValues(self.dtype, seed, num_blocks)
        return PackedValues(plain, self.fills, seed, num_blocks) if self.fills else plain


def is_file(kind: str | None) -> bool:
    """True: the checkpoint is one GGUF file; False: a directory."""
    return kind in made_gguf.FORMATS


def plan_made(config: dict[str, Any], kind: str | None, dtype: str, shard_nbytes: float) -> Made:
    """Of a model with this config, in this format (None: plain floats). ValueError if it has
    matrices that the format cannot hold."""
    shapes = dict(tensor_shapes(config))
    if is_file(kind):
        assert kind is not None
        mark = f"{MARK} {json.dumps(config[MARK], sort_keys=True)}"
        shard, fills = made_gguf.gguf_file(config, shapes, kind, mark)
        return Made([shard], {}, "float32", fills)
    fills = {}
    if kind in made_formats.FORMATS:
        assert kind is not None
        entries, fills, quantization = made_formats.packed_tensors(shapes, kind, dtype)
        config = config | {"quantization_config": quantization}
        shards = plan_entries(entries, shard_nbytes)
    else:
        shards = plan_shards(shapes, dtype=dtype, shard_nbytes=shard_nbytes)
    texts = {"config.json": _as_json(config)}
    if len(shards) > 1:
        texts[INDEX] = _as_json(shard_index(shards))
    return Made(shards, texts, dtype, fills)


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
