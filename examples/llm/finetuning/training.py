"""transformers' Trainer over a model whose weights stream, and an adapter of peft's.

Nothing here is of this library's own but the loss, which takes less memory: copy it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from .loss import token_loss
from .samples import UNSAID, Sample
from .settings import Settings
from .watching import Watch

EXPERTS = r".*\.experts\..*"
WARMUP = 0.03
"""Share of the steps in which the learning rate rises to what it is asked to be."""


class Batches:
    """Rows of one batch, padded to the longest: ids, labels, mask, (rows, tokens), int64."""

    def __init__(self, pad: int) -> None:
        """``pad``: the id behind shorter rows, which is looked at by nothing."""
        self._pad = pad

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        most = max(len(sample.ids) for sample in samples)

        def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            filled = [[*row, *[value] * (most - len(row))] for row in rows]
            return torch.tensor(filled, dtype=torch.int64, device="cpu")

        return {
            "input_ids": padded([sample.ids for sample in samples], self._pad),
            "labels": padded([sample.labels for sample in samples], UNSAID),
            "attention_mask": padded([[1] * len(sample.ids) for sample in samples], 0),
        }


def linear_modules(model: nn.Module) -> list[str]:
    """Ends of the names of all linear modules but the output head and what is of experts, whose
    matrices no adapter can lie beside while they stream."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".experts." not in name
    }
    if not found:
        raise ValueError(f"{type(model).__name__}: no linear modules found, name --target-modules")
    return sorted(found)


def adapted(model: Any, settings: Settings, name: str) -> Any:
    """The model with a fresh adapter. ``name``: what the adapter says that its base is."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scaled_alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or linear_modules(model),
        exclude_modules=EXPERTS
        if any(".experts." in n for n, _ in model.named_modules())
        else None,
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)
    model.config.use_cache = False
    model.name_or_path = name  # which peft asks
    return get_peft_model(model, config)


def arguments_for(model: Any, settings: Settings, folder: Path, *, looks: bool) -> Any:
    """The trainer's, for a streamed model. ``looks``: there are rows that are held out."""
    on_gpu, dtype = model.device.type == "cuda", model.dtype
    # What it is called from transformers 5.23 on, and before.
    names = {field.name for field in fields(TrainingArguments)}
    word = "activation" if "activation_checkpointing" in names else "gradient"
    checkpoints: dict[str, Any] = {
        f"{word}_checkpointing": True,
        f"{word}_checkpointing_kwargs": {"use_reentrant": False},
    }
    every = "no" if not looks else "epoch" if settings.eval_steps is None else "steps"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        **checkpoints,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        eval_strategy=every,
        eval_steps=settings.eval_steps,
        eval_on_start=looks,
        prediction_loss_only=True,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the model streams to one of them
    return arguments


def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """What the trainer asks for."""
    return token_loss(outputs["logits"], labels, num_items_in_batch)


def train(
    model: Any,
    arguments: Any,
    pad: int,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    watch: Watch,
    checkpoint: str | None = None,
) -> Any:
    """Train the adapters, from a checkpoint on if it is given.

    ``samples``: those to learn and those that are held out, which may be none. Returns the trainer.
    Raises what streaming, the device and Ctrl-C raise; checkpoints stay then.
    """
    learned, held_out = samples
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=Batches(pad),
        train_dataset=list(learned),  # type: ignore[arg-type,unused-ignore]
        eval_dataset=list(held_out) or None,  # type: ignore[arg-type,unused-ignore]
        compute_loss_func=loss_of,
        callbacks=[watch],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def hold_out(
    samples: Sequence[Sample], share: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn, and this share of them, drawn by the seed, that is held out: at least one
    of each. ValueError if there are too few."""
    count = max(round(len(samples) * share), 1)
    if count >= len(samples):
        raise ValueError(f"--hold-out {share}: of {len(samples)} rows none is left to learn")
    drawn = {*random.Random(seed).sample(range(len(samples)), count)}
    learned = [sample for at, sample in enumerate(samples) if at not in drawn]
    return learned, [samples[at] for at in sorted(drawn)]
