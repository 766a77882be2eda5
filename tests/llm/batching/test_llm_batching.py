"""A file of requests to a file of results: each line once, whatever is in it and in between."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import make_engine

from layer_streamer import ReadError
from layer_streamer.llm.batching import job, lines
from layer_streamer.llm.batching.asked import CHAT, COMPLETION, Manner
from layer_streamer.llm.batching.job import BatchJob, Counts
from layer_streamer.llm.batching.lines import Shard
from layer_streamer.llm.batching.results import Results
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text.sampling import Sampler

SAMPLED = {"temperature": 1.0, "top_k": 20}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamingEngine]:
    path = byte_model(tmp_path_factory.mktemp("tiny"))
    with make_engine(path, max_length=96, kv_tokens=1024, max_batch=4) as engine:
        yield engine


def chat(custom_id: str, text: str = "Hi", **options: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | options
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def plain(custom_id: str, prompt: Any = "Hi", **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4} | options
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETION, "body": body}


def write(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in found))
    return path


def answer(
    engine: StreamingEngine,
    source: Path,
    output: Path,
    hear: Callable[[Counts], object] = lambda counts: None,
    **manner: Any,
) -> list[dict[str, Any]]:
    """All that is then in the output."""
    with closing(Results(output)) as results:
        BatchJob(engine, source, results, Manner(**manner), hear).run()
    return read(output)


def read(output: Path) -> list[dict[str, Any]]:
    data = output.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def texts(record: dict[str, Any]) -> list[str]:
    assert record["response"]["status_code"] == 200, record
    choices = record["response"]["body"]["choices"]
    return [one["text"] if "text" in one else one["message"]["content"] for one in choices]


def error(record: dict[str, Any]) -> dict[str, Any]:
    assert 400 <= record["response"]["status_code"] <= 500 and record["error"] is None
    found: dict[str, Any] = record["response"]["body"]["error"]
    assert {*found} == {"message", "type", "param", "code"} and "\n" not in found["message"]
    return found


def by_line(found: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    assert max(Counter(one["line"] for one in found).values(), default=1) == 1
    return {one["line"]: one for one in found}


def rows_of(engine: StreamingEngine) -> int:
    return len(list(engine._runner.kv.rows))


def test_texts_are_those_that_the_engine_gives_for_the_same_options(
    engine: StreamingEngine, tmp_path: Path
) -> None:
    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_tokens": 9}, {"max_new_tokens": 9}),
        ({"seed": 5, **SAMPLED}, {"seed": 5, **SAMPLED}),
        ({"seed": 1, "n": 3, **SAMPLED}, {"seed": 1, "n": 3, **SAMPLED}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100}}),
        ({"logit_bias": {"65": 100}, "stop": "AAA"}, {"logit_bias": {65: 100}, "stop": "AAA"}),
        ({"presence_penalty": 2, "max_tokens": 20}, {"presence_penalty": 2, "max_new_tokens": 20}),
        ({"top_p": 0.3, "seed": 2, **SAMPLED}, {"top_p": 0.3, "seed": 2, **SAMPLED}),
    ]  # fmt: skip
    found, expected = list[Any](), list[Any]()
    for number, (theirs, ours) in enumerate(options):
        given_options = {"max_new_tokens": 4} | ours
        found += [chat(f"c{number}", **theirs), plain(f"p{number}", **theirs)]
        expected += [engine.generate(HI, **given_options), engine.generate("Hi", **given_options)]
    found += [plain("several", ["One", "Two"]), plain("ids", [72, 105])]
    expected += [engine.generate(["One", "Two"], max_new_tokens=4)]
    expected += [engine.generate([72, 105], max_new_tokens=4)]
    results = by_line(answer(engine, write(tmp_path / "in", found), tmp_path / "out"))
    assert [results[number]["custom_id"] for number in sorted(results)] == [
        one["custom_id"] for one in found
    ]
    for number, text in enumerate(expected, 1):
        assert texts(results[number]) == (text if isinstance(text, list) else [text])


def test_a_file_of_prompts_is_answered_as_generate_answers_it(
    engine: StreamingEngine, tmp_path: Path
) -> None:
    found = ["Hi", {"prompt": "Hi"}, {"messages": HI}, {"prompt": HI}, {"prompt": [72, 105]},
             {"messages": HI, "max_tokens": 2, "custom_id": "mine"}]  # fmt: skip
    source = write(tmp_path / "in", found)
    options = {"max_new_tokens": 5, "seed": 7, **SAMPLED}
    results = by_line(answer(engine, source, tmp_path / "out", options=options))
    for number, prompt in enumerate([HI, HI, HI, HI, [72, 105]], 1):
        expected = engine.generate(prompt, **options | {"seed": 7 + number - 1})
        assert texts(results[number]) == [expected]
    assert results[6]["custom_id"] == "mine" and results[1]["custom_id"] is None
    assert results[6]["response"]["body"]["usage"]["completion_tokens"] == 2
    raw = by_line(answer(engine, source, tmp_path / "raw", raw=True, options={"max_new_tokens": 5}))
    for number in (1, 2):
        assert texts(raw[number]) == [engine.generate("Hi", max_new_tokens=5)]


def test_a_result_has_the_shape_of_openais(engine: StreamingEngine, tmp_path: Path) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    source = write(tmp_path / "in", [chat("a", logprobs=True, top_logprobs=2), plain("b")])
    results = by_line(answer(engine, source, tmp_path / "out", model="tiny"))
    for number, kind in ((1, ChatCompletion), (2, Completion)):
        record = results[number]
        assert {*record} == {"id", "custom_id", "line", "response", "error"}
        assert {*record["response"]} == {"status_code", "request_id", "body"}
        body: Any = kind.model_validate(record["response"]["body"])
        assert (body.model, body.usage.completion_tokens) == ("tiny", 4)
    scored = results[1]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert len(scored) == 4 and all(len(one["top_logprobs"]) == 2 for one in scored)


def test_a_line_may_say_what_its_text_is_like(engine: StreamingEngine, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    kind = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    bad = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "thing"}}}
    wanted = [chat("a", response_format=kind, max_tokens=30), chat("b", response_format=bad)]
    results = by_line(answer(engine, write(tmp_path / "in", wanted), tmp_path / "out"))
    assert json.loads(texts(results[1])[0])["a"] in ("b", "c")
    assert error(results[2])["type"] == "invalid_request_error"


def test_a_model_is_told_of_the_tools_of_a_line(engine: StreamingEngine, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    wanted = [chat("a", tools=tools), chat("b")]
    results = by_line(answer(engine, write(tmp_path / "in", wanted), tmp_path / "out"))
    assert "the prompt has" in error(results[1])["message"], "it is longer than there is room for"
    assert texts(results[2])


def test_a_line_has_its_own_seed_whatever_the_others_have(
    engine: StreamingEngine, tmp_path: Path
) -> None:
    wanted = [chat(f"{i}", seed=5, **SAMPLED) for i in range(3)]
    source, options = write(tmp_path / "in", wanted), {"seed": 9}
    results = by_line(answer(engine, source, tmp_path / "out", options=options))
    expected = engine.generate(HI, max_new_tokens=4, seed=5, **SAMPLED)
    assert [texts(results[number]) for number in (1, 2, 3)] == [[expected]] * 3


GOOD = [json.dumps(one).encode() for one in ("Hi", {"prompt": [5]}, {"messages": HI})]
BAD = [
    b"not JSON", b"{", b"3", b"null", b"[]", b'"\xff"', b"\x00", b"[" * 3000, b"9" * 5000,
    b'{"prompt": []}', b'{"prompt": [258]}', b'{"prompt": [-1]}', b'{"prompt": [true, "a"]}',
    b'{"messages": []}', b'{"messages": [5]}', b'{"prompt": 1e999}', b'"half \\ud83d"',
    b'{"prompt": "a", "messages": []}', b'{"prompt": "a", "custom_id": 5}',
    b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "n": 1000000000}',
    b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": "a", "stream": true}',
    b'{"prompt": "a", "logit_bias": {"999": 1}}', b'{"custom_id": "x", "body": {}}',
    json.dumps("long " * 100).encode(), b'{"url": {"a": []}}', b'{"body": "\\ud800"}',
    *(json.dumps(chat("x") | change).encode() for change in (
        {"custom_id": None}, {"custom_id": ""}, {"custom_id": 7}, {"method": "GET"}, {"body": []},
        {"url": "/v1/embeddings"}, {"url": ["/v1/completions"]}, {"body": {"messages": "Hi"}},
        {"body": {"messages": HI, "max_tokens": "4"}}, {"body": {"messages": HI, "top_p": 7}},
        {"body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
    )),
]  # fmt: skip
BLANK = [b"", b" ", b"\t"]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.sampled_from(GOOD) | st.sampled_from(BAD) | st.sampled_from(BLANK)
        | st.binary(max_size=30).filter(lambda data: b"\n" not in data).map(lambda b: b"?" + b),
        max_size=12,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 4),
)  # fmt: skip
def test_whatever_lines_hold_each_has_one_result_and_good_ones_their_text(
    engine: StreamingEngine, found: list[bytes], newline: bytes, ends: bool, shards: int
) -> None:
    with TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.write_bytes(newline.join(found) + (newline if ends else b""))
        known = dict[int, dict[str, Any]]()
        for part in range(1, shards + 1):
            shard = Shard(part, shards)
            results = by_line(
                answer(engine, source, Path(folder) / f"{part}", shard=shard,
                       options={"max_new_tokens": 2})
            )  # fmt: skip
            assert all(shard.has(number) for number in results) and not known.keys() & results
            known |= results
    assert sorted(known) == [n for n, line in enumerate(found, 1) if line.strip()]
    for number, record in known.items():
        if found[number - 1] in GOOD:
            assert len(texts(record)) == 1
        else:
            error(record)
    assert rows_of(engine) == 0


def test_no_line_of_the_bad_ones_is_the_engines_fault(
    engine: StreamingEngine, tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b"\n".join(BAD))
    found = answer(engine, tmp_path / "in", tmp_path / "out")
    assert [one["response"]["status_code"] for one in found] == [400] * len(BAD)
    assert [one["line"] for one in found] == list(range(1, len(BAD) + 1))


CUT = [chat(f"{i}", f"q{i}", seed=i, max_tokens=2 + i % 5, **SAMPLED) for i in range(9)]


@pytest.fixture(scope="module")
def whole(engine: StreamingEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The results of CUT and two bad lines, made in one run."""
    folder = tmp_path_factory.mktemp("whole")
    return by_line(answer(engine, write(folder / "in", [*CUT, 5, CUT[0]]), folder / "out"))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 25), st.integers(0, 400), st.booleans())
