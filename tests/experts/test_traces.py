"""Traces: what is recorded is read back, what is damaged is named, and there is a bound."""

from __future__ import annotations

import json
import logging
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import Fork
from made_traces import any_trace, write_trace, zipf_trace

from layer_streamer.errors import ConfigError
from layer_streamer.experts.trace import ExpertPass, Trace, TraceHeader, read_trace
from layer_streamer.experts.trace_writer import TraceWriter

HEADER = TraceHeader(num_layers=3, num_experts=8, top_k=2, expert_nbytes=96)
ONE = ExpertPass(1, ((0, (3, 7)), (2, (0, 7))))
HEAD_LINE = (
    '{"layer_streamer_experts":1,"num_layers":3,"num_experts":8,"top_k":2,"expert_nbytes":96}'
)


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300
    return str(caught.value).removeprefix(str(path))


@given(trace=any_trace())
def test_what_is_recorded_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    assert read_trace(write_trace(tmp_path_factory.mktemp("t") / "t.jsonl", trace)) == trace


def test_a_file_is_lines_of_json_as_the_page_says(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Trace(HEADER, (ONE,)))
    assert path.read_text() == HEAD_LINE + '\n{"tokens":1,"asked":[[0,[3,7]],[2,[0,7]]]}\n'


@given(trace=any_trace(), at=st.integers(0, 6))
def test_a_recording_goes_on_where_the_last_one_ended(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, at: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    write_trace(path, replace(trace, passes=trace.passes[:at]))
    write_trace(path, replace(trace, passes=trace.passes[at:]))
    assert read_trace(path) == trace


@given(data=st.data())
def test_wherever_a_file_is_cut_off_whole_passes_are_read_and_more_can_be_recorded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    trace = zipf_trace(HEADER, 4)
    path = write_trace(tmp_path_factory.mktemp("t") / "t.jsonl", trace)
    content = path.read_bytes()
    cut = data.draw(st.integers(len(HEAD_LINE) + 1, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n") - 1
    assert read_trace(path).passes == trace.passes[:whole]
    write_trace(path, replace(trace, passes=(ONE,)))
    assert read_trace(path).passes == (*trace.passes[:whole], ONE)


def test_a_torn_line_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t"
    path.write_text(HEAD_LINE + '\n{"tokens":1,"asked":[]}\n{"tokens":1')
    assert read_trace(path).passes == (ExpertPass(1, ()),)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:3: a torn last line is left out"
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "not JSON: Expecting value (column 1)"),
        ('{"tokens":1}', "a pass has tokens and asked, and nothing else"),
        ("[1]", "a pass has tokens and asked, and nothing else"),
        ('{"tokens":0,"asked":[]}', "tokens=0: must be from 1 to"),
        ('{"tokens":true,"asked":[]}', "tokens=True: must be from 1 to"),
        ('{"tokens":1,"asked":{}}', "asked={}: must be a list"),
        ('{"tokens":1,"asked":[[1]]}', "asked has [1]: must be a layer and a list of its experts"),
        ('{"tokens":1,"asked":[[1,2]]}', "asked has [1, 2]: must be a layer and a list"),
        ('{"tokens":1,"asked":[[3,[1]]]}', "asked of layer 3: there are 3 layers"),
        ('{"tokens":1,"asked":[[0,[8]]]}', "layer 0 asked for expert 8: a layer has 8"),
        ('{"tokens":1,"asked":[[0,[1.0]]]}', "layer 0 asked for expert 1.0: a layer has 8"),
        ('{"tokens":1,"asked":[[0,[5,5]]]}', "layer 0 asked for an expert twice: [5, 5]"),
        (f'{{"tokens":1,"asked":[[0,[{"9" * 5000}]]]}}', "not JSON: Exceeds the limit"),
        ('{"tokens":1,"asked":' + "[" * 100_000, "not JSON: "),
        ("\ud800", "not JSON: 'utf-8' codec can't decode"),
    ],
)
def test_a_damaged_pass_is_named_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t"
    content = HEAD_LINE + '\n{"tokens":1,"asked":[]}\n' + line + '\n{"tokens":1,"asked":[]}\n'
    path.write_bytes(content.encode(errors="surrogatepass"))
    assert refused(path).startswith(f":3: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": is no trace of experts"),
        ('{"layer_streamer_tune": 1}\n', ": is no trace of experts"),
        ("\x00" * 100, ": is no trace of experts"),
        (HEAD_LINE, ":1: ends within the first line"),
        (HEAD_LINE.replace(":1,", ":2,", 1) + "\n", ":1: a trace of version 2, not 1"),
        (HEAD_LINE.replace(":1,", ":true,", 1) + "\n", ":1: a trace of version True, not 1"),
        (HEAD_LINE.replace('"top_k":2', '"top_k":9') + "\n", ":1: top_k=9: must be from 1 to 8"),
        (HEAD_LINE.replace(":8", ":true") + "\n", ":1: num_experts=True: not a int"),
        (HEAD_LINE.replace(":96", ":0") + "\n", ":1: expert_nbytes=0: must be from 1 to"),
        (HEAD_LINE.replace(":3", ":9999999") + "\n", ":1: num_layers=9999999: must be from 1 to"),
        (HEAD_LINE.replace("top_k", "topk") + "\n", ":1: header: does not have exactly the fields"),
        (HEAD_LINE[:-1] + "\n", ":1: not JSON"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    assert refused(path).startswith(said)


DOCUMENT = [json.loads(HEAD_LINE), {"tokens": 1, "asked": [[0, [3, 7]], [1, [0]]]}]


@settings(max_examples=50)
@given(head=damaged(DOCUMENT[0]), line=damaged(DOCUMENT[1]))
def test_whatever_is_in_a_file_it_is_a_trace_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, line: bytes
) -> None:
    path = tmp_path_factory.mktemp("t") / "t"
    for content in (HEAD_LINE.encode() + b"\n" + line, head + b"\n" + line):
        path.write_bytes(content + b"\n")
        try:
            trace = read_trace(path)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < len(str(path)) + 300
        else:
            path.unlink()
            assert read_trace(write_trace(path, trace)) == trace


def test_a_file_larger_than_a_trace_may_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(HEAD_LINE + "\n")
    os.truncate(path, 1 << 40)
    assert "a trace of experts that is larger than" in refused(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (replace(HEADER, top_k=4), "is a trace of TraceHeader"),
        (replace(HEADER, expert_nbytes=None), "not of TraceHeader"),
        (replace(HEADER, top_k=0), "top_k=0: must be from 1 to 8"),
    ],
)
def test_a_recording_of_something_else_does_not_go_on_there(
    tmp_path: Path, header: TraceHeader, said: str
) -> None:
    path = write_trace(tmp_path / "t", Trace(HEADER, (ONE,)))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        TraceWriter(path, header)
    assert path.read_bytes() == before


