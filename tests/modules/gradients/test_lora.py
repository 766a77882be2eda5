"""LoRA over streamed weights: losses, gradients and trained adapters of the resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import REPRESENTATIVE, TYPES, tiny_inputs
from tiny_quantized import quantized_checkpoint
from trainees import adapters, gradients, has, loss_of, same, train, trainees

from layer_streamer import StreamerError

DEFAULT = ["llama", "gpt2", "mixtral", "qwen3_moe", "bert", "t5", "vit", "qwen3_vl"]
"""Dense, mixtures, an encoder, an encoder and its decoder, pictures, pictures and text."""
NEITHER = {
    "resnet": "marks no blocks",
    "clip": "has no loss of one tensor",
}


def check_gradients(folder: Path, name: str, reentrant: bool) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    with trainees(folder, name, reentrant=reentrant) as (plain, model):
        for step in range(2):
            losses = []
            for one in (plain, model):
                one.zero_grad()
                loss = loss_of(one, name, step)
                loss.backward()
                losses.append(loss)
            assert torch.equal(*losses)
            assert same(gradients(plain), gradients(model))


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in DEFAULT), ("llama", True), ("vit", True)]
)
def test_losses_and_gradients_are_those_of_the_resident_model(
    tmp_path: Path, name: str, reentrant: bool
) -> None:
    check_gradients(tmp_path, name, reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", sorted({*REPRESENTATIVE, *DEFAULT} - {*NEITHER}))
def test_losses_and_gradients_of_every_type_are_those_of_the_resident_model(
    tmp_path: Path, name: str, reentrant: bool
) -> None:
    check_gradients(tmp_path, name, reentrant)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_after_five_steps_of_two_batches_are_those_of_the_resident_model(
    tmp_path: Path, reentrant: bool
) -> None:
    with trainees(tmp_path, "llama", reentrant=reentrant) as (plain, model):
        before = adapters(model)
        assert train(plain, "llama") == train(model, "llama")
        assert same(adapters(plain), adapters(model))
        assert not same(before, adapters(model))


ENDS = {
    "rows from the host": ({"embeddings": "host", "head": "device"}, 0.0),
    "head that streams": ({"embeddings": "device", "head": "stream"}, 1e-6),
    "both": ({"embeddings": "host", "head": "stream"}, 1e-6),
}
"""Options, and by how much gradients may differ: a head is summed up chunk by chunk."""


@pytest.mark.parametrize("ends", ENDS)
def test_tables_and_heads_may_be_away(tmp_path: Path, ends: str) -> None:
    options, rounding = ENDS[ends]
    with trainees(tmp_path, "llama", **options) as (plain, model):
        for one in (plain, model):
            loss_of(one, "llama", 1).backward()
        mine, theirs = gradients(model), gradients(plain)
        assert mine.keys() == theirs.keys()
        for key, gradient in theirs.items():
            torch.testing.assert_close(mine[key], gradient, rtol=rounding, atol=rounding)


def test_a_head_that_streams_is_multiplied_back_as_autocast_has_multiplied(tmp_path: Path) -> None:
    with trainees(tmp_path, "llama", head="stream") as (plain, model):
        for one in (plain, model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(one, "llama", 1)
            loss.backward()
        for key, gradient in gradients(plain).items():
            most = gradient.abs().max().item()  # type: ignore[union-attr]
            torch.testing.assert_close(gradients(model)[key], gradient, rtol=0, atol=0.05 * most)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_of_the_optimizer_the_next_steps_are_exact(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail(optimizer: Any, args: Any, kwargs: Any) -> None:
        raise error("of the optimizer")

    with trainees(tmp_path, "llama") as (plain, model):
        loss_of(model, "llama", 7).backward()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        optimizer.register_step_pre_hook(fail)
        with pytest.raises(error, match="of the optimizer"):
            optimizer.step()
        model.zero_grad()
        assert train(plain, "llama", 2) == train(model, "llama", 2)
        assert same(adapters(plain), adapters(model))


@pytest.mark.parametrize(("name", "method"), [("llama", "fp8"), ("mixtral", "fp8")])
def test_quantized_weights_are_unpacked_again_for_a_backward(
    tmp_path: Path, name: str, method: str
) -> None:
    quantized_checkpoint(tmp_path, name, method)
    lora = {"target_modules": ["q_proj", "v_proj"]}
    with trainees(tmp_path, name, reentrant=name == "llama", lora=lora) as (plain, model):
        for one in (plain, model):
            loss_of(one, name, 1).backward()
        assert same(gradients(plain), gradients(model))


def test_adapters_of_experts_matrices_are_an_error(tmp_path: Path) -> None:
    lora = {"target_modules": "all-linear", "lora_dropout": 0.0}
    with (
        trainees(tmp_path, "mixtral", lora=lora) as (_, model),
        pytest.raises(StreamerError, match="weights were written to"),
    ):
        loss_of(model, "mixtral", 1).backward()


@pytest.mark.parametrize("kind", ["bf16", "budget", "two devices"])
def test_gradients_are_exact_in_half_precision_with_resident_layers_and_on_two_devices(
    tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {
        "bf16": {"dtype": torch.bfloat16},
        "budget": {"device_budget": "400KiB"},
        "two devices": {"device": ["cpu", "cpu"]},
    }[kind]
    with trainees(tmp_path, "llama", **options) as (plain, model):
        if kind == "budget":
            (plan,) = model.layer_streamer.plan.sequences.values()
            assert set(plan.tiers) == {"device", "disk"}
        for step in range(2):
            for one in (plain, model):
                loss_of(one, "llama", step).backward()
            assert same(gradients(plain), gradients(model))


def test_evaluations_and_generations_between_steps_change_nothing(tmp_path: Path) -> None:
    ids = tiny_inputs("llama")["input_ids"]
    with trainees(tmp_path, "llama") as (plain, model):
        for step in range(3):
            for one in (plain, model):
                loss_of(one, "llama", step).backward()
            texts, logits = [], []
            for one in (plain, model):
                one.eval()
                with torch.no_grad():
                    logits.append(one(ids).logits)
                    texts.append(one.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
                one.train()
            assert torch.equal(*logits) and torch.equal(*texts)
            assert same(gradients(plain), gradients(model))


def test_the_types_that_are_trained_are_known() -> None:
    assert {*DEFAULT} <= {*TYPES}


def test_what_would_change_weights_that_stream_is_an_error(tmp_path: Path) -> None:
    with trainees(tmp_path, "llama", lora={"lora_dropout": 0.0}) as (_, model):
        loss_of(model, "llama", 1).backward()
        with pytest.raises(StreamerError, match="weight is used while its block has no weights"):
            model.merge_and_unload()
    with trainees(tmp_path, "llama") as (_, model):
        norm = model.base_model.model.model.layers[1].input_layernorm.weight
        norm.requires_grad = True
        with pytest.raises(StreamerError, match=r"layers\.1\.input_layernorm\.weight: gradients"):
            loss_of(model, "llama", 1)
        norm.requires_grad = False
        loss_of(model, "llama", 1).backward()
    with (
        pytest.raises(StreamerError, match=r"q_proj\.weight is used"),
        trainees(tmp_path, "llama", lora={"use_dora": True, "target_modules": ["q_proj"]}),
    ):
        pass
