"""Rows of the embedding, gathered while the device computes: the same bits, however late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packed_cases
import pytest
import torch
from assets import open_runner, tiny_checkpoint, tiny_model
from fake_device import FakeDevice
from late_transfers import Interrupted, LateTransfers

from layer_streamer.llm.kv.transfers import HostTransfers
from layer_streamer.llm.memory.footprint import Footprint, Needs
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.passes import embedding as embedding_module
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.embedding import Embedding
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.packed import Packed
from layer_streamer.llm.weights.weights import embed_tokens

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 96, 512
IDS = torch.tensor([95, 0, 5, 5, 64, 33, 7, 12, 11, 90, 1])
TABLES = {
    **{kind: packed_cases.blocks(kind, VOCABULARY, WIDTH) for kind in ("Q4_0", "Q8_0", "Q6_K")},
    "ct4": packed_cases.integers("ct4", VOCABULARY, WIDTH, 128, zero=True),
    "ct8": packed_cases.integers("ct8", VOCABULARY, WIDTH, 128),
    "int8": packed_cases.integers("int8", VOCABULARY, WIDTH, 128, zero=True),
    "fp8": packed_cases.fp8(VOCABULARY, WIDTH, (32, 128)),
    "fp8, one scale": packed_cases.fp8(VOCABULARY, WIDTH, (0, 0)),
}


def floats(dtype: torch.dtype) -> Packed:
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype)
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    return Packed(format=kind, rows=VOCABULARY, width=WIDTH, parts={"weight": weight})


def config_of(model_type: str = "qwen2") -> Any:
    return model_config(tiny_model(model_type).config)


def unpacker_for(table: Packed, dtype: torch.dtype) -> Unpacker:
    return Unpacker(CPU, dtype, Widest.of([(table.format, table.width, True)]))


@pytest.mark.parametrize("stage_nbytes", [1, 3000, 1 << 24])
@pytest.mark.parametrize("name", [*TABLES, "float32", "bfloat16"])
def test_rows_that_go_through_a_stage_are_bit_for_bit_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, name: str, stage_nbytes: int
) -> None:
    monkeypatch.setattr(embedding_module, "STAGE_NBYTES", stage_nbytes)
    table = TABLES[name] if name in TABLES else floats(getattr(torch, name))
    unpacker, config = unpacker_for(table, torch.bfloat16), config_of()
    staged = Embedding(table, config, unpacker, chunk=64, transfers=HostTransfers())
    for ids in (IDS, IDS[:1], IDS.flip(0)):
        found = torch.empty(len(ids), WIDTH, dtype=torch.bfloat16)
        staged.put(ids, found)
        expected = embed_tokens(ids, table, config, unpacker)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    staged.close()


def late_errors(seed: int, missing: tuple[str, str] | None, interrupts: float = 0.0) -> list[str]:
    """Chunks whose work, when it runs, looks at the rows that it was given."""
    device, table = FakeDevice(seed), floats(torch.float32)
    transfers = LateTransfers(device, seed, missing)
    staged = Embedding(table, config_of(), unpacker_for(table, torch.float32), chunk=4,
                       transfers=transfers)  # fmt: skip
    stream_ND = torch.empty(12, WIDTH)
    taken = staged.host_nbytes
    for _ in range(4):
        ids = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(seed))
        transfers.interrupts = interrupts
        try:
            for first in range(0, 12, 4):
                out = stream_ND[first : first + 4]
                staged.put(ids[first : first + 4], out)
                device.launch(look(device, out, table.parts["weight"][ids[first : first + 4]]))
                seed += 1000
        except Interrupted:
            continue
        finally:
            transfers.interrupts = 0.0
    device.drain()
    assert staged.host_nbytes == taken, "nothing more is taken in steady state"
    return device.errors


def look(device: FakeDevice, found: torch.Tensor, expected: torch.Tensor) -> Any:
    def check() -> None:
        if not torch.equal(found, expected):
            device.errors.append("not the tokens' rows")

    return check


@pytest.mark.parametrize("seed", range(20))
def test_a_chunk_gets_its_own_rows_however_late_the_device_copies_them(seed: int) -> None:
    assert late_errors(seed, None) == []
    assert late_errors(seed, None, interrupts=0.1) == []


def test_without_the_wait_for_a_stage_a_chunk_gets_another_ones_rows() -> None:
    assert any(late_errors(seed, ("host", "")) for seed in range(20))


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The second multiplies its embedding by a factor."""
    if request.param == "qwen2":
        network = tiny_model("qwen2")
    else:
        from zoo import zoo_model

        network = zoo_model("gemma3_text")
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), network), network


