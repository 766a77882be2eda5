"""Passes over layers of several devices: the logits of one, whoever shares a pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import adapted
from assets import open_runner, tiny_checkpoint, tiny_model
from fake_device import NearDevice, named_twice, opened_as
from gguf_models import file_config, write_gguf
from one_sequence import Story
from zoo import zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.kv.host_tiers import HostTiers
from layer_streamer.llm.on_device.side import DeviceSide
from layer_streamer.llm.passes.chunking import Chunking

LAYERS = 5
WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 2}
TWO = ["cpu", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    network = tiny_model("qwen2", num_hidden_layers=LAYERS, max_position_embeddings=2048, **WINDOW)
    return tiny_checkpoint(tmp_path_factory.mktemp("several"), network), network.config


@pytest.fixture(autouse=True)
def devices_of_their_own() -> Iterator[None]:
    with opened_as(lambda number: NearDevice()), named_twice():
        yield


def tell(path: Path, config: Any, seed: int, **options: Any) -> list[torch.Tensor]:
    """The logits of a story's passes."""
    options = {"tokens": 3072, "max_rows": 4, "chunking": Chunking(tokens=64)} | options
    with open_runner(path, config, **options) as runner:
        assert len({side.residuals_ND.data_ptr() for side in runner.sides}) == len(
            options.get("device", "1")
        )
        return Story(seed, 12).tell(runner)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {"device": TWO}),
        (1, {"device": TWO, "host_layers": (0, 1, 4)}),
        pytest.param(*(2, {"device": TWO, "host_layers": (1, 3)}), marks=pytest.mark.slow),
        pytest.param(
            *(3, {"device": ["cpu"] * 3, "host_layers": range(LAYERS), "n_gpu": 0}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(4, {"device": TWO, "read_mode": "mapped", "n_gpu": 1}), marks=pytest.mark.slow
        ),
        pytest.param(*(5, {"device": ["cpu"] * LAYERS, "n_cpu_pinned": 1}), marks=pytest.mark.slow),
    ],
)
def test_several_devices_give_the_logits_of_one_to_the_bit(
    model: tuple[Path, Any], seed: int, options: dict[str, Any]
) -> None:
    assert same(tell(*model, seed, **options), tell(*model, seed))


def test_rows_that_decode_together_give_the_same_over_two(model: tuple[Path, Any]) -> None:
    chunking = Chunking(tokens=64, group_rows=True)
    together = tell(*model, 2, device=TWO, chunking=chunking, host_layers=(2, 3))
    assert same(together, tell(*model, 2, chunking=chunking))


def test_eight_bits_at_home_round_the_same_on_each_device(model: tuple[Path, Any]) -> None:
    options = {"host_layers": range(LAYERS), "int8": True}
    assert same(tell(*model, 7, device=TWO, **options), tell(*model, 7, **options))


