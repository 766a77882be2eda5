"""Texts of gpt-oss in channels, as openai-harmony 0.0.8 reads them, however they are cut."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from layer_streamer.llm.reading.choice_text import ChoiceText
from layer_streamer.llm.reading.families import family_of
from layer_streamer.llm.reading.found import Call, Thought
from layer_streamer.llm.reading.harmony import BETWEEN, Harmony
from layer_streamer.llm.reading.heads import HEAD, MARKS, OWN, lead_of, may_be_head

GOLDEN = json.loads((ROOT / "tests/data/harmony.json").read_text(encoding="utf-8"))
"""Made by openai-harmony: texts, and the messages that it finds in them."""
NAMES = ("weather", "find")
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.find <|constrain|>json<|message|>"
PIECES = st.sampled_from([
    *MARKS, "<|constrain|>", "<|message|>", "assistant", "user", "analysis", "commentary", "final",
    " to=functions.find", "to=functions.x", " to=python", " json", " ", "\n", "§", "a§", "{", "}",
    '{"§": "<|end|>§"}', '{"a": [1]}', '"', "\\", "<|", "|>", "<|end", "é", ANALYSIS, FINAL, CALL,
    f"<|end|><|start|>assistant{ANALYSIS}", f"<|end|><|start|>assistant{FINAL}",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join)
PLACES = st.lists(st.integers(0, 400), max_size=8)


def found(
    pieces: Sequence[str], names: Sequence[str] = NAMES, lead: str = ""
) -> list[str | Call | Thought]:
    """What is found; neighbours of one kind as one."""
    parser = Harmony(names, lead)
    merged: list[str | Call | Thought] = []
    for one in [one for piece in pieces for one in parser.push(piece)] + parser.finish():
        last = merged[-1] if merged else None
        if isinstance(one, str) and isinstance(last, str):
            merged[-1] = last + one
        elif isinstance(one, Thought) and isinstance(last, Thought):
            merged[-1] = Thought(last.text + one.text)
        else:
            merged.append(one)
    return merged


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces."""
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def fields(text: str, **options: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """Answer, reasoning and calls."""
    told = found([text], **options)
    calls = [(one.name, json.loads(one.arguments)) for one in told if isinstance(one, Call)]
    answer = "".join(one for one in told if isinstance(one, str))
    return answer, "".join(one.text for one in told if isinstance(one, Thought)), calls


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_messages_are_those_that_openais_own_reader_finds(case: dict[str, Any]) -> None:
    own, answers, thoughts = [], [], []
    for channel, to, text in case["messages"]:
        if to is not None and to.startswith("functions."):
            own.append((to.removeprefix("functions."), json.loads(text)))
        elif to is None:
            (thoughts if channel == "analysis" else answers).append(text)
        else:
            foreign = text
    answer, thought, calls = fields(case["text"])
    assert calls == own and answer == BETWEEN.join(answers)
    if all(to is None or to.startswith("functions.") for _, to, _ in case["messages"]):
        assert thought == BETWEEN.join(thoughts)
    else:  # a tool of others: with its head, where the thoughts are
        assert thought.startswith(BETWEEN.join(thoughts))
        assert thought.endswith(f" code<|message|>{foreign}")


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, places=PLACES, names=st.sampled_from([(), NAMES]))
def test_what_is_found_in_channels_does_not_go_by_the_cuts(
    text: str, places: list[int], names: Sequence[str]
) -> None:
    whole = found([text], names)
    assert found(cut(text, places), names) == whole
    assert found(list(text), names) == whole


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, names=st.sampled_from([(), NAMES]))
def test_a_malformed_text_loses_nothing_but_marks_and_heads(
    text: str, names: Sequence[str]
) -> None:
    told = [
        one.name + one.arguments if isinstance(one, Call)
        else one.text if isinstance(one, Thought) else one
        for one in found([text], names)
    ]  # fmt: skip
    assert "".join(told).count("§") == text.count("§")


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_a_text_that_ends_at_any_token_tells_a_beginning(case: dict[str, Any]) -> None:
    tokens = re.findall(r"<\|\w+\|>|.", case["text"], re.DOTALL)
    whole = fields(case["text"])
    for count in range(len(tokens)):
        answer, thought, calls = fields("".join(tokens[:count]))
        assert calls == whole[2][: len(calls)]
        told = [(answer, whole[0]), (thought, whole[1])]
        for part, field in told:
            rest = part.removeprefix(field).removeprefix(BETWEEN)
            is_cut_call = rest.startswith((" to=", OWN, "<|channel|>"))
            assert field.startswith(part) or is_cut_call or rest in (" ", " t", " to")


@given(st.text(max_size=30).filter(lambda text: not set(text) & set("<|>")), PLACES)
def test_a_text_without_a_channel_is_the_answer(text: str, places: list[int]) -> None:
    assert "".join(map(str, found(cut(text, places)))) == text


HEADS = st.tuples(
    st.sampled_from(["", OWN, "<|start|>"]), st.sampled_from(["", " to=functions.f", "to=a"]),
    st.sampled_from(["", "<|channel|>final", " <|channel|>x"]), st.sampled_from(["", "  to=b.c"]),
    st.sampled_from(["", " <|constrain|>json", "<|constrain|> a/b", " json"]),
    st.sampled_from(["<|message|>", " <|message|>"]),
).map("".join)  # fmt: skip


