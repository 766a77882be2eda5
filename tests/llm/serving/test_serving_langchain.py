"""LangChain's client of OpenAI's API against the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from byte_model import byte_model
from pydantic import BaseModel
from scripted_served import ScriptedServed
from serving import Running, serving, wait_for
from small_engine import make_engine

from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.guarding.keys import Keys
from layer_streamer.llm.serving.streamed import StreamedEngine

pytestmark = pytest.mark.slow

CALL = '{"tool_call":{"name":"find","arguments":{"number":7}}}'
SAME: dict[str, Any] = {"reproducible": True, "max_length": 768, "kv_tokens": 4096}


class Choice(BaseModel):
    """What only has few values, so that a model without sense comes to an end."""

    colour: Literal["red", "blue"]
    sure: bool


def find(number: int) -> str:
    """What has the number."""
    return f"what has {number}"


@pytest.fixture(autouse=True)
def nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the makers of LangChain."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model of bytes, without sense."""
    path = byte_model(tmp_path_factory.mktemp("bytes"), max_position_embeddings=1024)
    with serving(lambda: StreamedEngine(make_engine(path, **SAME), "bytes")) as running:
        wait_for(lambda: running.worker.status == "ready")
        yield running


def langchain() -> Any:
    """Its package, which takes a while to import."""
    return pytest.importorskip("langchain_openai", reason="pip install '.[test-serve]' has it")


def of(running: Running, **options: Any) -> dict[str, Any]:
    """What says where a client is to ask."""
    url = f"{running.url}/v1"
    return {"base_url": url, "api_key": "none", "model": "m", "max_retries": 0, **options}


def chat(running: Running, **options: Any) -> Any:
    return langchain().ChatOpenAI(**of(running, temperature=0, max_tokens=200, **options))


def test_an_answer_and_a_stream_of_langchain_are_the_models_own_text(small: Running) -> None:
    messages = [("system", "Be short."), ("human", [{"type": "text", "text": "Hello"}])]
    told = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    body = {"messages": told, "temperature": 0, "max_tokens": 200}
    plain = small.client().chat.completions.create(model="m", **body)  # type: ignore[call-overload]
    whole = chat(small).invoke(messages)
    assert whole.content == plain.choices[0].message.content != ""
    assert whole.usage_metadata["input_tokens"] == plain.usage.prompt_tokens
    assert whole.usage_metadata["output_tokens"] == plain.usage.completion_tokens == 200
    assert whole.response_metadata["finish_reason"] == "length"
    parts = list(chat(small, stream_usage=True).stream(messages))
    assert "".join(part.content for part in parts) == whole.content
    joined = parts[0]
    for part in parts[1:]:
        joined += part
    assert joined.usage_metadata["output_tokens"] == 200
    assert joined.response_metadata["finish_reason"] == "length"


def test_asynchronous_and_batched_calls_get_each_its_own() -> None:
    texts = [f"{number} is it" for number in range(12)]

    async def main(client: Any) -> None:
        several = await client.abatch(texts)
        assert [one.content for one in several] == [f"{text} " for text in texts]
        parts = [part.content async for part in client.astream("a bc d")]
        assert "".join(parts) == "a bc d " and len(parts) >= 3
        await client.root_async_client.close()

    with serving() as running:
        assert [m.content for m in chat(running).batch(texts)] == [f"{text} " for text in texts]
        asyncio.run(main(chat(running)))


def test_a_stream_of_langchain_that_is_left_frees_its_row() -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running:
        stream = chat(running).stream("a b c d")
        assert engine.passes is not None
        engine.passes.release()
        assert next(part.content for part in stream if part.content) == "a "
        stream.close()
        wait_for(lambda: engine.cancelled and not running.worker.load.rows)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_what_they_say_goes_back(stream: bool) -> None:
    with serving() as running:
        client = chat(running).bind_tools([find], strict=True, parallel_tool_calls=False)
        if stream:
            parts = list(client.stream(CALL))
            message = parts[0]
            for part in parts[1:]:
                message += part
        else:
            message = client.invoke(CALL)
        (call,) = message.tool_calls
        assert (call["name"], call["args"], message.content) == ("find", {"number": 7}, "")
        assert not message.invalid_tool_calls
        result = {"role": "tool", "content": find(7), "tool_call_id": call["id"]}
        last = client.invoke([("human", "Find 7."), message, result, ("human", '{"response":"."}')])
        assert last.content == "."
        told = running.engine.orders[-1].prompts[0]
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "tool", "user"]
    assert told[2]["tool_calls"][0]["function"]["arguments"] == {"number": 7}
    assert told[3] == {"role": "tool", "content": find(7), "tool_call_id": call["id"]}


