"""The same requests to llama.cpp's own server, of the same file: what it sends is there, too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from assets import AGREED, GOLDEN, one_torch_thread, smollm2
from serving import serving, wait_for

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.serving.streamed import StreamedEngine

pytestmark = pytest.mark.slow

CHAT, PLAIN, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LEFT_OUT = {
    "models": "Ollama's list, beside OpenAI's",
    "data[].aliases": "there is one name",
    "data[].tags": "there are none",
    "data[].architecture": "text alone",
    "data[].meta": "max_model_len has what clients look for there",
    "logprobs.content[].id": "not OpenAI's; /tokenize has them",
    "top_logprobs[].id": "not OpenAI's; /tokenize has them",
    "data[].encoding_format": "who asks knows it",
    "error.code": "OpenAI's is a word, or null; the status is the reply's",
    "error.n_prompt_tokens": "the message says it",
    "error.n_ctx": "the message says it",
}
"""What it sends and this server does not, and why."""
OF_PLAIN = "choices[].logprobs.content"
"""Of plain completions, where OpenAI's has lists of tokens."""
HELLO = [{"role": "user", "content": "Say hi."}]
TOOLS = [{"type": "function", "function": {
    "name": "find", "description": "Find by number.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}}]  # fmt: skip
TOOL_TEMPLATE = r"""
{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
{{- '\n</tools>\nA call is:\n<tool_call>\n{"name": NAME, "arguments": {}}\n</tool_call>' }}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Of a model that knows tools as Hermes does."""


class Pair:
    """Two servers of one file. Thread rules: one thread."""

    def __init__(self, theirs: str, ours: str) -> None:
        self._urls = (theirs, ours)

    def ask(self, path: str, body: Any = None) -> list[tuple[int, Any]]:
        """Status and document of either, theirs first; of a stream its events."""
        return [ask(url + path, body) for url in self._urls]

    def documents(self, path: str, body: Any = None) -> tuple[Any, Any]:
        """The same of what succeeds."""
        (one, theirs), (other, ours) = self.ask(path, body)
        assert one == other == 200, (theirs, ours)
        return theirs, ours


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = Request(url, data, {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=120) as reply:
            text = reply.read().decode()
            if "event-stream" not in reply.headers["content-type"]:
                return reply.status, json.loads(text)
            *data, last = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
            assert last == "[DONE]"
            return reply.status, [json.loads(one) for one in data]
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def llama_server(path: Path, *, embedding: bool = False) -> Any:
    """Theirs, which ends with the last reference to it."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="pip install '.[test-serve]' has it")
    asked = llama_cpp.CommonParams()
    asked.model.path, asked.port = str(path), 0
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 2048, 2, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.warmup, asked.verbosity, asked.use_jinja = False, -1, True
    if embedding:
        asked.embedding = True
        asked.pooling_type = llama_cpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        asked.attention_type = llama_cpp.llama_attention_type.LLAMA_ATTENTION_TYPE_CAUSAL
    return llama_cpp.Server(asked)


@contextmanager
def pair_of(path: Path) -> Iterator[Pair]:
    def open_engine() -> StreamedEngine:
        engine = StreamingEngine(path, device="cpu", max_length=1024, kv_tokens=4096)
        return StreamedEngine(engine, "smollm2")

    theirs = llama_server(path)
    with one_torch_thread(), serving(open_engine) as running:
        wait_for(lambda: running.worker.status != "loading")
        yield Pair(theirs.listening_address, running.url)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with pair_of(smollm2()) as found:
        yield found


def shape(value: Any, at: str = "") -> dict[str, set[str]]:
    """Types of JSON at each place; all items of a list are one place."""
    kinds = {bool: "bool", int: "number", float: "number", str: "text", type(None): "null"}
    found: dict[str, set[str]] = {at: {kinds.get(type(value), type(value).__name__)}}
    items = [(f"{at}[]", one) for one in value] if isinstance(value, list) else []
    if isinstance(value, dict):
        items = [(f"{at}.{key}".lstrip("."), one) for key, one in value.items()]
    for place, item in items:
        for inner, types in shape(item, place).items():
            found.setdefault(inner, set()).update(types)
    return found


def lacking(theirs: Any, ours: Any, *left_out: str) -> list[str]:
    """Places where they send something, and we nothing of the kind."""
    known, found = shape(ours), []
    for place, types in shape(theirs).items():
        is_left_out = any(f".{part}" in f".{place}" for part in (*LEFT_OUT, *left_out))
        if not is_left_out and types - {"null"} - known.get(place, set()):
            found.append(f"{place}: {types}, not {known.get(place)}")
    return found


def text_of(reply: Any) -> str:
    """Of a whole reply's first choice, or of all its chunks."""
    if isinstance(reply, list):
        return "".join(text_of(chunk) for chunk in reply if chunk["choices"])
    choice = reply["choices"][0]
    found = choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))
    return found if isinstance(found, str) else found.get("content") or ""


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health", None), ("/v1/models", None),
        (CHAT, {"messages": HELLO, **GREEDY}),
        (CHAT, {"messages": HELLO, **GREEDY, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"messages": HELLO, **GREEDY, "n": 2}),
        (CHAT, {"messages": HELLO, **GREEDY, "stop": ["there"]}),
        (CHAT, {"messages": HELLO, **GREEDY, "stream": True}),
        (CHAT, {"messages": HELLO, **GREEDY, "stream": True, "logprobs": True, "top_logprobs": 1}),
        (CHAT, {"messages": HELLO, **GREEDY, "stream": True,
                "stream_options": {"include_usage": True}}),
        (PLAIN, {"prompt": "The sky is", **GREEDY}),
        (PLAIN, {"prompt": "The sky is", **GREEDY, "logprobs": 2}),
        (PLAIN, {"prompt": ["a", "b"], **GREEDY}), (PLAIN, {"prompt": [1, 2, 3], **GREEDY}),
        # Theirs sends usage at the end of any such stream, OpenAI's if it is asked to.
        (PLAIN, {"prompt": "The sky is", **GREEDY, "stream": True,
                 "stream_options": {"include_usage": True}}),
    ],
)  # fmt: skip
def test_all_that_llama_cpp_sends_is_there_of_the_same_type(
    pair: Pair, path: str, body: Any
) -> None:
    theirs, ours = pair.documents(path, body)
    assert lacking(theirs, ours, *([OF_PLAIN] if path == PLAIN else [])) == []