@given(HEADS)
def test_every_beginning_of_a_head_may_become_one(head: str) -> None:
    match = HEAD.fullmatch(head)
    assert match is not None
    assert all(may_be_head(head[:length]) for length in range(len(head) + 1))
    assert not may_be_head(f"{head}x") and not may_be_head(head.replace("<|message|>", "\n"))


@pytest.mark.parametrize(
    ("text", "answer", "thought", "calls"),
    [
        (f"{ANALYSIS}a{FINAL}b", "b", "a", []),  # marks that are left out
        ("<|channel|>odd<|message|>x", "x", "", []), ("<|message|>x", "x", "", []),
        (f"{FINAL}a <|end|> b<|return|>", "a <|end|> b", "", []),  # one speaks of a mark
        (f"{CALL}{{}}<|call|><|start|>user<|message|>x", "<|start|>user<|message|>x", "",
         [("find", {})]),
        (f"{CALL}<|call|>", "", "", [("find", {})]), (f"{CALL}{{}}", "", "", [("find", {})]),
        (CALL, CALL, "", []), (f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>fi", "", "a", []),
        ("<|channel|>fi", "", "", []), (f"{FINAL}a<|channel|>", "a<|channel|>", "", []),
        (f"{CALL}{{}}<|call|> \n more", "more", "", [("find", {})]),
        ("<|channel|>commentary to=find<|message|>{}<|call|>", "", "", [("find", {})]),
        (f"{CALL}[1]<|end|><|start|>assistant{FINAL}x", f"{CALL}[1]{BETWEEN}x", "", []),
        (f'{CALL}{{"a": "<|call|><|start|>"}}<|call|>', "", "",
         [("find", {"a": "<|call|><|start|>"})]),
        (f"{ANALYSIS}a<|end|>\n<|start|>assistant{FINAL}b<|endoftext|>", "b", "a", []),
    ],
)  # fmt: skip
def test_what_models_get_wrong_is_understood_or_told(
    text: str, answer: str, thought: str, calls: Any
) -> None:
    assert fields(text) == (answer, thought, calls)


def test_without_tools_a_call_is_text_where_its_channel_goes() -> None:
    assert fields(f"{CALL}{{}}<|call|>", names=()) == (f"{CALL}{{}}", "", [])
    thought = CALL.replace("commentary", "analysis")
    assert fields(f"{thought}{{}}<|call|>", names=()) == ("", f"{thought}{{}}", [])


@pytest.mark.parametrize(
    ("prompt", "lead"),
    [
        (OWN, OWN), (OWN + FINAL, OWN + FINAL), (f"{OWN}{FINAL}Well", OWN + FINAL),
        (f"{OWN}{FINAL}Well<|return|>", ""), ("<|start|>user<|message|>x<|end|>", ""),
        (f"{OWN}<|channel|>", f"{OWN}<|channel|>"), ("", ""),
    ],
)  # fmt: skip
def test_a_text_begins_in_the_message_that_its_prompt_ends_in(prompt: str, lead: str) -> None:
    assert lead_of(prompt) == lead
    told = fields("a<|end|><|start|>assistant<|channel|>final<|message|>b", lead=lead)
    assert told[0].replace(BETWEEN, "") == "ab"
    assert fields("a", lead=OWN + ANALYSIS) == ("", "a", [])


def test_where_one_call_is_allowed_in_channels_the_text_ends_behind_it() -> None:
    one = ChoiceText(None, Harmony(NAMES), several=False)
    text = f"{ANALYSIS}a<|end|><|start|>assistant{CALL}{{}}<|call|>"
    for piece in [*text, *f"<|start|>assistant{CALL}{{}}<|call|><|start|>assistant{FINAL}x"]:
        one.push(piece)
    one.finish()
    whole = one.whole
    assert (whole.answer, whole.reasoning, len(whole.calls)) == ("", "a", 1)
    assert one.reason("stop") == "tool_calls"


def test_an_answer_is_told_as_it_comes() -> None:
    parser = Harmony(NAMES)
    told = [parser.push(piece) for piece in f"{ANALYSIS}{'x' * 50}"]
    assert sum(map(bool, told)) == 50
    told = [parser.push(piece) for piece in f"<|end|><|start|>assistant{FINAL}{'y' * 50}"]
    assert sum(map(bool, told)) == 50


def test_a_long_call_in_channels_is_read_in_a_time_that_goes_by_its_length() -> None:
    text = CALL + json.dumps({"city": '\\"{<|end|>' * 10_000}) + "<|call|>"
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    (call,) = found(pieces)
    assert isinstance(call, Call) and len(json.loads(call.arguments)["city"]) == 100_000
    assert found([f"{' ' * 50_000}x" + "<|channel|> " * 2_000])


def test_a_template_of_channels_is_of_its_family() -> None:
    assert family_of("<|start|>assistant<|channel|>final<|message|> ... <tool_call>") == "harmony"