def test_what_is_no_trace_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("mine, and no line's end")
    with pytest.raises(ConfigError, match="is no trace of experts"):
        TraceWriter(path, HEADER)
    assert path.read_text() == "mine, and no line's end"
    for other in (tmp_path, tmp_path / "no" / "t"):
        with pytest.raises(ConfigError, match=str(other)):
            TraceWriter(other, HEADER)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        TraceWriter(tmp_path / "pipe", HEADER)


def test_two_recordings_in_one_file_at_a_time_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with TraceWriter(path, HEADER) as writer:
        with pytest.raises(ConfigError, match="another trace is being recorded there"):
            TraceWriter(path, HEADER)
        writer.append(ONE)
    write_trace(path, Trace(HEADER, (ONE,)))
    assert read_trace(path).passes == (ONE, ONE)


def test_a_pass_that_the_header_does_not_allow_is_refused_and_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with TraceWriter(path, HEADER) as writer:
        for wrong in (ExpertPass(1, ((9, (0,)),)), ExpertPass(1, ((0, (9,)),)), ExpertPass(0, ())):
            with pytest.raises(ConfigError):
                writer.append(wrong)
        writer.append(ONE)
    assert read_trace(path).passes == (ONE,)


def test_a_full_disk_takes_a_pass_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TraceWriter(path, HEADER) as writer:
        writer.append(ONE)
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        try:
            with pytest.raises(OSError, match=str(path)):
                writer.append(ONE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == size
        writer.append(ONE)
    assert read_trace(path).passes == (ONE, ONE)


def test_a_trace_grows_to_its_bound_and_is_read_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("layer_streamer.experts.trace_writer.MOST_NBYTES", 1000)
    path = tmp_path / "t"
    with TraceWriter(path, HEADER) as writer:
        recorded = sum(writer.append(ONE) for _ in range(100))
    assert path.stat().st_size <= 1000
    assert len(read_trace(path).passes) == recorded > 10
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_process_that_is_killed_leaves_whole_passes(tmp_path: Path) -> None:
    path = tmp_path / "t"
    program = (
        "import sys; from pathlib import Path\n"
        "from layer_streamer.experts.trace import *\n"
        "from layer_streamer.experts.trace_writer import TraceWriter\n"
        "writer = TraceWriter(Path(sys.argv[1]), TraceHeader(3, 8, 2, 96))\n"
        "while True:\n"
        "    writer.append(ExpertPass(1, ((0, (3, 7)), (2, (0, 7)))))\n"
        "    print(file=sys.stderr)\n"
    )
    with Fork(program, path) as child:
        for _ in range(3):
            child.stderr.readline()
    passes = read_trace(path).passes
    assert len(passes) >= 3 and set(passes) == {ONE}
    write_trace(path, Trace(HEADER, (ONE,)))
