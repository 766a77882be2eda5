"""Texts that are held to a constraint are like it, whatever the model's scores."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from assets import smollm2_metadata
from byte_model import END, START, VOCABULARY, byte_tokenizer
from documents import SCHEMAS, check_document, is_like, matcher_of, random_ids, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_made import KINDS
from transformers import AutoTokenizer

from layer_streamer.llm.constraints.constraint import Constraint
from layer_streamer.llm.constraints.matcher import Matcher
from layer_streamer.llm.constraints.vocabulary import Vocabulary
from layer_streamer.llm.metadata import load_tokenizer

WIDER = VOCABULARY + 40
"""Of a model that has more rows of its embedding than its tokenizer has tokens."""
ARITHMETIC = r"""
# sums that end with their results
root   ::= (sum "=" ws number "\n"){1,3}
sum    ::= product ([-+] ws product){0,2}
product ::= factor ([*/] ws factor)?
factor ::= number | "(" ws sum ")" ws
number ::= "-"? [0-9]{1,4} ws
ws     ::= [ \t]?
"""
LIST = r"""
root ::= item{1,5}
item ::= "- " words "\n"
words ::= [^\r\n\x0b\x0c\u0085\u2028\u2029]{1,12}
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value){0,2}
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4})
  ){0,6} "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]{1,5})? ([eE] [-+]? [0-9] [1-9]{0,2})? ws
