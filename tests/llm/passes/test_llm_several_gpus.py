"""The engine over two GPUs, and over one GPU twice: the text of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint, tiny_model
from fake_device import named_twice, opened_as
from gguf_models import file_config, write_gguf
from one_sequence import Story
from zoo import zoo_model

from layer_streamer import ConfigError
from layer_streamer.devices.accelerator import CudaDevice
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.passes.chunking import Chunking

pytestmark = pytest.mark.gpu
LAYERS = 6
PROMPTS = [[1 + i] * length for i, length in enumerate((3, 70, 17, 5))]
GIVEN: dict[str, Any] = {"dtype": torch.float32, "max_length": 128, "kv_tokens": 1024}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    network = tiny_model("qwen2", num_hidden_layers=LAYERS, max_position_embeddings=2048)
    return tiny_checkpoint(tmp_path_factory.mktemp("several"), network), network.config


@pytest.fixture(params=["two", "one twice"])
def devices(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Two GPUs; or one, which lanes, streams and slots of its own make two of."""
    with ExitStack() as stack:
        if request.param == "two":
            if torch.cuda.device_count() < 2:
                pytest.skip("needs two GPUs")
            yield ["cuda:0", "cuda:1"]
            return
        first = torch.device("cuda:0")
        stack.enter_context(opened_as(lambda number: CudaDevice(first)))
        stack.enter_context(named_twice())
        yield ["cuda:0", "cuda:0"]


def ids(path: Path, device: Any, **options: Any) -> tuple[list[Any], StreamingEngine]:
    with StreamingEngine(path, device=device, **(GIVEN | options)) as engine:
        asked = {"max_new_tokens": 40, "temperature": 0, "return_details": True}
        return [done.ids for done in engine.generate(PROMPTS, **asked)], engine


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_gpu": 1, "kv": "host"},
        {"device_budget": "1GiB"},
        {"device_budget": "1GiB", "lookup": True},
        {"read_mode": "buffered", "host_budget": "64MiB"},
        {"host_layers": 2},
        {"reproducible": True},
        {"kv": "host", "kv_int8": True},
    ],
    ids=str,
)
def test_two_say_what_one_says(
    model: tuple[Path, Any], devices: list[str], options: dict[str, Any]
) -> None:
    expected, one = ids(model[0], "cuda:0", **options)
    found, engine = ids(model[0], devices, **options)
    assert found == expected
    captures = one.plan.captures or one.plan.captures_layers
    assert engine.plan.captures_layers == captures and not engine.plan.captures
    assert len(engine.plan.devices) == len(engine.streamer.devices) == 2


@pytest.mark.parametrize("draft", ["model", "self"])
def test_drafts_over_two_gpus_change_no_text(
    model: tuple[Path, Any], devices: list[str], draft: str
) -> None:
    chosen = model[0] if draft == "model" else draft
    assert ids(model[0], devices, draft=chosen)[0] == ids(model[0], "cuda:0")[0]


@pytest.mark.parametrize("seed", range(4))
def test_rows_come_and_go_over_two_as_over_one(
    model: tuple[Path, Any], devices: list[str], seed: int
) -> None:
    options: dict[str, Any] = {"tokens": 3072, "max_rows": 4, "host_layers": (1, 2, 5)}
    options |= {"chunking": Chunking(tokens=64, group_rows=True), "n_gpu": seed % 3}
    found = []
    for device in ("cuda:0", devices):
        with open_runner(*model, device=device, **options) as runner:
            found.append(Story(seed, 14).tell(runner))
    errors = [relative_error(a, b) for a, b in zip(*found, strict=True)]
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_packed_layers_are_multiplied_on_both(
    tmp_path: Path, devices: list[str], name: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model(name))
    found = []
    for device in ("cuda:0", devices):
        with open_runner(path, file_config(path), device=device) as runner:
            row = runner.kv.rows.add(60)
            assert row is not None
            found.append([runner.forward([(row, some)]) for some in ([5] * 20, [6], [7, 8])])
    assert max(relative_error(a, b) for a, b in zip(*found, strict=True)) <= 1e-5


@pytest.mark.parametrize("failing", [2, 3])
def test_a_pass_that_fails_on_either_gpu_leaves_the_rows_as_they_were(
    model: tuple[Path, Any], devices: list[str], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    texts, close = [[5, 6, 7] * 9, [8], [9], [10, 11]], KVCache.close_layer
    with open_runner(*model, device="cuda:0") as runner:
        row = runner.kv.rows.add(60)
        expected = [runner.forward([(row, some)]) for some in texts if row is not None]

    def closes(kv: KVCache, layer_idx: int) -> None:
        close(kv, layer_idx)
        if layer_idx == failing:
            raise MemoryError("no room")

    with open_runner(*model, device=devices, host_layers=range(LAYERS), n_gpu=0) as runner:
        row = runner.kv.rows.add(60)
        assert row is not None
        for some, wanted in zip(texts, expected, strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(KVCache, "close_layer", closes)
                with pytest.raises(MemoryError, match="no room"):
                    runner.forward([(row, some)])
            assert relative_error(runner.forward([(row, some)]), wanted) <= 1e-5


@pytest.mark.parametrize("draft", [None, "self"])
def test_each_gpu_takes_what_the_plan_says(model: tuple[Path, Any], draft: str | None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    budget = 1 << 30
    for number in range(2):
        torch.cuda.synchronize(number)
        torch.cuda.reset_peak_memory_stats(number)
    before = [torch.cuda.memory_allocated(number) for number in range(2)]
    _, engine = ids(model[0], ["cuda:0", "cuda:1"], device_budget=budget, draft=draft)
    for number, parts in enumerate(engine.plan.devices):
        taken = torch.cuda.max_memory_allocated(number) - before[number]
        assert 0 < taken <= budget and sum(parts.values()) <= budget


def test_a_gpu_that_is_not_there_is_named_in_one_line(model: tuple[Path, Any]) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=missing) as caught:
        StreamingEngine(model[0], device=["cuda:0", missing])
    assert "\n" not in str(caught.value)