def test_logprobs_of_plain_completions_are_openais_lists(pair: Pair) -> None:
    theirs, ours = pair.documents(PLAIN, {"prompt": "The sky is", **GREEDY, "logprobs": 2})
    told = theirs["choices"][0]["logprobs"]["content"]
    found = ours["choices"][0]["logprobs"]
    assert found["tokens"][0] == told[0]["token"]
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(found["tokens"])
    assert found["token_logprobs"][0] == pytest.approx(told[0]["logprob"], abs=0.3)


@pytest.mark.parametrize("key", AGREED)
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_texts_on_which_engines_agree_are_theirs(pair: Pair, key: str, stream: bool) -> None:
    kind, _, text = key.partition(":")
    prompt = {"prompt": text} if kind == "raw" else {"messages": said(text)}
    count = len(GOLDEN[key]["new_ids"])
    body = {**prompt, "max_tokens": count, "temperature": 0, "stream": stream}
    theirs, ours = pair.documents(PLAIN if kind == "raw" else CHAT, body)
    assert text_of(ours) == text_of(theirs) != ""
    if not stream:
        assert [theirs["choices"][0]["finish_reason"]] == [ours["choices"][0]["finish_reason"]]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert ours["usage"][name] == theirs["usage"][name]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "text",
    ["Hello wörld", "<|im_start|>user\nhi<|im_end|>", "  two  spaces\n\n\ttab", "😀 日本語 é",
     "", "a" * 300, "1234567 3.14", "\r\n\x00\ufffd", "don't we'LL"],
)  # fmt: skip
def test_ids_of_a_text_are_theirs_and_so_is_the_text_of_ids(pair: Pair, text: str) -> None:
    for special in (False, True):
        theirs, ours = pair.documents("/tokenize", {"content": text, "add_special": special})
        assert ours["tokens"] == theirs["tokens"] and lacking(theirs, ours) == []
    theirs, ours = pair.documents("/detokenize", {"tokens": theirs["tokens"]})
    assert theirs == ours == {"content": text}


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be short."}]])
def test_ids_of_messages_are_theirs(pair: Pair, first: list[Any]) -> None:
    messages = [*first, *HELLO, {"role": "assistant", "content": "Hi."}, *said("And?")]
    (status, told), _ = pair.ask("/apply-template", {"messages": messages})
    assert status == 200
    (_, theirs), _ = pair.ask("/tokenize", {"content": told["prompt"]})
    _, (_, ours) = pair.ask("/tokenize", {"messages": messages})
    assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, b"{nonsense", 400), (CHAT, b"", 400), (CHAT, {}, 400),
        (CHAT, {"messages": "x"}, 400), (CHAT, {"messages": HELLO, "max_tokens": "x"}, 400),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400),
        (CHAT, {"messages": HELLO, "stream": "x"}, 400),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400),
        (CHAT, {"messages": HELLO, "response_format": {"type": "nonsense"}}, 400),
        (CHAT, {"messages": HELLO, "grammar": "root ::= nonsense"}, 400),
        (PLAIN, {}, 400), (PLAIN, {"prompt": "a " * 5000}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400), ("/nowhere", {}, 404),
    ],
)  # fmt: skip
def test_what_is_wrong_has_the_same_status_and_shape(
    pair: Pair, path: str, body: Any, status: int
) -> None:
    (one, theirs), (other, ours) = pair.ask(path, body)
    assert one == other == status
    assert lacking(theirs, ours) == [] and ours["error"]["message"]
    # A context that is exceeded has a code in OpenAI's API, and a type in theirs.
    if theirs["error"]["type"] == "exceed_context_size_error":
        assert ours["error"]["code"] == "context_length_exceeded"
    else:
        assert ours["error"]["type"] == theirs["error"]["type"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": []}), (CHAT, {"messages": [{"role": "user", "content": None}]}),
        (CHAT, {"messages": [{"content": "x"}]}), (CHAT, {"messages": HELLO, "temperature": -1}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/detokenize", {"tokens": [99999]}), ("/tokenize", {}),
        ("/tokenize", {"content": "a", "with_pieces": True}),
    ],
)  # fmt: skip
def test_what_they_take_or_fail_at_is_refused_by_name(pair: Pair, path: str, body: Any) -> None:
    (theirs, _), (status, ours) = pair.ask(path, {"max_tokens": 1, **body})
    assert theirs in (200, 400, 500) and status == 400
    names = ("messages", "temperature", "99999", "content", "with_pieces")
    assert any(name in ours["error"]["message"] for name in names)


