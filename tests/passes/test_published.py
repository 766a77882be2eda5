"""The published design's own usage, word for word; the package's surface; its installation."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tensors
from interpreters import run_script
from safetensors.torch import save_file
from support import make_device, opened_on

import layer_streamer
import layer_streamer.errors

NUM_LAYERS = 28


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A checkpoint at ./my-model, and the tables that the published constructor takes."""
    monkeypatch.chdir(tmp_path)
    model_dir = tmp_path / "my-model"
    model_dir.mkdir()
    tensors = tiny_tensors(NUM_LAYERS, dtype=torch.bfloat16)
    tensor_info, shard_offsets = {}, {}
    names = list(tensors)
    for shard, some in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in some}, model_dir / shard)
        raw = (model_dir / shard).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        shard_offsets[shard] = 8 + length
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                tensor_info[name] = (shard, entry["data_offsets"][0], tuple(entry["shape"]))
    prefix = "model.layers.0."
    block_keys = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    block_sizes = {key: tensors[prefix + key].numel() for key in block_keys}
    return {
        "tensors": tensors,
        "tensor_info": tensor_info,
        "shard_offsets": shard_offsets,
        "block_keys": block_keys,
        "block_sizes": block_sizes,
    }


def test_the_published_usage_example_runs_unchanged(tables: dict[str, Any]) -> None:
    tensor_info, shard_offsets = tables["tensor_info"], tables["shard_offsets"]
    block_keys, block_sizes = tables["block_keys"], tables["block_sizes"]
    input_embeds = torch.ones(8)
    seen = []

    def layer_fn(x: Any, weights: Any, layer_idx: int) -> Any:
        seen.append((layer_idx, {key: tensor.clone() for key, tensor in weights.items()}))
        return x + 1

    # fmt: off
    from layer_streamer import LayerStreamer

    streamer = LayerStreamer(
        model_dir='./my-model',
        tensor_info=tensor_info,
        shard_offsets=shard_offsets,
        block_keys=block_keys,
        block_sizes=block_sizes,
        dtype=torch.bfloat16,
        num_layers=28,
        n_gpu=2,
        n_cpu_pinned=4,
        n_cpu=4,
        batch_gpu=1,
        batch_cpu_pinned=1,
        batch_cpu=2,
        track_progress=True,
    )
    embed = streamer.load_static('model.embed_tokens.weight')
    hidden = streamer.run_pass(input_embeds, layer_fn)
    # fmt: on
    streamer.close()
    tensors = tables["tensors"]
    assert torch.equal(embed.cpu(), tensors["model.embed_tokens.weight"])
    assert torch.equal(hidden.cpu(), torch.full((8,), 29.0))
    assert [layer_idx for layer_idx, _ in seen] == list(range(28))
    for layer_idx, weights in seen:
        assert list(weights) == block_keys
        for key, tensor in weights.items():
            assert torch.equal(tensor.cpu(), tensors[f"model.layers.{layer_idx}.{key}"])


def test_the_constructor_takes_the_reading_and_device_options_too(tables: dict[str, Any]) -> None:
    arguments = {key: tables[key] for key in tables if key != "tensors"}
    with layer_streamer.LayerStreamer(
        model_dir="my-model", dtype=torch.bfloat16, num_layers=NUM_LAYERS, track_progress=False,
        device="cpu", read_threads=2, read_chunk=4096, tail=["lm_head.weight"], **arguments,
    ) as streamer:  # fmt: skip
        assert streamer.num_steps > NUM_LAYERS
        streamer.run_pass(None, lambda x, w, i: x)


def test_the_published_constructors_none_skips_a_stage_and_what_is_not_named_is_the_default(
    tables: dict[str, Any],
) -> None:
    arguments = {key: tables[key] for key in tables if key != "tensors"}

    def plan(kind: str, **options: Any) -> Any:
        with (
            opened_on(make_device(kind)),
            layer_streamer.LayerStreamer(
                model_dir="my-model", dtype=torch.bfloat16, num_layers=NUM_LAYERS,
                track_progress=False, **arguments, **options,
            ) as streamer,
        ):  # fmt: skip
            document = streamer.plan.document()
            return document, streamer.plan.placement, streamer.num_steps

    for kind in ("cpu", "fake"):
        skipped = plan(kind, n_cpu_pinned=None, n_cpu=None)
        assert skipped == plan(kind, n_cpu_pinned=0, n_cpu=0)
        assert skipped != plan(kind)
        assert plan(kind, n_cpu_pinned=3, n_cpu=None) == plan(kind, n_cpu_pinned=3)
        assert plan(kind, n_gpu=None, tail=None, reserve_bytes=None, read_mode=None) == plan(kind)
    assert plan("fake")[0]["read_mode"] == "mapped"
    assert plan("fake", n_cpu=None)[0]["read_mode"] == "buffered"
    assert plan("cpu", n_gpu=0, n_cpu_pinned=None)[1].device_slots[0].count == 1
    assert plan("fake", layers=[3, 1])[0]["layers"] == (3, 1)


def test_every_error_of_the_library_has_one_root() -> None:
    errors = [e for e in vars(layer_streamer.errors).values() if isinstance(e, type)]
    assert {error.__name__ for error in errors} <= set(layer_streamer.__all__)
    assert len(errors) == 8
    assert all(issubclass(error, layer_streamer.StreamerError) for error in errors)
    for error in (layer_streamer.ConfigError, layer_streamer.CheckpointError):
        assert issubclass(error, ValueError)


def test_all_public_names_are_listed_and_only_those() -> None:
    tree = ast.parse(Path(layer_streamer.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    named = {
        (f"layer_streamer.{node.module}", name.name) for node in imports for name in node.names
    }
    assert {name for _, name in named} == set(layer_streamer.__all__)
    assert list(layer_streamer.__all__) == sorted(layer_streamer.__all__)
    for module, name in named:  # what type checkers see is what there is
        assert getattr(layer_streamer, name) is getattr(import_module(module), name)
        assert name in dir(layer_streamer)


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="'layer_streamer' has no attribute 'LayerStreamers'"):
        layer_streamer.LayerStreamers  # noqa: B018


def test_importing_changes_nothing_and_starts_nothing() -> None:
    script = (
        "import logging, sys, threading, torch\n"
        "interval, handlers = sys.getswitchinterval(), list(logging.root.handlers)\n"
        "import layer_streamer\n"
        "assert sys.getswitchinterval() == interval\n"
        "assert logging.root.handlers == handlers\n"
        "assert threading.active_count() == 1\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = run_script(script, strict=True)
    assert (done.returncode, done.stderr) == (0, "")
