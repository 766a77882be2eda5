"""stream(): models keep their class and their forward, and answer as resident ones do."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from safetensors.torch import save_file
from tiny_models import REPRESENTATIVE, TYPES, has, run, tiny_class, tiny_model
from torch import nn

from layer_streamer import CheckpointError, ClosedError, ConfigError, StreamerError, stream

OTHERWISE = {
    "resnet": (ConfigError, "no ModuleList of blocks"),
    "mpnet": (ConfigError, "no ModuleList of blocks"),
    "albert": (ConfigError, "no ModuleList of blocks"),
    "longcat_flash": (ConfigError, "no ModuleList of blocks"),
    "rwkv": (StreamerError, "attention.output.weight is used while its block has no weights"),
}
"""Types that do not stream by themselves, and what they are told: no blocks are marked as such in
their classes, or they change weights outside of their blocks' forwards."""
NAMED = {
    "mpnet": "encoder.layer.{i}.",
    "resnet": "encoder.stages.{i}.",
    "longcat_flash": "model.layers.{i}.",
    "albert": "encoder.albert_layer_groups.{i}.",
}
"""Types that mark no blocks, and where these are."""
REST = sorted({*TYPES} - {*REPRESENTATIVE})
ADDRESSES = 1e-6
"""What kernels of some types differ by with the addresses of their operands, on a CPU."""


def saved(name: str, folder: Path) -> Any:
    """A tiny model as a folder; what transformers loads from it."""
    with quiet():
        tiny_model(name).save_pretrained(folder)
        return loaded(tiny_class(name), folder).eval()


def streamed(name: str, folder: Path, **options: Any) -> Any:
    with quiet():
        return stream(folder, cls=tiny_class(name), **{"device": "cpu", "n_gpu": 1, **options})


def compare(name: str, folder: Path, **options: Any) -> Any:
    """The streamed model; its answers, twice, are those of the resident one."""
    with quiet():
        want = run(name, saved(name, folder))
        model = streamed(name, folder, **options)
        for _ in range(2):
            got = run(name, model)
            assert got.keys() == want.keys()
            for key, tensor in want.items():
                assert torch.allclose(got[key], tensor, rtol=0, atol=ADDRESSES), key
    return model


def check_type(name: str, folder: Path) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    if name in OTHERWISE:
        error, words = OTHERWISE[name]
        with quiet():
            saved(name, folder)
            with pytest.raises(error, match=words):
                run(name, streamed(name, folder))
        return
    model = compare(name, folder)
    assert model.layer_streamer.last_pass, "nothing was streamed"
    model.layer_streamer.close()


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_streamed_model_answers_as_the_resident_one(tmp_path: Path, name: str) -> None:
    check_type(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_every_other_type_answers_as_the_resident_one(tmp_path: Path, name: str) -> None:
    check_type(name, tmp_path)


@pytest.mark.parametrize("name", NAMED)
def test_a_type_that_marks_no_blocks_streams_with_them_named(tmp_path: Path, name: str) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    with quiet():
        want = run(name, saved(name, tmp_path))
        model = streamed(name, tmp_path, stacks=[NAMED[name]])
        got = run(name, model)
    for key, tensor in want.items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=ADDRESSES), key
    assert model.layer_streamer.last_pass
    model.layer_streamer.close()