@pytest.mark.parametrize(
    "more",
    [{"max_tokens": -1, "stop": ["!"]}, {"top_p": 0, "seed": 5, "temperature": 1},
     {"grammar": 'root ::= "yes" | "no"'}, {"seed": -1}, {"logit_bias": {"17": -100}}],
)  # fmt: skip
def test_options_that_llama_cpp_takes_do_the_same(pair: Pair, more: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, **more}
    theirs, ours = pair.documents(CHAT, body)
    assert text_of(ours) == text_of(theirs) != ""


def test_calls_of_tools_have_the_same_shape_and_arguments(tmp_path: Path) -> None:
    path = tmp_path / "smollm2.gguf"
    edit = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata"]
    subprocess.run([*edit, "--chat-template", TOOL_TEMPLATE, str(smollm2()), str(path)], check=True)
    messages: list[dict[str, Any]] = []
    for number in (5, 3, 9, 7):
        function = {"name": "find", "arguments": json.dumps({"n": number})}
        call = {"id": f"call-{number}", "type": "function", "function": function}
        messages += said(f"Find {number}.")
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
    body = {"messages": messages[:-1], "tools": TOOLS, "temperature": 0, "max_tokens": 60}
    with pair_of(path) as pair:
        theirs, ours = pair.documents(CHAT, body)
        chunks = pair.documents(CHAT, body | {"stream": True})
    assert ours["choices"][0]["message"]["content"] is None  # as OpenAI has it; theirs is empty
    theirs["choices"][0]["message"]["content"] = None
    assert lacking(theirs, ours) == [] and lacking(*chunks) == []
    for found in (theirs, ours):
        (choice,) = found["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "find"
        assert json.loads(call["function"]["arguments"]) == {"n": 7}
    for stream in chunks:
        deltas = [c["choices"][0]["delta"] for c in stream if c["choices"]]
        parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
        assert "".join(part["function"].get("name", "") for part in parts) == "find"
        joined = "".join(part["function"].get("arguments", "") for part in parts)
        assert json.loads(joined) == {"n": 7} and {part["index"] for part in parts} == {0}


def test_vectors_point_where_theirs_do(pair: Pair) -> None:
    server = llama_server(smollm2(), embedding=True)
    with_vectors = Pair(server.listening_address, pair._urls[1])
    for text in ("The sky is blue.", "Hello"):  # of several at a time theirs depend on each other
        for form in ({}, {"encoding_format": "float"}):
            theirs, ours = with_vectors.documents(EMBED, {"input": text, **form})
            assert lacking(theirs, ours) == [] and ours["usage"] == theirs["usage"]
            one, other = theirs["data"][0]["embedding"], ours["data"][0]["embedding"]
            assert np.dot(one, other) > 0.999
    body = {"input": ["a", "b"], "encoding_format": "base64"}
    theirs, ours = with_vectors.documents(EMBED, body)
    assert lacking(theirs, ours) == [] and [one["index"] for one in ours["data"]] == [0, 1]
    for wrong in ({"input": ""}, {}):
        (one, theirs), (other, ours) = with_vectors.ask(EMBED, wrong)
        assert one == other == 400 and lacking(theirs, ours) == []
