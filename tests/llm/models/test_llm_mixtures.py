"""Mixtures of experts: who is chosen, what is packed, and what cannot be done with them yet."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from assets import open_runner, relative_error, tiny_checkpoint
from forward import open_forward
from gguf_models import file_config, write_gguf
from packed_models import write_packed
from zoo import CLASSES, IDS, PROMPT, biased, reference, stepwise, zoo_config, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.host_kernels import products
from layer_streamer.llm.host_kernels.build import COMPILERS
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.passes.decode import captured_rows, obstacle
from layer_streamer.llm.weights.packed import Packed
from layer_streamer.llm.weights.weights import StepWeights

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
TOLERANCE = 1e-5


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each expert that computes, and of how many tokens."""
    found: list[tuple[int, int]] = []
    real = StepWeights.expert

    def expert(self: StepWeights, x_TD: torch.Tensor, expert: int, matrix: str) -> torch.Tensor:
        if matrix == "down_proj":
            found.append((expert, len(x_TD)))
        return real(self, x_TD, expert, matrix)

    monkeypatch.setattr(StepWeights, "expert", expert)
    return found


@pytest.mark.parametrize("name", TYPES)
def test_one_expert_may_have_all_tokens_and_another_none(
    tmp_path: Path, name: str, computed: list[tuple[int, int]]
) -> None:
    model = biased(zoo_model(name), {1: 2.0, 2: -2.0})
    path = tiny_checkpoint(tmp_path, model)
    with open_forward(path, load_config(path)) as forward:
        found = stepwise(forward)
    assert relative_error(found, reference(model)) <= TOLERANCE
    experts = {expert for expert, _ in computed}
    assert 1 in experts and 2 not in experts and len(experts) > 2
    assert computed.count((1, PROMPT)) == model.config.num_hidden_layers


def test_experts_compute_in_ascending_order_those_that_are_chosen_and_no_others(
    tmp_path: Path, computed: list[tuple[int, int]]
) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe"))
    with open_forward(path, load_config(path)) as forward:
        forward(IDS[:1])
        for layer in range(3):
            own = [expert for expert, _ in computed[3 * layer : 3 * layer + 3]]
            assert own == sorted(set(own))
        assert [count for _, count in computed] == [1] * 9


@pytest.mark.parametrize("packing", ["ct4-asym-g16", "ct8-g32", "int8-asym-g32", "awq-g32",
                                     "gptq4-v2-act-order", "fp8-blocks"])  # fmt: skip
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-dense"])
def test_experts_may_be_packed_in_any_format(tmp_path: Path, name: str, packing: str) -> None:
    model = zoo_model(name)
    path = write_packed(tmp_path / "packed", model, packing)
    with open_forward(path, load_config(path)) as forward:
        found = forward(IDS[:PROMPT])
    assert relative_error(found, reference(model, IDS[:PROMPT], PROMPT)) <= TOLERANCE


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
def test_few_tokens_of_packed_experts_are_multiplied_as_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[str, int]]()

    def multiply(packed: Packed, x_TD: torch.Tensor, *bias: Any) -> torch.Tensor:
        seen.append((packed.format, len(x_TD)))
        return products_multiply(packed, x_TD, *bias)

    products_multiply = products.multiply
    monkeypatch.setattr(products, "multiply", multiply)
    path = write_packed(tmp_path / "packed", zoo_model("mixtral"), "ct8-g32")
    with open_forward(path, load_config(path)) as forward:
        forward(IDS[:1])
        config = load_config(path)
    assert config.experts is not None
    attention = 4 * config.num_layers
    each = 3 * config.num_layers * config.experts.per_token
    assert seen.count(("ct8", 1)) == attention + each


def test_experts_that_count_for_more_or_are_fewer_show(tmp_path: Path) -> None:
    model = zoo_model("qwen2_moe")
    expected, path = reference(model), tiny_checkpoint(tmp_path, model)
    config = load_config(path)
    assert config.experts is not None and config.experts.shared_width == 64
    for wrong in ({"normed": True}, {"per_token": 2}):
        changed = replace(config, experts=replace(config.experts, **wrong))
        with open_forward(path, changed) as forward:
            assert relative_error(stepwise(forward), expected) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_bfloat16_is_on_average_as_near_to_float32_as_that_of_transformers(
    tmp_path: Path, name: str
) -> None:
    """Of one text it need not be: a rounding that chooses another expert outweighs all others."""
    load, ratios = CLASSES[name][1].from_pretrained, []
    for seed in range(12):
        model = zoo_model(name, seed=seed).to(torch.bfloat16)
        path = tiny_checkpoint(tmp_path / str(seed), model)
        theirs, exact = (reference(load(path, dtype=d)) for d in (torch.bfloat16, torch.float32))
        with open_forward(path, load_config(path), dtype=torch.bfloat16) as forward:
            ours = stepwise(forward)
        errors = [float((found - exact).square().mean().sqrt()) for found in (ours, theirs)]
        ratios.append(math.log(errors[0] / errors[1]))
    assert sum(ratios) / len(ratios) <= math.log(1.25)