def test_layers_of_the_host_stand_between_those_of_two_devices(model: tuple[Path, Any]) -> None:
    expected = tell(*model, 8, computed=(1, 2, 4))
    assert same(tell(*model, 8, device=TWO, computed=(1, 2, 4)), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_layers_are_unpacked_on_each_device(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model(name))
    found = []
    for devices in (["cpu"], TWO):
        with open_runner(path, file_config(path), device=devices) as runner:
            row = runner.kv.rows.add(60)
            assert row is not None
            found.append([runner.forward([(row, ids)]) for ids in ([5] * 20, [6], [7, 8])])
            assert len({side.unpacker for side in runner.sides}) == len(devices)
    assert same(found[1], found[0])


def test_each_devices_keys_and_values_are_its_own(model: tuple[Path, Any]) -> None:
    with open_runner(*model, device=TWO, host_layers=(0, 1, 2)) as runner:
        host = runner.kv.host
        assert isinstance(host, HostTiers)
        assert {i: sorted(tier._layers) for i, tier in host.by_device.items()} == {
            0: [0, 2],
            1: [1],
        }
        assert runner.kv.open(4) is runner.kv._memory[4]


PROMPTS = [[7, 8, 9] * 6, [20, 21], [30] * 12, [40, 41] * 20]
ASKED = {"max_new_tokens": 12, "temperature": 0.0, "return_details": True}
GIVEN: dict[str, Any] = {"max_length": 64, "kv_tokens": 512}


def said(path: Path, device: Any, **options: Any) -> tuple[list[list[int]], StreamingEngine]:
    with StreamingEngine(path, device=device, **GIVEN | options) as engine:
        return [list(c.ids) for c in engine.generate(PROMPTS, **ASKED)], engine


@pytest.mark.parametrize(
    "options",
    [
        {"lookup": True, "kv": "host"},
        {"host_layers": 2},
        {"device_budget": "24MiB", "prefill_chunk": 16},
        pytest.param({"reproducible": True}, marks=pytest.mark.slow),
        pytest.param({"kv_int8": True, "kv": "host"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_engine_says_the_same_over_two_devices(
    model: tuple[Path, Any], options: dict[str, Any]
) -> None:
    path, _ = model
    expected, _ = said(path, "cpu", **options)
    found, engine = said(path, TWO, **options)
    assert found == expected and len(engine.plan.devices) == 2


def test_a_draft_model_is_on_the_first_of_them(model: tuple[Path, Any]) -> None:
    path, _ = model
    expected, _ = said(path, "cpu")
    found, engine = said(path, TWO, draft=path)
    assert found == expected
    assert engine.plan.devices[0]["draft"] > 0 == engine.plan.devices[1]["draft"]


def test_vectors_of_texts_are_those_of_one_device(model: tuple[Path, Any]) -> None:
    path, _ = model
    with StreamingEngine(path, device="cpu", **GIVEN) as engine:
        expected = list(engine.embed(PROMPTS))
    ways: list[tuple[int, dict[str, Any]]] = [(2, {}), (2, {"host_layers": [LAYERS - 1]}), (3, {})]
    for count, options in ways:
        with StreamingEngine(path, device=["cpu"] * count, **GIVEN, **options) as engine:
            assert same(list(engine.embed(PROMPTS)), expected)


def test_an_adapter_is_beside_the_layers_of_each_device(tmp_path: Path) -> None:
    network = zoo_model("llama")
    path = tiny_checkpoint(tmp_path / "base", network)
    adapted(network, tmp_path / "adapter")
    ways = []
    for device in ("cpu", TWO):
        with StreamingEngine(path, device=device, adapter=tmp_path / "adapter", **GIVEN) as engine:
            row = engine._runner.kv.rows.add(60)
            assert row is not None
            ways.append([engine._runner.forward([(row, ids)]) for ids in ([5] * 20, [6])])
            assert all(side._names.adapter is not None for side in engine._runner.sides)
    assert same(ways[1], ways[0])


@pytest.mark.parametrize("budget", [pytest.param("64MiB", marks=pytest.mark.slow), "1GiB"])
def test_keys_and_values_travel_to_layers_that_stay(model: tuple[Path, Any], budget: str) -> None:
    options: dict[str, Any] = {"host_layers": (0, 1, 3), "device_budget": budget}
    assert same(tell(*model, 9, device=TWO, **options), tell(*model, 9))


@pytest.mark.parametrize(
    "failing", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, LAYERS - 1))]
)
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_a_pass_that_fails_on_any_device_leaves_the_rows_as_they_were(
    model: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
    error: BaseException,
) -> None:
    ids = [[5, 6, 7] * 9, [8], [9], [10, 11]]
    with open_runner(*model) as runner:
        row = runner.kv.rows.add(60)
        expected = [runner.forward([(row, some)]) for some in ids if row is not None]
    with open_runner(*model, device=TWO, host_layers=(1, 2), n_gpu=0) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        found = []
        for some in ids:
            with monkeypatch.context() as patch:
                fails_in(failing, error, patch)
                with pytest.raises(type(error)):
                    runner.forward([(row, some)])
            found.append(runner.forward([(row, some)]))
    assert same(found, expected)


def fails_in(layer_idx: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Have a layer raise once its keys are stored."""
    close = KVCache.close_layer

    def closes(kv: KVCache, index: int) -> None:
        close(kv, index)
        if index == layer_idx:
            raise error

    patch.setattr(KVCache, "close_layer", closes)


def test_residuals_that_stay_where_they_are_give_something_else(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: the suite would see a device that computes what another layer has left."""
    expected = tell(*model, 0)
    monkeypatch.setattr(DeviceSide, "take", lambda side, x_ND: side.residuals_ND[: len(x_ND)])
    assert not same(tell(*model, 0, device=TWO), expected)


def test_experts_on_demand_are_brought_to_one_device_alone(tmp_path: Path) -> None:
    path = tmp_path / "mixture.gguf"
    write_gguf(path, zoo_model("qwen3_moe"))
    with pytest.raises(ValueError, match="of several devices, each needs a streamer") as caught:
        StreamingEngine(path, device=TWO, experts="demand", expert_slots=4, **GIVEN)
    assert "\n" not in str(caught.value)
    assert said(path, TWO)[0] == said(path, "cpu")[0], "whole layers of experts go to both"