def test_where_a_run_is_cut_off_the_next_one_goes_on_and_every_line_is_answered_once(
    engine: StreamingEngine, whole: dict[int, Any], after: int, kept: int, torn: bool
) -> None:
    left = after

    def cut(counts: Counts) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with TemporaryDirectory() as folder:
        source, output = write(Path(folder) / "in", [*CUT, 5, CUT[0]]), Path(folder) / "out"
        try:
            answer(engine, source, output, cut)
        except KeyboardInterrupt:
            assert rows_of(engine) == 0
        before = output.read_bytes()
        if torn and before:
            last = before.splitlines(keepends=True)[-1]
            os.truncate(output, len(before) - len(last) + min(kept, len(last) - 1))
        results = by_line(answer(engine, source, output))
        lines_kept = before.splitlines()[: -1 if torn else None]
        assert output.read_bytes().splitlines()[: len(lines_kept)] == lines_kept
        assert answer(engine, source, output) == list(results.values()), "nothing is left to do"
    assert sorted(results) == sorted(whole)
    for number in range(1, 10):
        assert texts(results[number]) == texts(whole[number])


def test_shards_make_together_what_one_makes_alone(engine: StreamingEngine, tmp_path: Path) -> None:
    wanted = [chat(f"{i % 8}", f"q{i}", **SAMPLED) for i in range(10)]
    source = write(tmp_path / "in", wanted)
    options = {"seed": 3}
    whole = by_line(answer(engine, source, tmp_path / "out", options=options))
    parts = [
        by_line(answer(engine, source, tmp_path / f"{k}", shard=Shard(k, 3), options=options))
        for k in (3, 1, 2)
    ]
    assert [sorted(part) for part in parts] == [[3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    together = parts[0] | parts[1] | parts[2]
    for number, record in whole.items():
        other = together[number]
        if number > 8:  # whose id an earlier line has, be it in another shard
            assert error(record) == error(other) and error(other)["param"] == "custom_id"
        else:
            assert texts(record) == texts(other)


def test_lines_are_taken_as_there_is_room(
    engine: StreamingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", [chat(f"{i}", max_tokens=3 + i % 4) for i in range(40)])
    taken, most = 0, 0

    def counted(path: Path) -> Iterator[tuple[int, bytes | None]]:
        nonlocal taken
        for one in lines.lines_of(path):
            taken += 1
            yield one

    def hear(counts: Counts) -> None:
        nonlocal most
        most = max(most, taken - counts.answered)

    monkeypatch.setattr(job, "lines_of", counted)
    assert len(answer(engine, source, tmp_path / "out", hear)) == 40
    assert most <= engine.max_batch + 1


def test_a_line_that_is_too_long_is_an_error_and_is_not_held(
    engine: StreamingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MOST_BYTES", 64)
    long = json.dumps("x" * 300).encode()
    (tmp_path / "in").write_bytes(b'"a"\n' + long + b'\n\n"b"\n' + long)
    found = list(lines.lines_of(tmp_path / "in"))
    assert found == [(1, b'"a"\n'), (2, None), (4, b'"b"\n'), (5, None)]
    options = {"max_new_tokens": 2}
    results = by_line(answer(engine, tmp_path / "in", tmp_path / "out", options=options))
    assert sorted(results) == [1, 2, 4, 5]
    assert all("longer" in error(results[number])["message"] for number in (2, 5))
    assert all(texts(results[number]) for number in (1, 4))


def test_what_fails_in_a_row_is_the_error_of_its_line(
    engine: StreamingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Sampler.choose

    def failing(self: Any, logits: Any) -> Any:
        if self.sampling.top_k == 13:
            raise RuntimeError("at 4")
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "choose", failing)
    wanted = [chat(f"{i}", temperature=1.0, top_k=12 + i % 2, seed=1, n=2) for i in range(6)]
    results = by_line(answer(engine, write(tmp_path / "in", wanted), tmp_path / "out"))
    for number in range(1, 7):
        if number % 2:
            assert len(texts(results[number])) == 2
        else:
            assert error(results[number])["type"] == "server_error"


def test_what_ends_all_texts_ends_the_run_and_is_no_lines_error(
    engine: StreamingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", [chat(f"{i}", max_tokens=2 + 3 * i) for i in range(6)])
    forward, passes = engine._runner.forward, []

    def failing(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == 7:
            raise ReadError("model.safetensors: layer 1: I/O error")
        return forward(*arguments, **options)

    monkeypatch.setattr(engine._runner, "forward", failing)
    with pytest.raises(ReadError):
        answer(engine, source, tmp_path / "out")
    assert 0 < len([texts(record) for record in read(tmp_path / "out")]) < 6
    results = by_line(answer(engine, source, tmp_path / "out"))
    assert [len(texts(results[number])) for number in range(1, 7)] == [1] * 6


def test_results_of_another_file_are_not_gone_on_with(
    engine: StreamingEngine, tmp_path: Path
) -> None:
    answer(engine, write(tmp_path / "in", [chat("a")]), tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(ValueError, match="another line 1"):
        answer(engine, write(tmp_path / "in", [chat("b")]), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before
