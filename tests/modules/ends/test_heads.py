"""An output head whose rows stream: the same answers, and never all of it on the device."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from tiny_models import TYPES, has, run, tiny_class, tiny_model
from torch import nn

from layer_streamer import ClosedError, ConfigError, StreamerError, stream
from layer_streamer.modules.ends import head as heads

UNTIED = ("llama", "gpt_neox", "qwen3_vl")
TIED = ("gpt2", "t5", "bart")
BIASED = ("phi", "gptj")
EXACT = 1e-6
"""A kernel may add up a chunk of rows in another order than all of them."""
IDS = torch.tensor([[9, 17, 33, 12]])


def pair(folder: Path, name: str = "llama", seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A resident model, and the same with its head streamed."""
    options = {"head": "stream", "device": "cpu", "n_gpu": 1, **options}
    with quiet():
        tiny_model(name, seed).save_pretrained(folder)
        plain = loaded(tiny_class(name), folder).eval()
        return plain, stream(folder, cls=tiny_class(name), **options)


def agree(got: Any, want: Any) -> bool:
    return torch.allclose(got, want, rtol=0, atol=EXACT)


def tokens(model: Any, **options: Any) -> torch.Tensor:
    with quiet():
        found: torch.Tensor = model.generate(
            IDS, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **options
        )
    return found


ONE_OF_EACH = ("llama", "t5", "gptj")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ONE_OF_EACH else pytest.mark.slow)
        for n in (*UNTIED, *TIED, *BIASED)
        if n in TYPES
    ],
)
def test_answers_are_those_of_the_resident_model(tmp_path: Path, name: str) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    plain, model = pair(tmp_path, name)
    want = run(name, plain)
    for _ in range(2):
        got = run(name, model)
        assert all(agree(got[key], want[key]) for key in want)
        assert torch.equal(got["tokens"], want["tokens"])
    name, report = [*model.layer_streamer.last_pass.items()][-1]
    assert model.get_output_embeddings() is model.get_submodule(name)
    assert report.num_layers >= heads.FEWEST
    model.layer_streamer.close()


def test_a_head_with_a_bias_adds_it(tmp_path: Path) -> None:
    plain, model = pair(tmp_path, "phi")
    assert plain.lm_head.bias.abs().min() > 0
    x = torch.randn(3, plain.lm_head.in_features)
    with torch.no_grad():
        assert agree(model.lm_head(x), plain.lm_head(x))
    model.layer_streamer.close()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}])
def test_generate_takes_its_options(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, model = pair(tmp_path)
    assert torch.equal(tokens(model, **options), tokens(plain, **options))
    model.layer_streamer.close()


def test_one_streamed_model_assists_another(tmp_path: Path) -> None:
    plain, model = pair(tmp_path / "a")
    _, assistant = pair(tmp_path / "b", seed=4)
    assert torch.equal(tokens(model, assistant_model=assistant), tokens(plain))
    for some in (model, assistant):
        some.layer_streamer.close()


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 2])])
def test_logits_of_some_positions_are_made_alone(tmp_path: Path, kept: Any) -> None:
    plain, model = pair(tmp_path)
    with torch.no_grad():
        got, want = (m(IDS, logits_to_keep=kept).logits for m in (model, plain))
    assert got.shape == want.shape
    assert agree(got, want)
    model.layer_streamer.close()


def test_a_head_may_be_called_before_any_pass_twice_or_not_at_all(tmp_path: Path) -> None:
    plain, model = pair(tmp_path)
    x = torch.randn(2, 5, plain.lm_head.in_features)
    with torch.no_grad():
        want, hidden, logits = plain.lm_head(x), plain.model(IDS)[0], plain(IDS).logits
        assert agree(model.lm_head(x), want)
        assert agree(model.lm_head(input=x), want)
        for _ in range(3):
            assert agree(model.model(IDS)[0], hidden)
        assert agree(model(IDS).logits, logits)
        assert agree(model.lm_head(x[0, 0]), want[0, 0])
        assert agree(model(IDS).logits, logits)
    model.layer_streamer.close()


