"""The engine over experts that are brought on demand: the same bits, whoever was there before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from gguf_models import file_config, write_gguf
from packed_models import write_packed
from small_engine import make_engine
from zoo import IDS, zoo_model

from layer_streamer import ConfigError
from layer_streamer.experts.trace import read_trace
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models import mixing
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.weights.weights import StepWeights

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
PACKED = ("ct4-g32", "gptq8-act-order", "ct8-channel", "int8-channel", "fp8-blocks", "awq-g32")
ROUNDING = 1e-6
"""Of products on a CPU, which go by where their factors lie in memory."""


def logits(runner: Runner) -> torch.Tensor:
    """Of two rows' prompts, then of tokens one by one."""
    rows = [runner.kv.rows.add(60) for _ in range(2)]
    found = [runner.forward(list(zip(rows, (IDS[:23], IDS[4:9]), strict=True)))]
    for i in range(4):
        found.append(runner.forward([(row, [IDS[i + k]]) for k, row in enumerate(rows)]))
    for row in rows:
        runner.kv.rows.drop(row)
    return torch.cat(found)


def check(path: Path, config: Any, slots: Sequence[int] = (1, 3), **options: Any) -> None:
    given = {"tokens": 512, "max_rows": 2} | options
    with open_runner(path, config, **given) as runner:
        whole = logits(runner)
    demand = {"experts": "demand", "expert_slots": 1000}
    with open_runner(path, config, **given, **demand) as runner:
        expected = logits(runner)
        assert relative_error(expected, whole) <= ROUNDING
        assert torch.equal(logits(runner), expected), "all that is asked for is there"
        report: Any = runner.streamer.last_experts  # type: ignore[attr-defined]
        assert report.asked == report.hits > 0
    for count in slots:
        with open_runner(path, config, **given, **demand | {"expert_slots": count}) as runner:
            for _ in range(2):  # the second finds slots full of what the first has asked for
                assert torch.equal(logits(runner), expected)


@pytest.mark.parametrize("name", TYPES)
def test_logits_are_the_same_bits_with_any_number_of_slots(tmp_path: Path, name: str) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model(name))
    check(path, load_config(path))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_gguf_file_are_brought_one_by_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, zoo_model(name))
    check(path, file_config(path))


@pytest.mark.parametrize(
    "packing",
    [PACKED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PACKED[1:])],
)
def test_packed_experts_come_with_their_scales(tmp_path: Path, packing: str) -> None:
    path = write_packed(tmp_path, zoo_model("qwen2_moe"), packing)
    check(path, load_config(path), slots=(1,))


def test_experts_of_another_dtype_than_the_engines_are_cast_as_they_are_used(
    tmp_path: Path,
) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("olmoe").to(torch.bfloat16))
    check(path, load_config(path), slots=(2,), dtype=torch.float32)


def test_a_prompt_over_nearly_all_experts_has_the_first_layers_come_before_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe"))
    config = load_config(path)
    assert config.experts is not None
    found, hinted = list[torch.Tensor](), list[int]()
    for crowd in (1, 1000):
        monkeypatch.setattr(mixing, "CROWD", crowd)
        demand = {"experts": "demand", "expert_slots": 2 * config.experts.count}
        with open_runner(path, config, tokens=64, max_rows=1, **demand) as runner:
            row, streamer = runner.kv.rows.add(60), runner.streamer
            for ids in (IDS[:23], IDS[23:24]):
                found.append(runner.forward([(row, ids)]))
                hinted.append(streamer.last_experts.hinted)  # type: ignore[attr-defined]
    assert hinted == [config.experts.count, 0, 0, 0]
    assert torch.equal(torch.cat(found[:2]), torch.cat(found[2:]))


def test_a_layer_that_fails_in_the_middle_of_its_experts_changes_no_bit_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe"))
    config = load_config(path)
    demand = {"experts": "demand", "expert_slots": 2}
    with open_runner(path, config, tokens=512, max_rows=2, **demand) as runner:
        expected = logits(runner)
    with open_runner(path, config, tokens=512, max_rows=3, **demand) as runner:
        usual, calls = StepWeights.expert, []

        def fails(self: StepWeights, x_TD: Any, expert: int, matrix: str) -> Any:
            calls.append(expert)
            if len(calls) == 8:
                raise ZeroDivisionError
            return usual(self, x_TD, expert, matrix)

        row = runner.kv.rows.add(30)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(StepWeights, "expert", fails)
            runner.forward([(row, IDS[:20])])
        runner.kv.rows.drop(row)
        assert torch.equal(logits(runner), expected)


def test_texts_are_the_same_and_slots_are_what_the_budget_leaves(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe"))
    prompts = [IDS[:9], IDS[2:5], IDS[:20]]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "return_details": True}

    def ids(**given: Any) -> tuple[Any, Any]:
        with make_engine(path, max_batch=3, **given) as engine:
            done = engine.generate(prompts, **options)
            return [one.ids for one in done], engine.plan

    expected, whole = ids()
    held = []
    for more in (0, 60_000, 1 << 30):
        with make_engine(path, max_batch=3, experts="demand", expert_slots=1) as engine:
            least = engine.plan.device_nbytes
        found, plan = ids(experts="demand", device_budget=least + more)
        assert found == expected and "slots of experts" in str(plan)
        held.append(plan.streamer.expert_bytes)
        assert plan.device_nbytes <= least + more
    assert 0 < held[0] < held[1] < held[2]
    assert not whole.streamer.expert_bytes


def test_what_passes_ask_for_goes_on_record(tmp_path: Path) -> None:
    path, trace = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe")), tmp_path / "trace.jsonl"
    with make_engine(path, experts="demand", expert_slots=2) as engine:
        engine.record_experts(trace)
        engine.generate(IDS[:9], max_new_tokens=4, temperature=0, return_details=True)
        count, per_token = engine.config.num_layers, engine.config.experts.per_token
        each = engine.plan.streamer.expert_bytes // 2
    found = read_trace(trace)
    assert [one.tokens for one in found.passes] == [9, 1, 1, 1]
    assert all([layer for layer, _ in one.asked] == [*range(count)] for one in found.passes)
    for one in found.passes[1:]:
        assert all(len(experts) == per_token for _, experts in one.asked)
    assert found.header.expert_nbytes == each and found.header.top_k == per_token
    with make_engine(path) as engine, pytest.raises(ValueError, match="on demand"):
        engine.record_experts(trace)


def test_a_dense_model_has_none_to_bring(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3"))
    with pytest.raises(ConfigError, match="has no experts"):
        make_engine(path, experts="demand", expert_slots=3)
