"""Write the model in a GGUF file as a directory with safetensors, config and tokenizer.

    python examples/make/gguf_to_safetensors.py MODEL.gguf OUT

Packed weights become floats, so OUT is several times larger; it has the names and the order of
rows that transformers expects. The path of OUT is all of stdout. Exit code 2 is an error, 130 is
Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shards import DTYPES, Shard, plan_shards, shard_index

if TYPE_CHECKING:  # torch takes seconds to import: main imports it where Ctrl-C is caught
    from collections.abc import Mapping

    from layer_streamer.llm.weights.converted import Reader, Source


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="default: 5")
    args = parser.parse_args(argv)
    try:
        from layer_streamer import StreamerError

        try:
            convert(args.model, args.out, dtype=args.dtype, shard_nbytes=args.shard_gb * 1e9)
        except StreamerError as error:
            raise ValueError(str(error)) from error
        print(args.out)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def convert(model: str, out: Path, *, dtype: str, shard_nbytes: float) -> None:
    """Write beside OUT, and give it the name at the very end. ValueError if OUT is there."""
    import torch

    from layer_streamer import read_manifest
    from layer_streamer.llm.metadata import load_config, metadata_directory
    from layer_streamer.llm.models.names import known_layers, weight_names
    from layer_streamer.llm.text.direct_tokenizer import DESCRIPTION
    from layer_streamer.llm.weights.converted import Reader, converted_config, sources

    if os.path.lexists(out):
        raise ValueError(f"{out}: exists")
    if not shard_nbytes > 0:
        raise ValueError(f"--shard-gb {shard_nbytes / 1e9:g}: must be above 0")
    manifest = read_manifest(model)
    if manifest.format != "gguf":
        raise ValueError(f"{model}: not a GGUF file")
    described = metadata_directory(manifest, say)
    config = load_config(described)
    manifest, _ = known_layers(manifest, config)
    names = weight_names(manifest, config)
    tensors = sources(manifest, config, names)
    shapes = {name: source.shape for name, source in tensors.items()}
    shards = plan_shards(shapes, dtype=dtype, shard_nbytes=shard_nbytes)
    fields = json.loads((described / "config.json").read_text(encoding="utf-8"))
    fields = converted_config(fields, manifest, config) | {"dtype": dtype}
    reader = Reader(names, getattr(torch, dtype))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf-to-safetensors-") as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(described, made, ignore=shutil.ignore_patterns(DESCRIPTION))
        write_json(made / "config.json", fields)
        if len(shards) > 1:
            write_json(made / "model.safetensors.index.json", shard_index(shards))
        for i, shard in enumerate(shards, 1):
            say(f"{shard.name}: {shard.nbytes / 1e9:.2f} GB, {i} of {len(shards)} ...")
            write_shard(made / shard.name, shard, tensors, reader)
        made.rename(out)


def write_shard(path: Path, shard: Shard, tensors: Mapping[str, Source], reader: Reader) -> None:
    """One file: its header, then its tensors in the order of the header."""
    import torch

    with open(path, "wb") as file:
        file.write(shard.header)
        for name in shard.counts:
            for block in reader.blocks(tensors[name]):
                file.write(block.contiguous().view(torch.uint8).numpy().data)
        if file.tell() != shard.nbytes:
            raise ValueError(f"{path.name}: {file.tell()} bytes written, {shard.nbytes} planned")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
