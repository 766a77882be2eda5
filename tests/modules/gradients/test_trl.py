"""TRL's SFTTrainer over a streamed model: the adapters of the resident one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from recipes import loaded, quiet
from tiny_models import tiny_class, tiny_model
from tokenizers_made import byte_level
from trainees import adapters, same, streamed_with

pytestmark = pytest.mark.slow

IDS = [[10 + (7 * row + place) % 70 for place in range(12)] for row in range(8)]


def trained(model: Any, folder: Path, *, reentrant: bool) -> Any:
    """Two steps of two batches each, an evaluation in between."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(1)
    tokenizer = byte_level()
    tokenizer.pad_token = "</s>"
    asked = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=True, learning_rate=1e-2,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}, use_cpu=True, bf16=False,
        eval_strategy="steps", eval_steps=1, report_to=[], disable_tqdm=True, logging_steps=1,
        max_length=32, save_strategy="no", remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    ids = {"input_ids": IDS}
    # Named, as some versions cannot hash a table of pyarrow's.
    rows = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(ids), fingerprint="rows")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trl.SFTTrainer(
        model=model, args=asked, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("reentrant", [False, True])
def test_trl_trains_the_adapters_of_the_resident_model(tmp_path: Path, reentrant: bool) -> None:
    base = tmp_path / "base"
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_model("llama").save_pretrained(base)
        plain = loaded(tiny_class("llama"), base)
        model = streamed_with(base, "llama")
        mine, theirs = (
            trained(one, tmp_path / "out", reentrant=reentrant) for one in (model, plain)
        )
    assert same(adapters(theirs.model), adapters(mine.model))
    losses = [
        [row["loss"] for row in one.state.log_history if "loss" in row] for one in (mine, theirs)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    model.layer_streamer.close()
