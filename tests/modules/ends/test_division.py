"""What of a model is on the device, what streams, and what is in host memory, by its budget."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import loaded, quiet
from tiny_models import run, tiny_class, tiny_model
from torch import nn

from layer_streamer import ConfigError, stream
from layer_streamer.modules.blocks import Block
from layer_streamer.modules.ends import choice
from layer_streamer.modules.ends.matrix import Ends, Matrix

GIB, MIB = 1 << 30, 1 << 20
FEW = {"n_cpu_pinned": 0, "n_cpu": 0}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    with quiet():
        model: Any = stream(folder, **{"device": "cpu", **FEW, **options})
    yield model
    model.layer_streamer.close()


def whole_of(plan: Any) -> int:
    """Bytes of a model with all of it on the device."""
    layers = (size.device_nbytes for p in plan.sequences.values() for size in p.sizes)
    return int(sum(layers) + plan.outside_nbytes)


def where(model: Any) -> tuple[str, str]:
    """Where the embedding's rows and the head's are."""
    plan = model.layer_streamer.plan
    name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    return "host" if plan.tables else "device", "stream" if name in plan.sequences else "device"


def taken(plan: Any) -> int:
    return int(
        plan.outside_nbytes + sum(sum(p.placement.device_bytes) for p in plan.sequences.values())
    )


def wide(folder: Path, *, tied: bool, vocab: int = 4000) -> Any:
    """A model most of which is outside its blocks, saved."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(2)
    with quiet():
        made = transformers.LlamaForCausalLM(config).eval()
        made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("tied", "threshold"),
    [
        (False, 0),
        (True, 64 * MIB),
        pytest.param(True, 0, marks=pytest.mark.slow),
        pytest.param(False, 64 * MIB, marks=pytest.mark.slow),
    ],
)
def test_every_budget_from_all_of_the_model_down_is_kept_until_one_line_refuses_it(
    tmp_path: Path, tied: bool, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LARGE", threshold)
    plain = wide(tmp_path, tied=tied)
    ids = torch.tensor([[1, 3, 999]])
    with torch.no_grad():
        want = plain(ids).logits
    with opened(tmp_path, device_budget=GIB) as model:
        whole = whole_of(model.layer_streamer.plan)
        assert where(model) == ("device", "device")
    seen = []
    budget, step = whole, whole // 16
    while budget > 0:
        try:
            with opened(tmp_path, device_budget=budget) as model:
                assert taken(model.layer_streamer.plan) <= budget
                seen.append(where(model))
                with torch.no_grad():
                    assert torch.allclose(model(ids).logits, want, rtol=0, atol=1e-6)
        except ConfigError as error:
            assert "needs at least" in str(error) and "outside the blocks" in str(error)
            break
        budget -= step
    found = list(dict.fromkeys(seen))
    table = [("host", "device")] if not tied else []
    assert found == [("device", "device"), *table, ("host", "stream")]
    assert budget < plain.lm_head.weight.nbytes, "one of the matrices alone is more"


def test_a_budget_far_below_table_and_head_of_a_seven_billion_model_is_enough(
    tmp_path: Path,
) -> None:
    """1.5 GiB: the head alone, or the table, with what the blocks need, would be more."""
    config = transformers.Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, dtype=torch.bfloat16,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        made = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    sparse(tmp_path / "model.safetensors", made)
    with opened(tmp_path, device_budget="1.5GiB") as model:
        assert where(model) == ("host", "stream")
        plan = model.layer_streamer.plan
        assert taken(plan) <= 1.5 * GIB
        assert plan.outside_nbytes < MIB
        text = str(plan)
        assert "rows from host memory: model.embed_tokens.weight, 1.02 GiB" in text
        assert "lm_head (its rows stream, in chunks):\n" in text
    with pytest.raises(ConfigError, match=r"device_budget=800 MiB: needs at least") as error:
        stream(tmp_path, device="cpu", device_budget="800MiB")
    assert "\n" not in str(error.value)


def sparse(path: Path, model: nn.Module) -> None:
    """A checkpoint of the model's shapes that takes no space: all zeros."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_nothing_is_taken_away_where_nothing_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LARGE", 1)
    wide(tmp_path, tied=False)
    with opened(tmp_path, device_budget=GIB) as model:
        assert where(model) == ("device", "device")
    with opened(tmp_path, device_budget=GIB, embeddings="host", head="stream") as model:
        assert where(model) == ("host", "stream")


def test_large_tables_come_from_host_memory_where_blocks_stream_without_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(tmp_path, tied=False)
    for threshold, found in ((4000 * 64 * 4, "host"), (4000 * 64 * 4 + 1, "device")):
        monkeypatch.setattr(choice, "LARGE", threshold)
        with opened(tmp_path) as model:
            assert where(model) == (found, "device")
        with opened(tmp_path, embeddings="device") as model:
            assert where(model) == ("device", "device")


def test_what_is_asked_for_is_done_or_refused(tmp_path: Path) -> None:
    plain = wide(tmp_path, tied=False)
    head = plain.lm_head.weight.nbytes
    small = {"device_budget": head * 3 // 4}
    with opened(tmp_path, **small) as model:
        assert where(model) == ("host", "stream")
    for wish, name in (({"head": "device"}, "lm_head"), ({"embeddings": "device"}, "embed_tokens")):
        words = rf"needs at least .* \('[a-z.]*{name}\.weight' of .* is the largest\)"
        with pytest.raises(ConfigError, match=words):
            stream(tmp_path, device="cpu", **small, **wish)  # type: ignore[call-overload]


def test_a_host_budget_is_shared_by_the_blocks_and_the_head(tmp_path: Path) -> None:
    with quiet():
        tiny_model("t5").save_pretrained(tmp_path)
        plain = loaded(tiny_class("t5"), tmp_path)
        want = run("t5", plain)
    sizes = {}
    for budget in (GIB, 700 << 10):
        with opened(tmp_path, cls=tiny_class("t5"), host_budget=budget, head="stream") as model:
            sizes[budget] = taken(model.layer_streamer.plan)
            with quiet():
                got = run("t5", model)
            assert all(torch.allclose(got[key], want[key], rtol=0, atol=1e-6) for key in want)
            assert sizes[budget] <= budget
    assert sizes[GIB] > sizes[700 << 10]


def test_no_way_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tuple(Matrix(name, size * MIB, (), None) for name, size in (("a", 70), ("b", 30)))
    head = Matrix("c", 90 * MIB, (), Block("head", nn.Identity()))
    wishes = choice.Wishes()
    found = [*choice.ways(Ends(tables, head), wishes, streams=True)]
    assert [[m.name for m in way] for way in found] == [
        ["a"],
        ["a", "b"],
        ["a", "c"],
        ["a", "b", "c"],
    ]
    assert [*choice.ways(Ends(tables, head), wishes, streams=False)] == [(), (head,)]
    monkeypatch.setattr(choice, "LARGE", 1)
    assert [*choice.ways(Ends(tables, head), wishes, streams=True)] == [tables, (*tables, head)]


def test_slots_become_fewer_before_the_head_streams(tmp_path: Path) -> None:
    """Two slots are nearly as fast as three, and a head that streams is bytes of every pass."""
    wide(tmp_path, tied=False, vocab=600)
    with opened(tmp_path, embeddings="device", head="device") as model:
        most = taken(model.layer_streamer.plan)
    seen = []
    for budget in range(most, 0, -12_288):
        try:
            with opened(tmp_path, device_budget=budget, embeddings="device") as model:
                (plan, *_) = model.layer_streamer.plan.sequences.values()
                seen.append((where(model)[1], sum(plan.placement.device_bytes)))
        except ConfigError:
            break
    at_first, streamed = seen[0][1], [i for i, (head, _) in enumerate(seen) if head == "stream"]
    assert streamed, "the head has to stream in the end"
    assert min(nbytes for head, nbytes in seen[: streamed[0]] if head == "device") < at_first
    assert max(nbytes for head, nbytes in seen[: streamed[0]]) <= at_first