@pytest.mark.parametrize("tokens", [1, 7, 16, 60])
@pytest.mark.parametrize("stage", [False, True])
def test_logits_are_those_with_all_rows_gathered_before_the_first_layer(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, tokens: int, stage: bool
) -> None:
    path, network = model
    if stage:
        monkeypatch.setattr(embedding_module, "STAGE_NBYTES", 1000)
    options = {"tokens": 256, "max_rows": 2, "chunking": Chunking(tokens=tokens)}

    def logits(before: bool) -> list[torch.Tensor]:
        with open_runner(path, network.config, **options) as runner:
            if before:
                gather_before(runner)
            elif stage:
                old = runner._embedding
                assert old is not None
                runner._embedding = Embedding(
                    old._table, old._config, old._unpacker, chunk=tokens, transfers=HostTransfers()
                )
            rows = [runner.kv.rows.add(100) for _ in range(2)]
            parts = [[*range(40)], [*range(30, 50)]], [[7], [8]], [[1, 2, 3], [4]]
            return [
                runner.forward([(r, i) for r, i in zip(rows, ids, strict=True) if r is not None])
                for ids in parts
            ]

    for found, expected in zip(logits(False), logits(True), strict=True):
        assert torch.equal(found, expected)


def gather_before(runner: Runner) -> None:
    def begin(sections: Any) -> torch.Tensor:
        (batch,) = (section.batch for section in sections)
        x_ND, embedding = runner.sides[0].residuals_ND[: len(batch.ids)], runner._embedding
        assert embedding is not None
        x_ND.copy_(embed_tokens(batch.ids, embedding._table, runner.config, embedding._unpacker))
        return x_ND

    runner._begin = begin  # type: ignore[method-assign]
    runner.embed = lambda *_: None  # type: ignore[method-assign, assignment]


def test_chunks_are_gathered_one_by_one_between_the_first_layers_work(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = model
    story: list[object] = []
    put = Embedding.put

    def noted(self: Embedding, ids: torch.Tensor, out: torch.Tensor) -> None:
        story.append(len(ids))
        put(self, ids, out)

    monkeypatch.setattr(Embedding, "put", noted)
    with open_runner(path, network.config, tokens=256, chunking=Chunking(tokens=16)) as runner:
        row = runner.kv.rows.add(100)
        assert row is not None
        attentions = runner.attention

        def watched(chunk: Any) -> Any:
            look = attentions(chunk)

            class Watched:
                rotates = False

                def __call__(self, layer_idx: int, *arguments: Any) -> Any:
                    story.append(f"layer {layer_idx}")
                    return look(layer_idx, *arguments)

            return Watched()

        monkeypatch.setattr(runner, "attention", watched)
        runner.forward([(row, [*range(40)])])
        assert story[:7] == [16, "layer 0", 16, "layer 0", 8, "layer 0", "layer 1"]


@pytest.mark.parametrize("chunk", [1, 100, 4096])
def test_the_plan_counts_no_less_than_the_stages_take(chunk: int) -> None:
    config = config_of()
    needs = Needs(
        kv_tokens=2048, max_batch=1, dtype=torch.bfloat16, device_type="cuda", int8=False,
        packed_nbytes=0,
    )  # fmt: skip
    width = config.hidden_size
    weight = floats(torch.float32).parts["weight"][:, :width].contiguous()
    table = Packed(format="F32", rows=VOCABULARY, width=width, parts={"weight": weight})
    unpacker, chunk_put = unpacker_for(table, torch.float32), min(chunk, 2048)
    staged = Embedding(table, config, unpacker, chunk=chunk_put, transfers=HostTransfers())
    assert 0 < staged.host_nbytes <= Footprint(config, needs).gathered(chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*TABLES, "float32", "bfloat16"])
def test_on_a_gpu_the_rows_are_bit_for_bit_those_of_the_host(name: str) -> None:
    table = TABLES[name] if name in TABLES else floats(getattr(torch, name))
    config, device = config_of(), torch.device("cuda", 0)
    unpacker = Unpacker(device, torch.bfloat16, Widest.of([(table.format, table.width, True)]))
    staged = Embedding(table, config, unpacker, chunk=4)
    memories = [stage.memory for stage in staged._stages]
    assert all(not memory.refused and memory.memory[:1].is_pinned() for memory in memories)
    for ids in (IDS, IDS.flip(0), IDS.repeat(9)):
        found = torch.empty(len(ids), WIDTH, dtype=torch.bfloat16, device=device)
        staged.put(ids, found)
        expected = embed_tokens(ids, table, config, unpacker)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    staged.close()
    assert not any(memory.memory[:1].is_pinned() for memory in memories)
