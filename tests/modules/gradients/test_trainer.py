"""transformers' Trainer over a streamed model: what it trains, keeps, and goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from recipes import loaded, quiet
from tiny_models import tiny_class, tiny_model
from trainees import adapters, same, streamed_with
from transformers import Trainer, TrainingArguments

pytest.importorskip("accelerate")


def rows(count: int = 12) -> Any:
    made = torch.Generator().manual_seed(3)
    some = [torch.randint(8, 90, (12,), generator=made) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in some]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    asked = {
        "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2,
        "save_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 5,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, **options,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **asked
    )
    model = peft.get_peft_model(model, config)
    some = rows()
    # Its making seeds what training draws.
    return Trainer(model=model, args=arguments, train_dataset=some, eval_dataset=some[:4])


def trained(model: Any, folder: Path, **options: Any) -> Any:
    made = trainer(model, folder, **options)
    made.train()
    return made


def losses(found: Any) -> list[float]:
    names = ("loss", "eval_loss", "grad_norm")
    return [entry[n] for entry in found.state.log_history for n in names if n in entry]


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trainer_trains_keeps_and_resumes_adapters_as_over_the_resident_model(
    tmp_path: Path, reentrant: bool
) -> None:
    base = tmp_path / "base"
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with quiet():
        tiny_model("llama").save_pretrained(base)
        plain = trained(loaded(tiny_class("llama"), base), tmp_path / "plain", **options)
        mine = trained(streamed_with(base, "llama"), tmp_path / "mine", **options)
        assert same(adapters(plain.model), adapters(mine.model))
        assert losses(plain) == losses(mine) and len(losses(mine)) > 10
        mine.model.save_pretrained(tmp_path / "adapter")
        alone = peft.PeftModel.from_pretrained(
            loaded(tiny_class("llama"), base).eval(), tmp_path / "adapter"
        )
        ids = rows(1)[0]["input_ids"][None]
        mine.model.eval()
        with torch.no_grad():
            assert torch.equal(alone(input_ids=ids).logits, mine.model(input_ids=ids).logits)
        again = trainer(streamed_with(base, "llama"), tmp_path / "mine", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))
        assert same(adapters(again.model), adapters(mine.model))
        for one in (mine, again):
            one.model.base_model.model.layer_streamer.close()


@pytest.mark.slow
def test_half_precision_by_the_trainer_is_that_of_the_resident_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with quiet():
        tiny_model("llama").bfloat16().save_pretrained(base)
        plain = trained(
            loaded(tiny_class("llama"), base, dtype="auto"), tmp_path / "plain", bf16=True
        )
        model = streamed_with(base, "llama")
        mine = trained(model, tmp_path / "mine", bf16=True)
    assert same(adapters(plain.model), adapters(mine.model))
    assert losses(plain) == losses(mine)
    model.layer_streamer.close()
