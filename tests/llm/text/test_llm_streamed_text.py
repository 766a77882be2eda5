"""Streamed text is what decoding all ids at once gives, for every type of tokenizer."""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_made import KINDS, byte_fallback

from layer_streamer.llm.text.stopping import TextStream
from layer_streamer.llm.text.tokenizer import StreamingDetokenizer

SCRIPTS = "a be. \n\u00e9\u4e16\u754c\u0e2a\u0e27\u0e31\u0928\u092e\ud55c\U0001f600\U0001f468\u200d"
TEXTS = st.one_of(st.text(st.sampled_from(SCRIPTS), max_size=30), st.text(max_size=20))

made = functools.cache(lambda kind: KINDS[kind]())


def decoded(tokenizer, ids, **options):
    options = {"skip_special_tokens": True} | options
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)


def streamed(tokenizer, prompt, ids, **options):
    text = StreamingDetokenizer(tokenizer, prompt, **options)
    return [*(text.push(i) for i in ids), text.finish()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=TEXTS, more=TEXTS, special=st.integers(0, 12))
@example(text=" ", more="a", special=12)
def test_in_every_split_the_pieces_are_what_all_ids_decode_to(kind, skip, text, more, special):
    tokenizer = made(kind)
    first = tokenizer.encode(text)
    ids = [*first, *[3] * special, *tokenizer.encode(more, add_special_tokens=False)]
    whole = decoded(tokenizer, ids, skip_special_tokens=skip)
    for cut in range(len(ids) + 1):
        before = decoded(tokenizer, ids[:cut], skip_special_tokens=skip)
        if not before.endswith("\ufffd"):  # else a character is cut
            pieces = streamed(tokenizer, ids[:cut], ids[cut:], skip_special_tokens=skip)
            assert before + "".join(pieces) == whole


@pytest.mark.parametrize("kind", ["byte fallback", "byte level", "unigram"])
def test_a_character_that_the_prompt_leaves_off_in_comes_whole(kind):
    tokenizer = made(kind)
    ids = tokenizer.encode("so \u4e16\u754c\U0001f680", add_special_tokens=False)
    whole = decoded(tokenizer, ids)
    for cut in range(len(ids)):
        pieces = "".join(streamed(tokenizer, ids[:cut], ids[cut:]))
        assert pieces and whole.endswith(pieces) and "\ufffd" not in pieces


def test_characters_spelled_in_bytes_come_out_one_by_one():
    tokenizer = made("byte fallback")
    ids = tokenizer.encode("\u4e16\u754c" * 9, add_special_tokens=False)[1:]
    pieces = streamed(tokenizer, [1], ids)
    assert pieces[2::3] == [*"\u4e16\u754c" * 9] and not any(pieces[0::3][:-1])


def test_broken_bytes_do_not_spoil_the_characters_before_and_after_them():
    tokenizer = made("byte fallback")
    euro = tokenizer.encode("\u20ac", add_special_tokens=False)[1:]
    word = tokenizer.encode("hi", add_special_tokens=False)
    pieces = streamed(tokenizer, word, [*euro, *euro, *euro[:2], *word, *euro[:1]])
    assert "".join(pieces) == "\u20ac\u20ac\ufffd\ufffd hi\ufffd"


def stream_of(ids, stops, **options):
    stream = TextStream(byte_fallback(), [1], stops, **options)
    pieces = [stream.push(i) for i in ids]
    return "".join([*pieces, stream.finish()]), stream.stopped


@pytest.mark.parametrize("stop", ["<|turn|>", "b<|turn|>", "b<|turn|>c", "<|turn|>c"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_contain_special_tokens(stop, skip):
    a, b, c = (byte_fallback().convert_tokens_to_ids(x) for x in "abc")
    text, stopped = stream_of([a, b, 3, c, a], [stop], skip_special_tokens=skip)
    assert stopped and text == ("a" if stop.startswith("b") else "ab")


def test_what_nearly_was_a_stop_string_comes_without_its_special_token():
    a, b = (byte_fallback().convert_tokens_to_ids(x) for x in "ab")
    assert stream_of([a, b, 3, a], ["b<|turn|>c"]) == ("aba", False)
    shown = stream_of([a, b, 3, a], ["b<|turn|>c"], skip_special_tokens=False)
    assert shown == ("ab<|turn|>a", False)


def test_the_token_that_ends_a_text_is_shown_where_special_ones_are():
    for skip, text in ((True, ""), (False, "</s>")):
        stream = TextStream(byte_fallback(), [1], [], skip_special_tokens=skip)
        assert stream.push(2, ends=True) + stream.finish() == text
