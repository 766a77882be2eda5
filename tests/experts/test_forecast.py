"""What experts on demand would come to, as plans say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import EXPERTS, LAYERS, alone, stacked

from layer_streamer import read_manifest
from layer_streamer.checkpoint.experts import ExpertLayer, split_experts
from layer_streamer.experts.forecast import experts_per_token, forecast
from layer_streamer.tools.cli import main


def layers(path: Path) -> list[ExpertLayer]:
    found = [split_experts(layer)[1] for layer in read_manifest(path).layers]
    return [layer for layer in found if layer is not None]


def test_a_token_takes_the_rest_and_what_is_missing_over_the_link(tmp_path: Path) -> None:
    alone(tmp_path)
    of = layers(tmp_path)
    each = of[0].expert_nbytes
    found = forecast(of, 2, (9, 9 * 4096), seconds=0.5, copy_rate=1000.0)
    assert found.token_bytes == 2 * LAYERS * each
    assert found.slots_a_layer == 3 and found.more_slots == (1 << 30) // 4096
    none, half, most = found.rates
    assert none.tokens_per_second == pytest.approx(1 / (0.5 + 2 * LAYERS * each / 1000))
    assert half.missing_bytes == LAYERS * each
    assert most.missing_bytes == pytest.approx(0.4 * LAYERS * each)


def test_without_rates_only_bytes_are_said(tmp_path: Path) -> None:
    alone(tmp_path)
    for seconds, rate in ((None, 1.0), (0.1, None)):
        found = forecast(layers(tmp_path), 3, (1, 256), seconds, rate)
        assert [one.tokens_per_second for one in found.rates] == [None] * 3
        assert "tokens a second" not in str(found)


def test_a_token_asks_for_no_more_experts_than_there_are(tmp_path: Path) -> None:
    alone(tmp_path)
    of = layers(tmp_path)
    assert forecast(of, 99, (1, 1), None, None).token_bytes == sum(layer.nbytes for layer in of)


@given(st.sampled_from(["num_experts_per_tok", "moe_topk"]), st.integers(1, 64), st.booleans())
def test_configs_say_how_many_a_token_needs(name: str, count: int, nested: bool) -> None:
    fields: dict[str, Any] = {name: count}
    assert experts_per_token({"text_config": fields} if nested else fields) == count
    assert experts_per_token({"general.architecture": "a", "a.expert_used_count": count}) == count


@pytest.mark.parametrize("value", [None, 0, -1, True, "8", 2.0, [8]])
def test_what_is_no_number_of_experts_says_nothing(value: object) -> None:
    assert experts_per_token({"num_experts_per_tok": value}) is None
    assert experts_per_token({}) is None


@pytest.mark.parametrize("config", [None, {}, [], {"num_experts_per_tok": 2}])
def test_the_plan_of_a_mixture_says_what_a_token_needs_if_its_config_does(
    tmp_path: Path, config: Any, capsys: Any
) -> None:
    stacked(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--experts", "demand", "--expert-slots", "5", "--device", "cpu"]
    assert main(["plan", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert "5 slots of experts" in out and document["expert_slots"] == 5
    known = bool(config) and isinstance(config, dict)
    assert ("experts" in document) == known == ("a token asks 2 of each layer" in out)
    if known:
        assert document["experts"]["slots_a_layer"] == pytest.approx(5 / LAYERS)
        assert document["experts"]["per_token"] == 2 <= EXPERTS