@pytest.mark.parametrize("at", [1, 3])
def test_a_head_that_fails_midway_is_right_the_next_time(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = pair(tmp_path)
    with torch.no_grad():
        want = plain(IDS).logits
        calls = []

        def fail(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > at:
                raise torch.OutOfMemoryError("no memory")
            return nn.functional.linear(*args)

        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError) as raised:
            patched.setattr(heads, "linear", fail)
            model(IDS)
        assert any("device_budget=" in note for note in raised.value.__notes__)
        for _ in range(2):
            assert agree(model(IDS).logits, want)
    model.layer_streamer.close()


def test_a_dtype_that_is_asked_for_is_the_heads_too(tmp_path: Path) -> None:
    plain, model = pair(tmp_path, "gemma3_text", dtype=torch.bfloat16)
    plain = plain.bfloat16()
    x = torch.randn(2, plain.lm_head.in_features).bfloat16()
    with torch.no_grad():
        got, want = model.lm_head(x), plain.lm_head(x)
        ids, words = (m.get_input_embeddings()(IDS) for m in (model, plain))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert torch.equal(ids, words)
    model.layer_streamer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_what_goes_into_it_are_right(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, model = pair(tmp_path, dtype=dtype)
    plain = plain.to(dtype)
    found = []
    for one in (model, plain):
        made = torch.Generator().manual_seed(2)
        x = torch.randn(2, 3, one.lm_head.in_features, generator=made).to(dtype).requires_grad_()
        (one.lm_head(x) ** 2).sum().backward()
        found.append(x.grad)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(*found, rtol=rounding, atol=rounding)
    model.layer_streamer.close()


def test_what_it_shares_with_the_embedding_is_the_same_parameter_still(tmp_path: Path) -> None:
    plain, model = pair(tmp_path, "gpt2")
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape == plain.lm_head.weight.shape
    (name,) = model.layer_streamer.plan.tables
    assert name == "transformer.wte.weight"
    model.tie_weights()
    assert agree(run("gpt2", model)["logits"], run("gpt2", plain)["logits"])
    model.layer_streamer.close()


def test_its_weight_is_named_where_it_is_used_without_it(tmp_path: Path) -> None:
    _, model = pair(tmp_path)
    run("llama", model)
    with pytest.raises(StreamerError, match=r"lm_head\.weight is used"):
        model.lm_head.weight.sum()
    with pytest.raises(StreamerError, match="lm_head"):
        copy.deepcopy(model.lm_head)
    with pytest.raises(StreamerError, match="no state_dict"):
        model.lm_head.state_dict()
    model.layer_streamer.close()
    with pytest.raises(ClosedError, match="lm_head: its weights do not stream any more"):
        model.lm_head(torch.ones(1, model.lm_head.in_features))


def test_a_head_that_cannot_stream_is_refused_by_the_reason(tmp_path: Path) -> None:
    with quiet():
        tiny_model("modernbert").save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"head='stream': .* no plain nn\.Linear"):
            stream(tmp_path, cls=tiny_class("modernbert"), device="cpu", head="stream")
        tiny_model("gpt2").save_pretrained(tmp_path / "tied")
        with pytest.raises(ConfigError, match=r"shares 'transformer\.wte\.weight' with"):
            stream(tmp_path / "tied", device="cpu", head="stream", embeddings="device")
        with pytest.raises(ConfigError, match="head='disk': must be one of"):
            stream(tmp_path / "tied", device="cpu", head="disk")  # type: ignore[call-overload]


def test_a_head_that_torch_compiles_says_what_to_do(tmp_path: Path) -> None:
    _, model = pair(tmp_path)
    compiled = torch.compile(model.lm_head, backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="head='device'"):
        compiled(torch.ones(1, model.lm_head.in_features))
    torch._dynamo.reset()
    model.layer_streamer.close()


def test_layers_and_rows_may_take_turns_on_several_devices(tmp_path: Path) -> None:
    plain, model = pair(tmp_path, device=["cpu", "cpu", "cpu"])
    want, got = run("llama", plain), run("llama", model)
    assert agree(got["logits"], want["logits"])
    assert torch.equal(got["tokens"], want["tokens"])
    model.layer_streamer.close()


def test_a_model_that_nobody_holds_closes_its_heads_streamer_too(tmp_path: Path) -> None:
    _, model = pair(tmp_path)
    run("llama", model)
    streamers = [*model.layer_streamer._streamers.values()]
    assert len(streamers) == 2
    pipelines = [streamer._parts.pipeline for streamer in streamers]
    del model, streamers
    gc.collect()
    assert all(pipeline.control.closing for pipeline in pipelines)


def test_nothing_is_left_open_where_a_head_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {thread.ident for thread in threading.enumerate()}

    def fail(*args: Any) -> None:
        raise MemoryError("no slots")

    monkeypatch.setattr(heads.Head, "register", fail)
    with pytest.raises(MemoryError, match="no slots"):
        pair(tmp_path)
    gc.collect()
    assert {thread.ident for thread in threading.enumerate()} <= before


def test_two_calls_at_once_are_refused_and_the_next_is_right(tmp_path: Path) -> None:
    plain, model = pair(tmp_path)
    x = torch.ones(1, plain.lm_head.in_features)
    sweep = model.layer_streamer._streamers["lm_head"].sweep()
    next(sweep)
    raised = []

    def call() -> None:
        try:
            model.lm_head(x)
        except StreamerError as error:
            raised.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(raised) == 1 and raised[0].startswith("lm_head: a pass is running on thread")
    sweep.close()
    with torch.no_grad():
        assert agree(model.lm_head(x), plain.lm_head(x))
    model.layer_streamer.close()