@pytest.mark.parametrize("choice", ["any", "Choice", True])
def test_a_tool_that_must_be_called_is_called_with_what_it_takes(
    small: Running, choice: Any
) -> None:
    client = chat(small).bind_tools([Choice], tool_choice=choice, parallel_tool_calls=False)
    (call,) = client.invoke("Paint!").tool_calls
    Choice.model_validate(call["args"])


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of its own callbacks
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_what_its_class_takes(small: Running, method: str) -> None:
    client = chat(small).with_structured_output(Choice, method=method)
    assert isinstance(client.invoke("Which?"), Choice)
    *_, last = client.stream("Which?")
    assert isinstance(last, Choice)


def test_json_mode_holds_a_text_to_an_object() -> None:
    with serving() as running:
        client = chat(running).with_structured_output(Choice, method="json_mode")
        assert client.invoke('{"colour":"red","sure":true}') == Choice(colour="red", sure=True)
        assert running.engine.orders[-1].options["schema"] == {"type": "object"}


def test_logprobs_stop_and_options_of_others_reach_the_engine() -> None:
    with serving() as running:
        client = chat(running, logprobs=True, top_logprobs=2, extra_body={"top_k": 5})
        found = client.invoke("a b", stop=["q"]).response_metadata["logprobs"]["content"]
        assert [token["token"] for token in found] == ["a ", "b "]
        options = running.engine.orders[-1].options
        assert (options["stop"], options["top_k"], options["max_new_tokens"]) == (["q"], 5, 200)


def test_plain_completions_of_langchain_continue_texts() -> None:
    with serving() as running:
        client = langchain().OpenAI(**of(running))
        assert client.invoke("a b") == "a b " and client.batch(["c", "d e"]) == ["c ", "d e "]
        assert "".join(client.stream("a b c")) == "a b c "


def test_errors_keep_their_kind_and_their_field() -> None:
    with serving(guard=Guard(Keys(["sk-0123456789"]))) as running:
        with pytest.raises(openai.AuthenticationError):
            chat(running).invoke("a")
        known = chat(running, api_key="sk-0123456789")
        image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\].type"):
            known.invoke([("human", image)])


@pytest.mark.parametrize("ids", [False, True])
def test_vectors_of_langchain_are_the_models_from_texts_or_from_ids(
    small: Running, ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    own = tiktoken.Encoding(  # the model's own: else the client sends ids of another vocabulary
        "bytes", pat_str="(?s).", mergeable_ranks={bytes([n]): n for n in range(256)},
        special_tokens={},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: own)
    texts = [f"text é {number}" for number in range(100)]
    client = langchain().OpenAIEmbeddings(**of(small, check_embedding_ctx_length=ids))
    found = client.embed_documents(texts)
    plain = small.client().embeddings.create(model="m", input=texts, encoding_format="float")
    expected = [one.embedding for one in plain.data]
    assert np.allclose(found, expected, atol=1e-6) and len(found) == 100
    assert np.allclose(client.embed_query(texts[3]), expected[3], atol=1e-6)


def test_vectors_can_be_awaited(small: Running) -> None:
    async def main(client: Any) -> None:
        several, one = await asyncio.gather(
            client.aembed_documents(["a", "bc"]), client.aembed_query("a")
        )
        assert np.allclose(several[0], one, atol=1e-6) and len(several) == 2
        assert not np.allclose(several[1], one, atol=1e-3)
        await client.async_client._client.close()

    asyncio.run(main(langchain().OpenAIEmbeddings(**of(small, check_embedding_ctx_length=False))))