ws ::= | " " | "\n" [ \t]{0,3}
"""
SUM = re.compile(r"(-?\d{1,4}[ \t]?|[-+*/()=][ \t]?)+")


def is_arithmetic(text: str) -> bool:
    lines = text.split("\n")
    sides = [line.split("=") for line in lines[:-1]]
    return lines[-1] == "" and all(
        len(side) == 2
        and SUM.fullmatch(side[0]) is not None
        and re.fullmatch(r"[ \t]?-?\d{1,4}[ \t]?", side[1]) is not None
        and side[0].count("(") == side[0].count(")")
        for side in sides
    )


def is_list(text: str) -> bool:
    return re.fullmatch(r"(- [^\r\n]{1,12}\n){1,5}", text) is not None


def is_json(text: str) -> bool:
    return isinstance(json.loads(text, strict=True), dict)


GRAMMARS: dict[str, tuple[str, Any]] = {
    "arithmetic": (ARITHMETIC, is_arithmetic),
    "list": (LIST, is_list),
    "json": (JSON, is_json),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer(), WIDER, [END])


@pytest.fixture(scope="module")
def endless() -> Vocabulary:
    """Of a model that ends no text by itself."""
    return Vocabulary(byte_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_document_of_random_tokens_is_as_its_schema_says(
    name: str, vocabulary: Vocabulary
) -> None:
    matcher = matcher_of(vocabulary, schema=SCHEMAS[name])
    for seed in range(6):
        ids = random_ids(matcher.copy(), WIDER, seed)
        check_document(text_of(byte_tokenizer(), ids), SCHEMAS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_each_of_a_hundred_documents_is_as_its_schema_says(
    name: str, vocabulary: Vocabulary
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_metadata())
    real = Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    quotes = [i for token, i in tokenizer.get_vocab().items() if '"' in token]
    for known, made, likelier in (
        (vocabulary, byte_tokenizer(), []),
        (real, tokenizer, quotes),
    ):
        matcher = matcher_of(known, schema=SCHEMAS[name])
        for seed in range(100):
            ids = random_ids(matcher.copy(), known.size, seed, likelier=likelier)
            check_document(text_of(made, ids), SCHEMAS[name])


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_text_of_random_tokens_follows_its_gbnf_grammar(
    name: str, vocabulary: Vocabulary
) -> None:
    grammar, follows = GRAMMARS[name]
    matcher = matcher_of(vocabulary, grammar=grammar)
    for seed in range(20):
        ids = random_ids(matcher.copy(), WIDER, seed)
        text = text_of(byte_tokenizer(), ids)
        assert follows(text), text


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_text_is_one_that_pythons_own_expressions_match(
    endless: Vocabulary, data: st.DataObject
) -> None:
    atoms = st.sampled_from(["a", "[bc]", "[^a\\n]", "\\d", "é", "(?:xy|z)"])
    counts = st.sampled_from(["", "?", "{1,3}", "{2}"])
    parts = data.draw(st.lists(st.tuples(atoms, counts), min_size=1, max_size=6))
    regex = "x" + "".join(atom + count for atom, count in parts)
    matcher = matcher_of(endless, regex=regex.replace("\\d", "[0-9]"))
    ids = random_ids(matcher, VOCABULARY, data.draw(st.integers(0, 99)))
    assert re.fullmatch(regex, text_of(byte_tokenizer(), ids))


def test_tokens_that_the_tokenizer_lacks_and_special_ones_never_follow(
    vocabulary: Vocabulary,
) -> None:
    matcher = matcher_of(vocabulary, regex="(?s:.){3,}")
    allowed = matcher.allowed()
    assert allowed.shape == (WIDER,)
    assert not allowed[[START, END, *range(VOCABULARY, WIDER)]].any()
    for token in b"abc":
        matcher.accept(token)
    assert np.flatnonzero(matcher.allowed())[-1] == END


def test_each_id_that_ends_a_text_follows_where_it_may_end() -> None:
    both = Vocabulary(byte_tokenizer(), WIDER, [END, START, WIDER - 1, WIDER + 5])
    matcher = matcher_of(both, regex="a+")
    assert list(np.flatnonzero(matcher.allowed())) == [ord("a")]
    matcher.accept(ord("a"))
    assert list(np.flatnonzero(matcher.allowed())) == [ord("a"), START, END]
    matcher.accept(START)
    assert matcher.ended and matcher.ends_at(2)


def test_a_text_that_nothing_can_follow_ends_without_a_token_for_it(endless: Vocabulary) -> None:
    matcher = matcher_of(endless, regex="(?s:.)[bc]?")
    matcher.accept(ord("a"))
    assert not matcher.ended
    matcher.accept(ord("b"))
    assert matcher.ended and matcher.ends_at(2) and not matcher.ends_at(1)
    matcher.accept(ord("z"))  # of a draft, behind the end
    assert matcher.ends_at(2) and matcher.forced() == []


@pytest.mark.parametrize("nothing", ["/b/ & /c/", "/bx*/ & /b*y*z/"])
def test_an_end_that_is_seen_late_is_one(nothing: str, vocabulary: Vocabulary) -> None:
    """What could follow is a text that there is not, which shows when it is looked for."""
    matcher = matcher_of(vocabulary, grammar=f'start: "a" B?\nB: {nothing}')
    matcher.accept(ord("a"))
    assert matcher.ends_at(1)


def test_scores_of_what_may_follow_stay_and_all_others_are_minus_infinity(
    vocabulary: Vocabulary,
) -> None:
    scores = torch.randn(WIDER)
    scores[ord("b")] = -torch.inf  # as a model may say; the other ones are no better
    masked = matcher_of(vocabulary, regex="[ab]").mask(scores)
    assert masked[ord("a")] == scores[ord("a")] and masked[ord("b")].isfinite()
    assert int(masked.isfinite().sum()) == 2 and masked.dtype == torch.float32


def test_a_token_that_may_not_follow_is_refused_and_changes_nothing(
    vocabulary: Vocabulary,
) -> None:
    matcher = matcher_of(vocabulary, regex="ab")
    for token in (ord("b"), END, -1, WIDER, 1 << 40):
        with pytest.raises(ValueError, match=f"regex: token {token} may not follow here"):
            matcher.accept(token)
    matcher.accept(ord("a"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_tokens_are_taken_back_one_by_one_or_together(name: str, vocabulary: Vocabulary) -> None:
    matcher = matcher_of(vocabulary, schema=SCHEMAS[name])
    ids = random_ids(matcher, WIDER, 1)
    before = matcher_of(vocabulary, schema=SCHEMAS[name])
    for i, token in enumerate(ids):
        if i % 7 == 0:
            again = matcher.copy()
            again.rollback(len(ids) - i)
            assert (again.allowed() == before.allowed()).all() and not again.ended
        before.accept(token)
    assert before.ended
    with pytest.raises(ValueError, match="cannot be taken back"):
        before.rollback(len(ids) + 1)


def test_an_end_is_taken_back_too(vocabulary: Vocabulary) -> None:
    matcher = matcher_of(vocabulary, regex="a+")
    for token in (ord("a"), ord("a"), END):
        matcher.accept(token)
    matcher.rollback(1)
    assert not matcher.ended and matcher.allowed()[[ord("a"), END]].all()
    matcher.rollback(2)
    assert not matcher.allowed()[END]


def test_a_copy_goes_its_own_way(vocabulary: Vocabulary) -> None:
    matcher = matcher_of(vocabulary, regex="ab|cd")
    other = matcher.copy()
    matcher.accept(ord("a"))
    other.accept(ord("c"))
    assert matcher.forced() == [ord("b")] and other.forced() == [ord("d")]


def test_what_is_forced_is_the_only_text_that_can_follow(vocabulary: Vocabulary) -> None:
    matcher = matcher_of(vocabulary, schema=SCHEMAS["const"])
    forced = matcher.forced()
    assert bytes(forced) == b'{"name":"get_weather","arguments":{"unit":1}}'
    for i, token in enumerate(forced):
        assert list(np.flatnonzero(matcher.allowed())) == [token]
        assert matcher.forced() == forced[i:]
        matcher.accept(token)
    assert matcher.ended


def test_a_real_tokenizer_cuts_what_is_forced_as_it_cuts_the_text() -> None:
    tokenizer = load_tokenizer(smollm2_metadata())
    known = Vocabulary(tokenizer, 49_152, [2])
    schema = SCHEMAS["enums"]
    matcher = matcher_of(known, schema=schema)
    forced = tokenizer.encode('{"color')
    assert matcher.forced() == forced and matcher.allowed().sum() == 1
    ids = random_ids(matcher, 49_152, 0)
    assert ids[: len(forced)] == forced
    check_document(text_of(tokenizer, ids), schema)


@pytest.mark.parametrize("kind", ["byte fallback", "byte fallback that strips nothing",
                                  "byte level"])  # fmt: skip
def test_tokenizers_that_spell_in_bytes_serve(kind: str) -> None:
    tokenizer = KINDS[kind]()
    known = Vocabulary(tokenizer, len(tokenizer), [2])
    ids = random_ids(matcher_of(known, schema=SCHEMAS["unicode"]), len(tokenizer), 0)
    assert is_like(json.loads(text_of(tokenizer, ids)), SCHEMAS["unicode"])


@pytest.mark.parametrize("kind", ["unigram", "word piece"])
def test_a_tokenizer_whose_bytes_are_not_known_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^text of this model's tokenizer cannot be const.*$"):
        Vocabulary(KINDS[kind](), 400)


def test_spaces_between_parts_are_allowed_where_they_are_asked_for(endless: Vocabulary) -> None:
    for spaces in (False, True):
        matcher = Matcher.of(Constraint.of_schema(SCHEMAS["const"], spaces=spaces), endless)
        matcher.accept(ord("{"))
        assert bool(matcher.allowed()[ord(" ")]) == spaces
