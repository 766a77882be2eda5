"""OpenAI's own client against the server."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import openai
import pytest
from scripted_served import ScriptedServed
from serving import Running, serving, wait_for

from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.guarding.keys import Keys
from layer_streamer.llm.serving.limits import Limits

KEY = "sk-0123456789"
TOOLS: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def said(text: str) -> Any:
    """The messages of a user who says so."""
    return [{"role": "user", "content": text}]


def test_an_answer_has_its_text_its_reason_and_its_usage(server: Running) -> None:
    done = server.client().chat.completions.create(model="any", messages=said("a bc d"))
    (choice,) = done.choices
    assert choice.message.content == "a bc d " and choice.finish_reason == "stop"
    assert done.model == "scripted" and done.object == "chat.completion"
    assert done.usage is not None and done.usage.prompt_tokens == 6
    assert choice.logprobs is None


def test_a_stream_is_the_same_text_with_usage_only_if_asked(server: Running) -> None:
    chat = server.client().chat.completions
    chunks = list(chat.create(model="m", messages=said("a bc d"), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "a bc d "
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.usage is None for c in chunks) and len({c.id for c in chunks}) == 1
    more = list(
        chat.create(
            model="m", messages=said("a"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert more[-1].choices == [] and more[-1].usage is not None
    assert more[-1].usage.total_tokens == 2 and all(c.usage is None for c in more[:-1])


def test_timings_come_with_the_last_chunk(server: Running) -> None:
    chunks = list(
        server.client().chat.completions.create(model="m", messages=said("a"), stream=True)
    )
    told = [(c.model_extra or {}).get("timings") for c in chunks]
    assert told[:-1] == [None] * (len(told) - 1) and told[-1]["predicted_n"] == 1


def test_several_texts_of_a_prompt_have_an_index_each(server: Running) -> None:
    chat = server.client().chat.completions
    done = chat.create(model="m", messages=said("a b"), n=3)
    assert [(c.index, c.message.content) for c in done.choices] == [(i, "a b ") for i in range(3)]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat.create(model="m", messages=said("a b"), n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(streamed.values()) == {"a b "}


def test_logprobs_are_those_of_the_tokens(server: Running) -> None:
    chat = server.client().chat.completions
    done = chat.create(model="m", messages=said("a é"), logprobs=True, top_logprobs=2)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content or []
    assert [(t.token, t.logprob, t.bytes) for t in content] == [
        ("a ", -0.5, [97, 32]), ("é ", -0.5, [195, 169, 32]),
    ]  # fmt: skip
    streamed = [
        token.token
        for chunk in chat.create(model="m", messages=said("a é"), logprobs=True, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == ["a ", "é "]


def test_plain_completions_continue_one_text_or_several(server: Running) -> None:
    plain = server.client().completions
    assert plain.create(model="m", prompt="a b").choices[0].text == "a b "
    several = plain.create(model="m", prompt=["a", "b"], n=2, logprobs=1)
    assert [(c.index, c.text) for c in several.choices] == [
        (0, "a "), (1, "a "), (2, "b "), (3, "b "),
    ]  # fmt: skip
    assert several.choices[0].logprobs is not None
    assert several.choices[0].logprobs.token_logprobs == [-0.5]
    assert several.usage is not None and several.usage.prompt_tokens == 2
    streamed = list(plain.create(model="m", prompt="a b", stream=True))
    assert "".join(c.choices[0].text for c in streamed) == "a b "
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_errors_name_the_field_and_are_not_tried_again(server: Running) -> None:
    client = server.client(max_retries=5)
    before = len(server.engine.orders)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=said("a"), temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="refused"):
        client.chat.completions.create(model="m", messages=said("REFUSE"), stream=True)
    assert len(server.engine.orders) == before + 1
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a")


def test_a_text_that_fails_is_an_error_whole_or_within_its_stream(server: Running) -> None:
    chat = server.client().chat.completions
    with pytest.raises(openai.BadRequestError, match="cannot go on"):
        chat.create(model="m", messages=said("a RAISE"))
    got = []
    with pytest.raises(openai.APIError, match="cannot go on"):
        for chunk in chat.create(model="m", messages=said("a RAISE"), stream=True):
            got.append(chunk.choices[0].delta.content)
    assert got == ["", "a "]
    assert chat.create(model="m", messages=said("b")).choices[0].message.content == "b "


def test_parse_sends_a_schema_and_reads_the_answer(server: Running) -> None:
    from pydantic import BaseModel

    class Found(BaseModel):
        name: str

    done = server.client().chat.completions.parse(
        model="m", messages=said('{"name":"x"}'), response_format=Found
    )
    assert done.choices[0].message.parsed == Found(name="x")
    schema = server.engine.orders[-1].options["schema"]
    assert schema["required"] == ["name"]


@pytest.mark.parametrize("how", [openai.omit, "float", "base64"])
def test_embeddings_come_as_they_are_asked_for(server: Running, how: Any) -> None:
    made = server.client().embeddings.create(model="m", input=["a", "b"], encoding_format=how)
    vectors = [one.embedding for one in made.data]
    if how == "base64":
        raw = [base64.b64decode(str(vector)) for vector in vectors]
        vectors = [list(struct.unpack("<2f", one)) for one in raw]
    assert vectors == [[98.0, -0.5], [99.0, -0.5]]  # a token is put before each
    assert [one.index for one in made.data] == [0, 1] and made.usage.prompt_tokens == 4
    with pytest.raises(openai.BadRequestError):
        server.client().embeddings.create(model="m", input="a" * 2000)


def test_as_many_embeddings_come_at_a_time_as_openai_gives(server: Running) -> None:
    create = server.client().embeddings.create
    texts = [chr(97 + number % 26) for number in range(2048)]
    made = create(model="m", input=texts, encoding_format="float")
    assert [one.embedding[0] - 1 for one in made.data] == [ord(text) for text in texts]
    with pytest.raises(openai.BadRequestError, match="2049 inputs") as caught:
        create(model="m", input=["a"] * 2049)
    assert caught.value.param == "input"


def test_models_are_listed(server: Running) -> None:
    (model,) = server.client().models.list().data
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "layer-streamer")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_reasoning_come_in_their_own_fields(stream: bool) -> None:
    call = '<think>hm</think>Well. <tool_call>{"name":"find","arguments":{"a":1}}</tool_call>'
    engine = ScriptedServed(template="... <think></think> <tool_call>")
    with serving(engine) as running:
        create = running.client().chat.completions.create
        given: Any = {"model": "m", "messages": said(call), "tools": TOOLS}
        if not stream:
            choice = create(**given).choices[0]
            message: Any = choice.message
            reason, (found,) = choice.finish_reason, message.tool_calls
            content, reasoning = message.content, message.reasoning_content
        else:
            deltas = [c.choices[0] for c in create(**given, stream=True)]
            reason = deltas[-1].finish_reason
            (found,) = [c for d in deltas for c in d.delta.tool_calls or []]
            content = "".join(d.delta.content or "" for d in deltas)
            extra = [(d.delta.model_extra or {}).get("reasoning_content", "") for d in deltas]
            reasoning = "".join(extra)
    assert (content, reasoning, reason) == ("Well.", "hm", "tool_calls")
    assert found.function.name == "find" and json.loads(found.function.arguments) == {"a": 1}
    assert engine.orders[0].template_options["tools"][0]["function"]["name"] == "find"


def test_a_text_that_is_constrained_is_all_answer() -> None:
    with serving(ScriptedServed(template="<think></think>")) as running:
        create = running.client().chat.completions.create
        form: Any = {"type": "json_object"}
        done = create(model="m", messages=said("<think>{}"), response_format=form)
    assert done.choices[0].message.content == "<think>{} "


def test_a_model_that_knows_no_tools_is_told_of_them_and_held_to_a_form() -> None:
    with serving(ScriptedServed()) as running:
        text = '{"tool_call":{"name":"find","arguments":{}}}'
        done = running.client().chat.completions.create(model="m", messages=said(text), tools=TOOLS)
        order = running.engine.orders[-1]
    assert done.choices[0].finish_reason == "tool_calls"
    assert '"name": "find"' in order.prompts[0][0]["content"] and "schema" in order.options
    assert "tools" not in order.template_options


def test_a_wrong_key_is_refused_and_the_right_one_taken() -> None:
    with serving(guard=Guard(Keys([KEY]))) as running:
        for key in ("wrong-key", KEY + "x"):
            with pytest.raises(openai.AuthenticationError):
                running.client(api_key=key).models.list()
        assert running.client(api_key=KEY).models.list().data[0].id == "scripted"
        running.client(api_key=KEY).chat.completions.create(model="m", messages=said("a"))
        assert running.engine.orders[0].owner and KEY not in running.engine.orders[0].owner
        assert running.get("/health")[0] == 200


def test_a_client_that_is_told_to_wait_comes_back_and_is_served() -> None:
    engine = ScriptedServed(rows=1, gate=True)
    with serving(engine, limits=Limits(max_waiting=0)) as running:
        held = running.client().chat.completions.create(
            model="m", messages=said("a b"), stream=True
        )
        with pytest.raises(openai.RateLimitError) as caught:
            running.client().chat.completions.create(model="m", messages=said("b"))
        assert int(caught.value.response.headers["retry-after"]) == 1
        held.close()
        wait_for(lambda: engine.cancelled)
        engine.passes.release(9)  # type: ignore[union-attr]
        again = running.client(max_retries=3).chat.completions.create(model="m", messages=said("b"))
        assert again.choices[0].message.content == "b "


def test_many_asynchronous_clients_get_each_its_own(server: Running) -> None:
    async def main() -> None:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def one(number: int) -> None:
                text = " ".join(f"{number}.{k}" for k in range(1 + number % 4))
                if number % 2:
                    done = await client.chat.completions.create(model="m", messages=said(text))
                    assert done.choices[0].message.content == text + " "
                    return
                stream = await client.chat.completions.create(
                    model="m", messages=said(text), stream=True
                )
                parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
                assert "".join(parts) == text + " "

            await asyncio.gather(*map(one, range(24)))

    asyncio.run(main())