def test_it_is_the_same_class_with_the_folders_generation_config(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path)
    config = {"eos_token_id": 7, "max_new_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    model = stream(tmp_path, device="cpu")
    assert type(model) is type(plain)
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    assert model.generation_config.eos_token_id == 7
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.layer_streamer.close()


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_one_budget_holds_slots_residents_and_what_is_outside(tmp_path: Path, name: str) -> None:
    few = {"n_gpu": 0, "n_cpu_pinned": 0}
    model = compare(name, tmp_path, **few)
    plan = model.layer_streamer.plan
    slots = sum(sum(p.placement.device_bytes) for p in plan.sequences.values())
    some = max(size.device_nbytes for p in plan.sequences.values() for size in p.sizes)
    budget = slots + plan.outside_nbytes + some
    model.layer_streamer.close()
    model = compare(name, tmp_path, device_budget=budget, **few)
    plan = model.layer_streamer.plan
    taken = sum(sum(p.placement.device_bytes) for p in plan.sequences.values())
    assert taken + plan.outside_nbytes <= budget
    tiers = {tier for p in plan.sequences.values() for tier in p.tiers}
    assert tiers == {"device", "disk"}
    model.layer_streamer.close()


@pytest.mark.parametrize(("n_gpu", "slots"), [(None, 1), (2, 3)])
def test_an_encoder_that_runs_once_has_one_slot_if_nobody_says_more(
    tmp_path: Path, n_gpu: int | None, slots: int
) -> None:
    model = compare("t5", tmp_path, n_gpu=n_gpu, n_cpu_pinned=0)
    plans = model.layer_streamer.plan.sequences
    counts = {name: plan.placement.device_slots[0].count for name, plan in plans.items()}
    assert counts == {"encoder.block": slots, "decoder.block": 3}
    model.layer_streamer.close()


def test_what_is_reserved_is_no_part_of_what_weights_may_take(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    budget = 1 << 20
    with stream_of(tmp_path, device_budget=budget) as handle:
        assert handle.plan.reserve_nbytes == 0
        assert "reserve_bytes" not in str(handle.plan)
    with stream_of(tmp_path, device_budget=budget, reserve_bytes=1024) as handle:
        assert "left to activations and caches: 1.00 KiB (reserve_bytes)" in str(handle.plan)
    with pytest.raises(ConfigError, match=r"device_budget=.*: needs at least"):
        stream(tmp_path, device="cpu", device_budget=budget, reserve_bytes=budget)
    with stream_of(tmp_path) as handle:
        assert handle.plan.reserve_nbytes == 2 << 30


@contextmanager
def stream_of(folder: Path, **options: Any) -> Iterator[Any]:
    model: Any = stream(folder, device="cpu", **options)
    yield model.layer_streamer
    model.layer_streamer.close()


def test_a_budget_below_the_slots_is_refused_and_nothing_is_left_open(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    before = threading.active_count()
    with pytest.raises(
        ConfigError, match=r"device_budget=.*: needs at least .* outside the blocks"
    ):
        stream(tmp_path, device="cpu", device_budget=1000)
    assert threading.active_count() <= before


def test_weights_in_half_precision_stay_so_or_become_what_is_asked_for(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    for dtype in (None, torch.float32):
        plain = loaded(tiny_class("llama"), tmp_path, dtype=dtype or "auto")
        model = stream(tmp_path, device="cpu", dtype=dtype)
        assert model.dtype == (dtype or torch.bfloat16)
        assert torch.equal(run("llama", model)["logits"], run("llama", plain)["logits"])
        model.layer_streamer.close()


def test_what_a_class_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    with quiet():
        tiny_model("t5").half().save_pretrained(tmp_path)
        plain = loaded(tiny_class("t5"), tmp_path, dtype=torch.float16)
        model = streamed("t5", tmp_path, dtype=torch.float16)
        kept = {name for name, p in plain.named_parameters() if p.dtype == torch.float32}
        assert kept
        assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == kept
        assert torch.equal(run("t5", model)["logits"], run("t5", plain)["logits"])
    model.layer_streamer.close()


class Net(nn.Module):
    """Somebody's own module: two lists of blocks, a buffer that no file has, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.late = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in (*self.blocks, *self.late):
            x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def own_checkpoint(folder: Path, prefix: str = "") -> Net:
    from safetensors.torch import save_model

    torch.manual_seed(3)
    net = Net().eval()
    holder = nn.Module()
    if prefix:
        setattr(holder, prefix, net)
    save_model(holder if prefix else net, str(folder / "model.safetensors"))
    return net


@pytest.mark.parametrize("prefix", ["", "net"])
def test_any_module_streams_with_its_blocks_named(tmp_path: Path, prefix: str) -> None:
    plain = own_checkpoint(tmp_path, prefix)
    with torch.device("meta"):
        net = Net()
    stacks = ["blocks.{i}.", "late.{i}."]
    mapping = {r"^net\.": ""} if prefix else None
    given = stream(net, tmp_path, stacks=stacks, key_mapping=mapping, device="cpu")
    assert given is net
    ids = torch.arange(11)[None]
    assert torch.equal(net(ids), plain(ids))
    assert net.head.weight is net.embed.weight
    assert list(net.layer_streamer.plan.sequences) == ["blocks"]
    net.layer_streamer.close()
    with pytest.raises(ClosedError, match=r"blocks\.0: its weights do not stream any more"):
        net(ids)


def test_a_checkpoint_that_lacks_a_parameter_names_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {n: t.clone() for n, t in Net().state_dict().items() if n != "head.weight"}
    save_file({("x" + n if n == "late.1.1.bias" else n): t for n, t in state.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with torch.device("meta"):
        net = Net()
    words = r"no tensors for parameters 'late.1.1.bias'; it has no place for 'xlate.1.1.bias'"
    with pytest.raises(CheckpointError, match=words):
        stream(net, tmp_path, stacks=["blocks.{i}.", "late.{i}."])


REFUSALS: dict[str, tuple[Any, str]] = {
    "to": (lambda m: m.to(torch.float16), "cannot be moved or cast"),
    "to meta": (lambda m: m.to("meta"), "cannot be moved or cast"),
    "half": (lambda m: m.half(), "cannot be moved or cast"),
    "a block's half": (lambda m: m.model.layers[0].half(), "cannot be moved or cast"),
    "state_dict": (lambda m: m.state_dict(), "no state_dict"),
    "save_pretrained": (lambda m: m.save_pretrained("/nowhere"), "no state_dict"),
    "replicas": (lambda m: m._replicate_for_data_parallel(), "cannot be replicated"),
    "pickle": (lambda m: __import__("pickle").dumps(m), "cannot be copied or pickled"),
    "deepcopy": (lambda m: __import__("copy").deepcopy(m), "cannot be copied or pickled"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_streamed_weights_cannot_do_is_one_line_and_changes_nothing(
    tmp_path: Path, what: str
) -> None:
    plain = saved("llama", tmp_path)
    model = stream(tmp_path, device="cpu")
    action, words = REFUSALS[what]
    with quiet(), pytest.raises(StreamerError, match=words):
        action(model)
    assert torch.equal(run("llama", model)["logits"], run("llama", plain)["logits"])
    model.layer_streamer.close()


def test_in_the_state_of_a_larger_module_streamed_weights_have_no_values(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path)
    model = stream(tmp_path, device="cpu")
    run("llama", model)
    state = nn.ModuleDict({"model": model}).state_dict()
    assert torch.equal(state["model.model.norm.weight"], plain.model.norm.weight)
    assert state["model.model.layers.1.mlp.up_proj.weight"].is_meta
    assert torch.equal(run("llama", model)["logits"], run("llama", plain)["logits"])
    model.layer_streamer.close()


def test_a_model_may_be_moved_to_where_it_is(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    model = stream(tmp_path, device="cpu")
    assert model.to("cpu") is model
    assert model.to(model.dtype) is model
    model.layer_streamer.close()


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"tp_plan": "auto"}])
def test_other_ways_to_place_weights_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    saved("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"not beside streaming"):
        stream(tmp_path, device="cpu", model_options=options)


@pytest.mark.parametrize("name", ["layers", "tail", "layer_pattern", "on_copy"])
def test_options_of_layers_are_refused(tmp_path: Path, name: str) -> None:
    values = {"layers": [0], "tail": ["x"], "layer_pattern": "a.{i}.", "on_copy": print}
    with pytest.raises(ConfigError, match=f"{name}=: not with a module"):
        stream(tmp_path, **{name: values[name]})  # type: ignore[misc]


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        stream(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        stream(tmp_path)
    own_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="names no architecture"):
        stream(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(ConfigError, match="has no class 'NoSuchModel'"):
        stream(tmp_path)


def test_a_model_that_nobody_holds_closes_its_streamers(tmp_path: Path) -> None:
    saved("t5", tmp_path)
    model = streamed("t5", tmp_path)
    run("t5", model)
    streamers = list(model.layer_streamer._streamers.values())
    pipelines = [streamer._parts.pipeline for streamer in streamers]
    del model, streamers
    gc.collect()
    assert all(pipeline.control.closing for pipeline in pipelines)


def test_plans_and_reports_are_by_sequence_and_outlive_the_end(tmp_path: Path) -> None:
    saved("t5", tmp_path)
    model = streamed("t5", tmp_path)
    run("t5", model)
    handle = model.layer_streamer
    handle.close()
    handle.close()
    assert handle.closed
    assert set(handle.last_pass) == {"encoder.block", "decoder.block"}
    text = str(handle.plan)
    assert "encoder.block:" in text
    assert "outside the blocks, resident" in text


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = r"^diffusers is not installed \(pip install 'layer-streamer\[hf\]'\)$"
    with pytest.raises(ImportError, match=words):
        stream(tmp_path, device="cpu")