def test_what_a_token_is_does_not_depend_on_its_place_in_a_pass(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("olmoe"))
    rows = [IDS[:20], IDS[30:37], IDS[40:52]]
    with open_runner(path, load_config(path), tokens=768, max_rows=3) as runner:
        found = []
        for order in ((0, 1, 2), (2, 0, 1)):
            slots = {i: runner.kv.rows.add(32) for i in order}
            logits = runner.forward([(slots[i], rows[i]) for i in order])
            found.append(dict(zip(order, logits, strict=True)))
            for slot in slots.values():
                runner.kv.rows.drop(slot)
    for i in range(3):
        assert relative_error(found[0][i], found[1][i]) <= TOLERANCE


def spoil_scale(path: Path, name: str, expert: int) -> None:
    """Make a scale in the last row of one expert's matrix infinite."""
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    nbytes = tensor.data.nbytes // len(tensor.data)
    at = int(tensor.data_offset) + (expert + 1) * nbytes - 34  # a block of Q8_0
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.float16(np.inf).tobytes())


def test_a_scale_of_one_expert_that_is_not_finite_is_found_when_the_expert_computes(
    tmp_path: Path,
) -> None:
    model, path = biased(zoo_model("mixtral"), {4: 2.0, 2: -2.0}), tmp_path / "a.gguf"
    write_gguf(path, model)
    spoil_scale(path, "blk.1.ffn_down_exps.weight", 2)
    with open_runner(path, file_config(path)) as runner:
        row = runner.kv.rows.add(64)
        runner.forward([(row, IDS[:9])])
    spoil_scale(path, "blk.1.ffn_down_exps.weight", 4)
    with open_runner(path, file_config(path)) as runner:
        row = runner.kv.rows.add(64)
        with pytest.raises(UnsupportedModelError, match=r"'blk.1.ffn_down_exps.weight' has scales"):
            runner.forward([(row, IDS[:9])])


def test_experts_of_a_file_may_have_tensors_of_their_own(tmp_path: Path) -> None:
    model, path = zoo_model("mixtral"), tmp_path / "a.gguf"
    write_gguf(path, model, apart=True)
    assert "ffn_up.4.weight" in read_manifest(path).layers[1].tensors
    with open_forward(path, file_config(path)) as forward:
        found = forward(IDS[:PROMPT])
    assert relative_error(found, reference(model, IDS[:PROMPT], PROMPT)) <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 7}, r"'blk.0.ffn_gate_inp.weight' has shape \[8, 64\], the config says \[7, 64"),
        ({"width": 64}, r"'blk.0.ffn_gate_exps.weight' has shape \[8, 32, 64\], .* \[8, 64, 64\]"),
        ({"layers": frozenset({0, 1})}, "layer 2: tensor 'ffn_gate.weight' is missing"),
    ],
)
def test_experts_of_a_file_that_contradict_its_config_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("qwen3_moe"))
    config = file_config(path)
    assert config.experts is not None
    wrong = replace(config, experts=replace(config.experts, **changes))
    with pytest.raises(UnsupportedModelError, match=message):
        weight_names(read_manifest(path), wrong)


def test_a_matrix_of_an_expert_in_a_file_is_a_view(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("qwen3_moe"))
    names = weight_names(read_manifest(path), file_config(path))
    stored = names.layers[1]["mlp.experts.5.down_proj"]
    assert (stored.expert, stored.key, stored.format) == (5, "ffn_down_exps.weight", "Q8_0")
    whole = torch.arange(8 * 64 * 34).remainder(256).to(torch.uint8).view(8, 64, 34)
    raw = stored.packed({stored.key: whole}).parts["raw"]
    assert raw.data_ptr() == whole[5].data_ptr() and torch.equal(raw, whole[5])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok 6: must be from 1 to .*, 5"),
        ("olmoe", {"num_experts_per_tok": 0}, "num_experts_per_tok 0: must be from 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0: must be at least 1"),
        ("qwen2_moe", {"mlp_only_layers": 1}, "'mlp_only_layers' expected list, found 1"),
    ],
)
def test_numbers_of_experts_that_make_no_sense_are_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    fields = zoo_config(name).to_dict() | {"model_type": name} | change
    with pytest.raises(UnsupportedModelError, match=message):
        model_config(SimpleNamespace(**fields))


def test_a_model_whose_layers_are_all_dense_is_no_mixture() -> None:
    config = model_config(zoo_config("qwen3_moe", mlp_only_layers=[0, 1, 2]))
    assert config.experts is None and config.mixture(0) is None and config.widest_ffn == 96


def test_passes_over_a_mixture_that_comes_whole_are_not_captured(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("olmoe"))
    config = load_config(path)
    with open_runner(path, config) as runner:
        reason = obstacle(runner.streamer, runner.kv, config)
        assert reason and reason.startswith("experts come with their layers, and who computes")
    assert captured_rows(torch.device("cuda"), config) == 0


def test_a_mixture_is_no_draft_of_itself(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("olmoe"))
    with pytest.raises(ValueError, match="not with a mixture of experts"):
        StreamingEngine(path, device="cpu", max_length=64, draft="self")


def test_drafts_by_lookup_change_no_token_of_a_mixture(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe"))
    options: dict[str, Any] = {"device": "cpu", "max_length": 64, "reproducible": True}
    found = []
    for more in ({}, {"lookup": True}):
        with StreamingEngine(path, **options, **more) as engine:
            found.append(engine.generate([IDS[:9] * 3], max_new_tokens=12, temperature=0,
                                         return_details=True)[0].ids)  # fmt: skip
    assert found[0] == found[1]
