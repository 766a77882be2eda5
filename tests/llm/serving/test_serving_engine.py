"""A tiny model behind the server: what clients get is what the engine gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from assets import tiny_checkpoint
from byte_model import END, VOCABULARY, byte_model, byte_tokenizer
from pydantic import BaseModel
from scripted_served import working
from serving import Running, events, serving, wait_for
from small_engine import make_engine
from zoo import zoo_model

from layer_streamer.llm.serving.asking.order import Order
from layer_streamer.llm.serving.streamed import StreamedEngine
from layer_streamer.llm.serving.token_text import TokenTexts
from layer_streamer.llm.serving.working.worker import Worker

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
SAME: dict[str, Any] = {"reproducible": True, "max_length": 768, "kv_tokens": 4096}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("bytes"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Running]:
    """A server of the model; the engine is opened by its thread."""
    with serving(lambda: StreamedEngine(make_engine(model, **SAME), "bytes")) as running:
        wait_for(lambda: running.worker.status == "ready")
        yield running


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def reply(running: Running, path: str, body: dict[str, Any]) -> Any:
    status, data = running.post(path, body)
    assert status == 200, data
    return events(data) if body.get("stream") else json.loads(data)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1, "seed": 5}, {"temperature": 1, "seed": 6, "top_k": 5},
    {"temperature": 0, "frequency_penalty": 1.5}, {"temperature": 0, "logit_bias": {"65": 9}},
    {"temperature": 1, "seed": 7, "stop": ["e", "a"]}, {"temperature": 0, "max_tokens": 1},
]  # fmt: skip


def test_texts_of_clients_side_by_side_are_those_of_the_engine_alone(
    model: Path, small: Running
) -> None:
    bodies = [
        {"prompt": f"text {number} " * (1 + number % 3), "max_tokens": 8, **options}
        for number, options in enumerate(OPTIONS * 2)
    ]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda body: reply(small, PLAIN, body), bodies))
    with make_engine(model, **SAME) as engine:
        for body, got in zip(bodies, found, strict=True):
            options = {k: v for k, v in body.items() if k not in ("prompt", "max_tokens")}
            alone = engine.generate(
                body["prompt"], max_new_tokens=body["max_tokens"], return_details=True, **options
            )
            (choice,) = got["choices"]
            assert (choice["text"], choice["finish_reason"]) == (alone.text, alone.finish_reason)
            assert got["usage"]["prompt_tokens"] == alone.prompt_tokens
            assert got["usage"]["completion_tokens"] == len(alone.ids)


def test_a_stream_has_the_text_of_the_whole_reply_in_whole_characters(small: Running) -> None:
    body = said("Hello", temperature=1, seed=3, max_tokens=24)
    whole = reply(small, CHAT, body)["choices"][0]
    chunks = reply(small, CHAT, body | {"stream": True})
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"
    assert chunks[-1]["timings"]["predicted_n"] == 24


def test_a_text_without_a_limit_fills_the_room_and_no_share_is_the_likeliest(
    small: Running,
) -> None:
    long = {"prompt": "a" * 750, "max_tokens": -1, "temperature": 1, "top_p": 0}
    found = reply(small, PLAIN, long)
    assert found["usage"]["total_tokens"] == 768
    likeliest = reply(small, PLAIN, long | {"temperature": 0, "top_p": 1})
    assert found["choices"][0]["text"] == likeliest["choices"][0]["text"]


def test_n_texts_are_those_of_seeds_one_after_the_other(small: Running) -> None:
    body = {"prompt": "ab", "temperature": 1, "max_tokens": 6}
    several = reply(small, PLAIN, body | {"n": 3, "seed": 4})
    alone = [reply(small, PLAIN, body | {"seed": 4 + k}) for k in range(3)]
    assert [c["text"] for c in several["choices"]] == [a["choices"][0]["text"] for a in alone]
    assert several["usage"]["prompt_tokens"] == 2
    assert several["usage"]["completion_tokens"] == 18


def test_logprobs_name_each_token_with_its_bytes(small: Running) -> None:
    body = said("Hi", temperature=0, logprobs=True, top_logprobs=2, max_tokens=12)
    (choice,) = reply(small, CHAT, body)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
        assert len(token["top_logprobs"]) == 2
    raw = bytes(byte for token in content for byte in token["bytes"])
    assert raw.decode("utf-8", "replace") == choice["message"]["content"]
    streamed = reply(small, CHAT, body | {"stream": True})
    again = [t for c in streamed for t in (c["choices"][0]["logprobs"] or {}).get("content", [])]
    assert again == content


def test_an_end_of_text_ends_unless_it_is_to_be_ignored(tmp_path: Path) -> None:
    path = byte_model(tmp_path, eos_token_id=END, max_position_embeddings=1024)
    with serving(lambda: StreamedEngine(make_engine(path, **SAME), "bytes")) as running:
        wait_for(lambda: running.worker.status == "ready")
        body = said("Hi", logit_bias={str(END): 100}, temperature=0)
        assert reply(running, CHAT, body)["choices"][0]["finish_reason"] == "stop"
        ignored = reply(running, CHAT, body | {"ignore_eos": True})
        assert ignored["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (CHAT, said("a" * 800), "max_length"), (PLAIN, {"prompt": [300]}, "300"),
        (PLAIN, {"prompt": "a", "logit_bias": {"999": 1}}, "999"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud83d"}]}, "emoji"),
        (PLAIN, {"prompt": ["a", "b" * 800]}, "max_length"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_does_not_take_is_refused_before_a_stream_begins(
    small: Running, path: str, body: dict[str, Any], says: str, stream: bool
) -> None:
    status, data = small.post(path, body | {"stream": stream})
    assert status == 400 and says in json.loads(data)["error"]["message"]


def test_template_options_and_continued_messages_reach_the_template(small: Running) -> None:
    def tokens(body: dict[str, Any]) -> int:
        found: int = reply(small, CHAT, body)["usage"]["prompt_tokens"]
        return found

    plain = tokens(said("Hi"))
    quick = tokens(said("Hi", chat_template_kwargs={"enable_thinking": False}))
    assert quick == plain + len("<quick>")
    messages = [*said("Hi")["messages"], {"role": "assistant", "content": "Well"}]
    on = {"messages": messages, "max_tokens": 2, "continue_final_message": True}
    assert tokens(on) < tokens(on | {"continue_final_message": False})


def test_embeddings_are_the_engines_beside_texts_that_are_made(model: Path, small: Running) -> None:
    texts = [f"text {number}" for number in range(12)]
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(reply, small, CHAT, said("Hi", max_tokens=30))
        made = reply(small, "/v1/embeddings", {"input": texts})
        beside.result()
    with make_engine(model, **SAME) as engine:
        expected = list(engine.embed([engine.encode(text) for text in texts]))
    for one, vector in zip(made["data"], expected, strict=True):
        assert one["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)


def test_tokens_of_a_text_and_back(small: Running) -> None:
    status, data = small.post("/tokenize", {"content": "hé"})
    assert json.loads(data) == {"tokens": [104, 195, 169], "count": 3}
    status, data = small.post("/detokenize", {"tokens": [104, 195, 169]})
    assert json.loads(data) == {"content": "hé"}
    status, data = small.post("/detokenize", {"tokens": [258]})
    assert status == 400 and "258" in json.loads(data)["error"]["message"]
    status, data = small.post("/tokenize", said("a"))
    assert json.loads(data)["count"] > 10


def test_the_engine_says_what_it_does_and_where_the_model_lives(small: Running) -> None:
    reply(small, CHAT, said("Hi"))
    _, data = small.get("/v1/models")
    (shown,) = json.loads(data)["data"]
    assert shown["id"] == "bytes" and shown["max_model_len"] == 768
    assert sum(shown["where"].values()) > 0
    _, data = small.get("/metrics")
    assert b"layer_streamer_kv_tokens 4096.0" in data


def test_a_server_of_a_mixture_says_where_the_experts_of_a_pass_were(tmp_path: Path) -> None:
    changes = {"vocab_size": VOCABULARY, "eos_token_id": None, "max_position_embeddings": 1024}
    tiny_checkpoint(tmp_path, zoo_model("olmoe", **changes))
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"experts": "demand", "expert_slots": 1000, "max_length": 256}
    with serving(lambda: StreamedEngine(make_engine(tmp_path, **options), "bytes")) as running:
        wait_for(lambda: running.worker.status == "ready")
        reply(running, CHAT, said("Hi"))
        _, data = running.get("/metrics")
    found = dict(line.rsplit(" ", 1) for line in data.decode().splitlines() if "#" not in line)
    there = float(found['layer_streamer_experts{from="device"}'])
    brought = float(found['layer_streamer_experts{from="brought"}'])
    assert there + brought > 0 and (float(found["layer_streamer_expert_bytes"]) > 0) == (
        brought > 0
    )


class Choice(BaseModel):
    """What only has few values, so that a model without sense comes to an end."""

    colour: Literal["red", "blue"]
    sure: bool


def test_a_schema_is_kept_and_parsed(small: Running) -> None:
    done = small.client().chat.completions.parse(
        model="m", messages=said("Which?")["messages"], response_format=Choice, max_tokens=64
    )
    assert isinstance(done.choices[0].message.parsed, Choice)
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_required_tool_is_called_with_arguments_of_its_schema(
    small: Running, choice: str
) -> None:
    tool = {"name": "paint", "parameters": Choice.model_json_schema()}
    named = {"type": "function", "function": {"name": "paint"}}
    body = said(
        "Paint!", tools=[{"type": "function", "function": tool}], max_tokens=90, temperature=0,
        tool_choice=named if choice == "named" else choice, parallel_tool_calls=False,
    )  # fmt: skip
    (found,) = reply(small, CHAT, body)["choices"]
    (call,) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls" and call["function"]["name"] == "paint"
    Choice.model_validate_json(call["function"]["arguments"])


def test_a_grammar_is_kept_and_one_that_is_wrong_says_where(small: Running) -> None:
    body = said("?", grammar='root ::= "yes" | "no"', temperature=0)
    assert reply(small, CHAT, body)["choices"][0]["message"]["content"] in ("yes", "no")
    for wrong in ({"grammar": 'root ::= "yes'}, {"guided_regex": "(a"},
                  {"guided_json": {"type": "nonsense"}}):  # fmt: skip
        status, data = small.post(CHAT, said("?", stream=True, **wrong))
        assert status == 400, wrong
        assert "\n" not in json.loads(data)["error"]["message"]


def test_what_one_client_has_sent_is_no_prefix_of_anothers(model: Path) -> None:
    async def cached(worker: Worker, owner: str) -> int:
        options = {"max_new_tokens": 2, "temperature": 0.0}
        answer = await worker.answer(Order(["a" * 600], options, owner=owner))
        accounts = []
        while not answer.mailbox.ended:
            accounts += [piece.account for _, piece in await answer.mailbox.take()]
        assert accounts[-1] is not None
        return accounts[-1].cached_tokens

    async def main() -> None:
        def open_engine() -> StreamedEngine:
            return StreamedEngine(make_engine(model, **SAME), "bytes")

        async with asyncio.timeout(60), working(open_engine) as worker:
            assert [await cached(worker, owner) for owner in ("a", "a", "b", "b")] == [
                0, 512, 0, 512,
            ]  # fmt: skip

    asyncio.run(main())


def test_texts_that_are_left_free_their_rows(model: Path) -> None:
    async def main() -> None:
        engine = StreamedEngine(make_engine(model, max_batch=2, kv_tokens=512), "bytes")
        async with asyncio.timeout(60), working(lambda: engine) as worker:
            for _ in range(5):
                long = {"max_new_tokens": 50, "temperature": 0.0}
                answers = [await worker.answer(Order(["abc"], long)) for _ in range(4)]
                for answer in answers:
                    worker.leave(answer)
            last = await worker.answer(Order(["abc"], {"max_new_tokens": 3, "temperature": 0.0}))
            text = ""
            while not last.mailbox.ended:
                text += "".join(piece.text for _, piece in await last.mailbox.take())
            while worker.load.rows or worker.load.waiting:
                await asyncio.sleep(0.001)
            assert not engine._requests and not engine._tags and not engine._told
            assert not list(engine._engine._runner.kv.rows)

    asyncio.run(main())


def test_bytes_of_a_token_are_those_of_its_vocabulary() -> None:
    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(["the", " the", "\ufffd", "\ufffd"][i] for i in ids).lstrip(" ")

        def convert_ids_to_tokens(self, token: int) -> str:
            return ["the", "▁the", "<0xE2>", "Ã"][token]

    texts = TokenTexts(Pieces())
    assert [(t.text, bytes(t.bytes)) for t in (texts.scored(i, 0.0) for i in range(4))] == [
        ("the", b"the"), (" the", b" the"), ("\ufffd", b"\xe2"), ("\ufffd", b"\xc3"),
    ]  # fmt: skip
