"""StreamingEngine: prompts of every kind, batches, streams of text, options, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import START, TOKENIZER_FILES, VOCABULARY, byte_model
from fetch_model import fetch
from safetensors.torch import load_file, save_file
from test_llm_gemma3 import NEW_IDS

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.metadata import load_tokenizer
from layer_streamer.llm.opening import Model
from layer_streamer.llm.text.completion import Completion

TEXTS = ["The sky is", "One, two,", "Hello", "To be or not to be, that is the"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


def make_engine(path: Path, **options: Any) -> StreamingEngine:
    return StreamingEngine(path, **({"device": "cpu", "max_length": 128} | options))


@pytest.fixture(scope="module")
def engine(path: Path) -> Any:
    with make_engine(path, kv_tokens=1024) as engine:
        yield engine


def test_one_prompt_gives_its_text_and_a_list_a_list(engine: StreamingEngine) -> None:
    text = engine.generate(TEXTS[0], max_new_tokens=6)
    assert isinstance(text, str) and text
    assert engine.generate([TEXTS[0]], max_new_tokens=6) == [text]
    assert engine.generate([], max_new_tokens=6) == []
    ids = engine.tokenizer(TEXTS[0])["input_ids"]
    assert engine.generate(ids, max_new_tokens=6) == text


def test_a_batch_gives_each_row_what_it_gets_alone(engine: StreamingEngine) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 50}
    together = engine.generate(TEXTS, seed=5, **options)
    alone = [engine.generate(t, seed=5 + i, **options) for i, t in enumerate(TEXTS)]
    assert together == alone
    assert engine.generate(TEXTS, seed=6, **options) != together


def test_many_prompts_run_in_the_memory_of_a_few(path: Path) -> None:
    prompts = [[7 + i % 90] * (1 + i % 23) for i in range(40)]
    with make_engine(path, max_length=64, kv_tokens=512, max_batch=3) as small:
        found = small.generate(prompts, max_new_tokens=5, return_details=True)
        assert len(list(small._runner.kv.rows)) == 0
    with make_engine(path, max_length=64) as single:
        expected = [single.generate(p, max_new_tokens=5, return_details=True) for p in prompts]
    assert [done.ids for done in found] == [done.ids for done in expected]
    assert [done.index for done in found] == list(range(40))


def test_details_say_what_was_done(engine: StreamingEngine) -> None:
    done = engine.generate([3, 4, 5], max_new_tokens=4, return_details=True)
    assert isinstance(done, Completion)
    assert (done.prompt_tokens, len(done.ids), done.finish_reason) == (3, 4, "length")
    assert done.text == engine.generate([3, 4, 5], max_new_tokens=4)
    assert done.prompt_seconds > 0 and done.decode_seconds > 0


def test_a_stream_of_text_is_the_text_in_whole_characters(engine: StreamingEngine) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.5, "seed": 3}
    pieces = list(engine.generate(TEXTS[0], stream=True, **options))
    assert "".join(pieces) == engine.generate(TEXTS[0], **options)
    assert all(pieces) and len(pieces) > 5
    rows = ["" for _ in TEXTS]
    for row, piece in engine.generate(TEXTS, stream=True, **options):
        rows[row] += piece
    assert rows == engine.generate(TEXTS, **options)


def test_a_stop_string_ends_the_text_before_it(engine: StreamingEngine) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.5, "seed": 3}
    whole = engine.generate(TEXTS[0], **options)
    stop = whole[len(whole) // 2 :][:3]
    done = engine.generate(TEXTS[0], stop=stop, return_details=True, **options)
    assert done.text == whole[: whole.index(stop)] and done.finish_reason == "stop"
    assert len(done.ids) < 30
    pieces = engine.generate(TEXTS[0], stop=["never this", stop], stream=True, **options)
    assert "".join(pieces) == done.text


def test_an_end_of_sequence_of_any_source_ends_the_text(path: Path, tmp_path: Path) -> None:
    with make_engine(path) as engine:
        ids = engine.generate([9, 10, 11], max_new_tokens=12, return_details=True).ids
    stop = ids[5]
    assert stop not in ids[:5]
    shutil.copytree(path, tmp_path / "model")
    for name in ("generation_config.json", "config.json"):
        file = path / name
        changed = json.loads(file.read_text()) | {"eos_token_id": [stop, 5]}
        (tmp_path / "model" / name).write_text(json.dumps(changed))
        with make_engine(tmp_path / "model") as engine:
            done = engine.generate([9, 10, 11], max_new_tokens=12, return_details=True)
            assert done.ids == ids[:6] and done.finish_reason == "stop"
        shutil.copy(file, tmp_path / "model" / name)


def test_messages_go_through_the_template_and_its_options(engine: StreamingEngine) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = engine.encode(messages)
    assert ids.count(START) == 2, "each special token once"
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert engine.tokenizer.decode(ids) == rendered
    quick = engine.encode(messages, {"enable_thinking": False})
    assert engine.tokenizer.decode(quick) == rendered + "<quick>"
    template = engine.tokenizer.chat_template
    try:
        engine.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
        with pytest.raises(ValueError, match="no system here"):
            engine.generate(messages)
    finally:
        engine.tokenizer.chat_template = template


def test_without_a_template_messages_are_text_and_that_is_said_once(
    path: Path, tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    notes: list[str] = []
    with make_engine(tmp_path / "model", notify=notes.append) as engine:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        assert engine.encode(messages) == engine.encode("Be kind.\nHi")
        engine.encode(messages)
    assert len([note for note in notes if "no chat template" in note]) == 1


def test_sampling_defaults_are_those_of_the_model(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 1.7}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    with make_engine(path) as plain, make_engine(tmp_path / "model") as hot:
        drawn = plain.generate(TEXTS[0], seed=1, temperature=1.7, max_new_tokens=8)
        assert hot.generate(TEXTS[0], seed=1, max_new_tokens=8) == drawn
        greedy = plain.generate(TEXTS[0], max_new_tokens=8)
        assert hot.generate(TEXTS[0], temperature=0, max_new_tokens=8) == greedy != drawn


def test_what_prompts_have_in_common_is_kept_and_gives_the_same_text(path: Path) -> None:
    first, second = [5, 6, 7, 8] * 5, [5, 6, 7, 8] * 4 + [30, 31]
    with make_engine(path) as plain:
        expected = [plain.generate(ids, max_new_tokens=6) for ids in (first, second, first)]
    with make_engine(path) as engine:
        lengths: list[int] = []
        forward = engine._runner.forward

        def spy(entries: Any, **options: Any) -> torch.Tensor:
            lengths.append(sum(len(ids) for _, ids in entries))
            return forward(entries, **options)

        engine._runner.forward = spy  # type: ignore[method-assign]
        found = [
            engine.generate(ids, max_new_tokens=6, reuse_prefix=True)
            for ids in (first, second, first)
        ]
        assert found == expected
        assert [lengths[0], lengths[6], lengths[12]] == [20, 2, 4]
        engine.generate(TEXTS, max_new_tokens=2)
        assert engine.scheduler.places.kept.row is None


def test_a_stream_that_is_left_early_frees_its_rows(engine: StreamingEngine) -> None:
    stream = engine.generate(TEXTS, stream=True, max_new_tokens=50)
    next(stream)
    stream.close()
    assert len(list(engine._runner.kv.rows)) == 0
    abandoned = engine.generate(TEXTS[0], stream=True, max_new_tokens=50)
    next(abandoned)
    del abandoned
    assert len(list(engine._runner.kv.rows)) == 0


def test_an_interrupted_answer_leaves_an_engine_that_goes_on(path: Path) -> None:
    with make_engine(path) as engine:
        expected = engine.generate([9] * 20, max_new_tokens=6, reuse_prefix=True)

        def interrupt(layer_idx: int) -> None:
            if layer_idx == 1:
                raise KeyboardInterrupt

        for ids in ([9] * 20, [4, 5], [9] * 20):
            with pytest.raises(KeyboardInterrupt):
                list(engine.events([ids], reuse_prefix=True, on_layer=interrupt))
            assert engine.generate([9] * 20, max_new_tokens=6, reuse_prefix=True) == expected
        assert engine.generate([9] * 20, max_new_tokens=6) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [1] * 128}, "the prompt has 128 tokens, max_length=128"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [VOCABULARY]}, "token id 258: must be from 0 to 257"),
        ({"prompt": 5}, "prompt of type int"),
        ({"prompt": [{"content": "x"}]}, "must have a role and a content"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temprature": 1}, "unknown sampling option 'temprature'"),
        ({"top_p": 2}, "top_p=2"),
        ({"stop": [""]}, "stop="),
        ({"stream": True, "return_details": True}, "return_details=True"),
        ({"prompt": ["a"], "reuse_prefix": True}, "reuse_prefix=True"),
    ],
)
def test_a_bad_prompt_or_option_is_one_line(
    engine: StreamingEngine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        engine.generate(**({"prompt": "Hi"} | options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 300}, "max_length=300: the model's context is 256"),
        ({"max_length": 0}, "max_length=0"),
        ({"kv_tokens": 100}, "kv_tokens=100: must be at least max_length=128"),
        ({"kv": "disk"}, "kv='disk': must be one of auto, device, host"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"device": "warp"}, "device='warp'"),
        ({"device": ["cpu", "cpu"]}, "device=cpu,cpu: a device is named twice"),
        ({"device": ["cpu", "cuda:0"]}, "must be devices of one kind"),
        ({"tail": ["x"]}, "tail: is the engine's own"),
        ({"device_budget": "lots"}, "device_budget='lots'"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(
    path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make_engine(path, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_takes_and_gives_ids_only(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "model")
    for name in TOKENIZER_FILES:
        (tmp_path / "model" / name).unlink()
    with make_engine(path) as whole, make_engine(tmp_path / "model") as bare:
        expected = whole.generate([1, 2, 3], max_new_tokens=4, return_details=True)
        found = bare.generate([1, 2, 3], max_new_tokens=4, return_details=True)
        assert (found.ids, found.text) == (expected.ids, "")
        for options in ({"prompt": "Hi"}, {"prompt": [1, 2]}):
            with pytest.raises(UnsupportedModelError, match="no tokenizer"):
                bare.generate(**options)


def test_a_layer_that_cannot_be_read_ends_the_generation_and_not_the_engine(
    path: Path, tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    with make_engine(tmp_path / "model") as engine:
        engine.generate("Hi", max_new_tokens=2)
        save_file(load_file(file), file)
        with pytest.raises(Exception, match="changed"):
            engine.generate("Hi", max_new_tokens=2)
        assert len(list(engine._runner.kv.rows)) == 0


def test_the_model_may_be_read_before_the_engine_is_opened(path: Path) -> None:
    model = Model.read(path, print)
    assert model.tokenizer("Hi") == load_tokenizer(path)("Hi")
    with make_engine(path) as one, StreamingEngine(model, device="cpu", max_length=128) as other:
        assert one.generate("Hi", max_new_tokens=4) == other.generate("Hi", max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["device", "host"])
def test_gemma_3_270m_gives_the_ids_of_transformers_through_its_windows(kv: str) -> None:
    with StreamingEngine(
        fetch("gemma3-270m"), device="cpu", max_length=256, kv=kv, prefill_chunk=4
    ) as engine:
        done = engine.generate(
            "The capital of France is", max_new_tokens=len(NEW_IDS), return_details=True
        )
    assert list(done.ids) == NEW_IDS
