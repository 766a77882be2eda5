"""Text in and out: a made-up byte tokenizer for the corner cases, the real one for the rest."""

import pytest
from assets import smollm2_metadata

from layer_streamer.llm.metadata import load_tokenizer
from layer_streamer.llm.text.tokenizer import (
    MAX_HELD_TOKENS,
    StreamingDetokenizer,
    chat_ids,
    has_chat_template,
    raw_ids,
)


class ByteTokenizer:
    """One id per byte of UTF-8; 256 is a special id without text."""

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class SpacelessTokenizer:
    """Each id is a word with a space before it, which is dropped at the start of a text."""

    def decode(self, ids, **_):
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def stream(tokenizer, ids, context=()) -> list[str]:
    text = StreamingDetokenizer(tokenizer, context)
    return [*(text.push(i) for i in ids), text.finish()]


@pytest.mark.parametrize(
    "text", ["plain", "na\u00efve \u20ac", "\U0001f600\U0001f468\u200d\U0001f469", ""]
)
def test_characters_come_out_whole_and_none_is_lost(text):
    pieces = stream(ByteTokenizer(), text.encode())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_character_comes_out_with_its_last_byte():
    assert stream(ByteTokenizer(), "a\u20acb".encode()) == ["a", "", "", "\u20ac", "b", ""]


def test_half_a_character_at_the_end_comes_out_broken():
    assert stream(ByteTokenizer(), "a\u20ac".encode()[:-1])[-1] == "\ufffd"


def test_bytes_that_never_make_a_character_do_not_hold_back_the_text_for_ever():
    pieces = stream(ByteTokenizer(), [0x80] * (MAX_HELD_TOKENS + 3))
    # All but what may be the beginning of a character.
    assert pieces[MAX_HELD_TOKENS - 1] == "\ufffd" * (MAX_HELD_TOKENS - 3)
    assert "".join(pieces) == "\ufffd" * (MAX_HELD_TOKENS + 3)


def test_special_ids_have_no_text():
    assert "".join(stream(ByteTokenizer(), [104, 256, 105])) == "hi"


def test_the_space_before_the_first_new_word_is_kept():
    assert "".join(stream(SpacelessTokenizer(), [2, 3], context=[1])) == " w2 w3"


def test_a_long_text_streams_out_as_it_is_decoded_whole():
    tokenizer = load_tokenizer(smollm2_metadata())
    text = "  Tabs\tand\n\nnewlines, caf\u00e9, \u4f60\u597d, \U0001f680! 1234567890" * 5
    assert "".join(stream(tokenizer, raw_ids(tokenizer, text))) == text


def test_a_chat_prompt_carries_each_special_token_once():
    tokenizer = load_tokenizer(smollm2_metadata())
    assert has_chat_template(tokenizer)
    ids = chat_ids(tokenizer, "Hello")
    assert ids.count(1) == 3  # system, user, and the start of the answer
    assert tokenizer.decode(ids).endswith("Hello<|im_end|>\n<|im_start|>assistant\n")


class BosTokenizer:
    """Puts id 1 before a text unless told not to, as its template does."""

    def encode(self, text, *, add_special_tokens=True):
        ids = [1 if c == "^" else ord(c) for c in text]
        return [1, *ids] if add_special_tokens else ids

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"^{messages[0]['content']}>"


def test_a_chat_prompt_gets_no_second_bos_and_a_raw_one_gets_its_first():
    assert chat_ids(BosTokenizer(), "a") == [1, ord("a"), ord(">")]
    assert raw_ids(BosTokenizer(), "a") == [1, ord("a")]
