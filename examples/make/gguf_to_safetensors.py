"""Write the model in a GGUF file as a directory with safetensors, config and tokenizer.

    python examples/make/gguf_to_safetensors.py MODEL.gguf OUT

Packed weights become floats, so OUT is several times larger; it has the names and the order of
rows that transformers expects. The path of OUT is all of stdout. Exit code 2 is an error, 130 is
Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from shards import plan_shards, shard_index

from layer_streamer.llm.quantize.shards import INDEX, Entry, as_json, write_shard
from layer_streamer.tools.command import Parser, say
from layer_streamer.tools.engine_options import DTYPES
from layer_streamer.tools.faults import exit_code


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: run(argv))


def run(argv: list[str] | None) -> None:
    """Convert what the arguments name. ValueError for some that make no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="default: 5")
    args = parser.parse_args(argv)
    convert(args.model, args.out, dtype=args.dtype, shard_nbytes=args.shard_gb * 1e9)
    print(args.out)


def convert(model: str, out: Path, *, dtype: str, shard_nbytes: float) -> None:
    """Write beside OUT, and give it the name at the very end. ValueError if OUT is there.

    Imports torch, which takes seconds: here Ctrl-C is caught.
    """
    import torch

    from layer_streamer import read_json
    from layer_streamer.llm.opening import Model
    from layer_streamer.llm.text.direct_tokenizer import DESCRIPTION
    from layer_streamer.llm.weights.converted import Reader, converted_config, sources

    if os.path.lexists(out):
        raise ValueError(f"{out}: exists")
    if not shard_nbytes > 0:
        raise ValueError(f"--shard-gb {shard_nbytes / 1e9:g}: must be above 0")
    found = Model.read(model, say)
    if found.manifest.format != "gguf":
        raise ValueError(f"{model}: not a GGUF file")
    tensors = sources(found.manifest, found.config, found.names)
    shapes = {name: source.shape for name, source in tensors.items()}
    shards = plan_shards(shapes, dtype=dtype, shard_nbytes=shard_nbytes)
    fields = read_json(found.directory / "config.json")
    fields = converted_config(fields, found.manifest, found.config) | {"dtype": dtype}
    reader = Reader(found.names, getattr(torch, dtype))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf-to-safetensors-") as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(found.directory, made, ignore=shutil.ignore_patterns(DESCRIPTION))
        (made / "config.json").write_bytes(as_json(fields))
        if len(shards) > 1:
            (made / INDEX).write_bytes(as_json(shard_index(shards)))
        for i, shard in enumerate(shards, 1):
            say(f"{shard.name}: {shard.nbytes / 1e9:.2f} GB, {i} of {len(shards)} ...")
            entries = {
                name: Entry(dtype, shapes[name], reader.blocks(tensors[name]))
                for name in shard.counts
            }
            write_shard(made / shard.name, entries, {})
        made.rename(out)


if __name__ == "__main__":
    sys.exit(main())
