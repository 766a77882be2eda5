"""What goes wrong in a call of a pipeline leaves the next one right, and nothing open."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import footprint
from tiny_pipelines import picture, streamed

from layer_streamer import CheckpointChangedError, StreamerError

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)


def test_an_error_between_two_steps_leaves_the_next_picture_right(
    flux: Path, drawn: torch.Tensor
) -> None:
    with streamed(flux) as pipe:
        for error in (LookupError, KeyboardInterrupt):

            def fail(*args: Any, error: type[BaseException] = error) -> Any:
                raise error

            with pytest.raises(error):
                picture(pipe, callback_on_step_end=fail)
            assert torch.equal(picture(pipe), drawn)


def test_an_error_within_a_block_leaves_the_next_picture_right(
    flux: Path, drawn: torch.Tensor
) -> None:
    with streamed(flux) as pipe:
        for module in (pipe.transformer.single_transformer_blocks[2].attn.to_k,
                       pipe.text_encoder_2.encoder.block[1].layer[0]):  # fmt: skip
            handle = module.register_forward_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                picture(pipe)
            handle.remove()
            assert torch.equal(picture(pipe), drawn)


def test_an_interrupt_within_a_block_leaves_the_next_picture_right(
    flux: Path, drawn: torch.Tensor
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with streamed(flux) as pipe:
        for module in (pipe.transformer.transformer_blocks[1].attn, pipe.text_encoder.encoder):
            handle = module.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                picture(pipe)
            handle.remove()
            assert torch.equal(picture(pipe), drawn)


def test_a_second_call_at_once_is_refused_and_the_first_one_is_right(
    flux: Path, drawn: torch.Tensor
) -> None:
    raised: list[BaseException] = []

    with streamed(flux) as pipe:
        block = pipe.transformer.transformer_blocks[1]
        embeds, pooled, _ = pipe.encode_prompt("a cat", None, max_sequence_length=8)
        pipe.tokenizer.model_max_length = 8

        def second() -> None:
            try:
                with torch.no_grad():
                    pipe.transformer(
                        torch.zeros(1, 16, 16), embeds, pooled, torch.ones(1),
                        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(embeds.shape[1], 3),
                    )  # fmt: skip
            except StreamerError as error:
                raised.append(error)

        def meanwhile(*args: Any) -> None:
            handle.remove()
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

        handle = block.attn.register_forward_pre_hook(meanwhile)
        assert torch.equal(picture(pipe), drawn)
    assert len(raised) == 1
    assert "two forwards at once" in str(raised[0])


def test_files_that_change_are_told_of_by_the_call_that_needs_them(
    flux: Path, tmp_path: Path
) -> None:
    shutil.copytree(flux, tmp_path / "flux")
    with streamed(tmp_path / "flux") as pipe:
        picture(pipe)
        path = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointChangedError, match="transformer"):
            picture(pipe)


@pytest.mark.slow
def test_twenty_rounds_leave_no_thread_and_no_descriptor(flux: Path, drawn: torch.Tensor) -> None:
    with streamed(flux) as pipe:
        picture(pipe)
    del pipe
    gc.collect()
    before = footprint()
    for _ in range(20):
        with streamed(flux, device_budget="900KiB") as pipe:
            assert torch.equal(picture(pipe), drawn)
        del pipe
    gc.collect()
    assert footprint() == before
