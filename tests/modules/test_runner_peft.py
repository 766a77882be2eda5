"""Adapters of the real peft over streamed blocks: added, loaded, switched; exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import HIDDEN, Streamed, streamed

from layer_streamer import StreamerError

pytestmark = pytest.mark.slow
TARGETS = ["up", "down"]


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.fixture(params=[False, True])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path / "model", strict=request.param) as some:
        yield some


def saved(peft: Any, some: Streamed, path: Path, seed: int) -> Path:
    """A random adapter for the resident model, which it is taken out of again."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    wrapped = peft.get_peft_model(some.resident, config)
    wrapped.save_pretrained(path)
    some.resident = wrapped.unload()
    return path


def load(peft: Any, model: Any, *paths: Path) -> Any:
    """One by a copy into it, the other in its place."""
    wrapped = peft.PeftModel.from_pretrained(model, paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], 1):
        wrapped.load_adapter(path, adapter_name=str(number), low_cpu_mem_usage=True)
    return wrapped


@pytest.mark.parametrize("when", ["before a forward", "after one"])
def test_adapters_are_loaded_and_switched_over_streamed_weights(
    peft: Any, opened: Streamed, tmp_path: Path, when: str
) -> None:
    paths = [saved(peft, opened, tmp_path / f"adapter{n}", n) for n in range(2)]
    x = torch.ones(2, HIDDEN)
    with torch.no_grad():
        plain = opened.resident(x)
        if when == "after one":
            opened.agree()
        mine, theirs = (load(peft, m, *paths) for m in (opened.model, opened.resident))
        outputs = [plain]
        for name in ("0", "1", "0"):
            for model in (mine, theirs):
                model.set_adapter(name)
            assert torch.equal(mine(x), theirs(x))
            outputs.append(mine(x))
        assert torch.equal(outputs[1], outputs[3])
        assert not torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[1], outputs[2])
        with mine.disable_adapter():
            assert torch.equal(mine(x), plain)


def test_an_adapter_that_is_made_over_streamed_weights_lies_where_they_will(
    peft: Any, opened: Streamed
) -> None:
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    outputs = []
    for model in (opened.model, opened.resident):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, config)
        assert not any(p.is_meta for n, p in wrapped.named_parameters() if "lora" in n)
        with torch.no_grad():
            outputs.append(wrapped(torch.ones(2, HIDDEN)))
    assert torch.equal(*outputs)


def test_an_adapter_that_was_made_on_meta_before_the_model_streamed_is_named(
    peft: Any, opened: Streamed
) -> None:
    opened.runner.close()
    config = peft.LoraConfig(r=2, target_modules=TARGETS)
    peft.get_peft_model(opened.model, config)
    opened.stream_again()
    for _ in range(2):
        with pytest.raises(StreamerError, match=r"blocks\.0\.up\.lora_A.* is on meta"):
            opened.model(torch.ones(2, HIDDEN))
