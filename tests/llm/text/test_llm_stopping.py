"""Stop strings, in text that comes in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_llm_tokenizer import ByteTokenizer

from layer_streamer.llm.text.stopping import StopStrings, TextStream


def push_all(stops, pieces) -> list[str]:
    text = StopStrings(stops)
    return [*(text.push(piece) for piece in pieces), text.finish()]


def cut(text: str, stops) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


letters = st.text("ab", max_size=6)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(letters, max_size=8))
def test_what_is_shown_ends_where_the_first_stop_string_is_complete(stops, pieces):
    # As pieces come: the first piece with which a stop string is complete ends the text.
    whole = ""
    for piece in pieces:
        whole += piece
        if any(stop in whole for stop in stops):
            break
    assert "".join(push_all(stops, pieces)) == cut(whole, stops)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(letters, max_size=8))
def test_nothing_is_shown_that_could_still_become_part_of_a_stop_string(stops, pieces):
    text, shown, seen = StopStrings(stops), "", ""
    for piece in pieces:
        shown += text.push(piece)
        seen += piece
        if text.found:
            break
        held = seen[len(shown) :]
        assert seen == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_that_cannot_end_is_shown_at_once():
    assert push_all(["END"], ["abc", "E", "N", "X"]) == ["abc", "", "", "ENX", ""]
    assert push_all([], ["a", "b"]) == ["a", "b", ""]


@pytest.mark.parametrize("stops", ["END", [""], ["a", ""], [3]])
def test_a_stop_that_is_no_list_of_texts_is_an_error(stops):
    with pytest.raises(ValueError, match="stop="):
        StopStrings(stops)


def test_a_stop_string_of_several_bytes_a_character_is_found_and_no_character_is_cut():
    text = TextStream(ByteTokenizer(), [], ["\u20ac!"])
    pieces = [text.push(i) for i in "ab\u20acc\u20ac!d".encode()]
    assert "".join(pieces) + text.finish() == "ab\u20acc"
    assert text.stopped
    assert not any("\ufffd" in piece for piece in pieces)


def test_held_text_is_flushed_at_the_end_also_half_a_character():
    text = TextStream(ByteTokenizer(), [], ["bc"])
    shown = "".join(text.push(i) for i in b"ab\xe2\x82")
    assert (shown, text.finish(), text.stopped) == ("a", "b\ufffd", False)
