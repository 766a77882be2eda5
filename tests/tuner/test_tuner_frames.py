"""Messages of a trial's child amid whatever else is written to their descriptor."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.tuner.trials.frames import (
    MOST_NBYTES,
    DescriptorLostError,
    FrameReader,
    FrameWriter,
    pack_frame,
)

NONCE = "s" * 32
MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), st.integers()), max_size=5)
NOISE = st.binary(max_size=80)


def frames_of(messages: list[Any], nonce: str = NONCE) -> list[bytes]:
    """As a writer sends them."""
    read_end, write_end = os.pipe()
    try:
        writer, frames = FrameWriter(write_end, nonce), []
        for message in messages:
            writer.send(message)
            frames.append(os.read(read_end, 1 << 16))
    finally:
        os.close(read_end)
        os.close(write_end)
    return frames


def read_in_pieces(data: bytes, cuts: list[int]) -> tuple[list[Any], FrameReader]:
    reader, found, begin = FrameReader(NONCE), [], 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        found += reader.feed(data[begin:end])
        begin = end
    return found, reader


@given(MESSAGES, st.lists(NOISE, min_size=6, max_size=6), st.lists(st.integers(0, 10**6)))
def test_messages_are_found_amid_noise_however_they_arrive(
    messages: list[Any], noise: list[bytes], cuts: list[int]
) -> None:
    frames = frames_of(messages)
    data = noise[0] + b"".join(
        frame + after for frame, after in zip(frames, noise[1:], strict=False)
    )
    found, reader = read_in_pieces(data, cuts)
    assert found == messages
    spent = sum(map(len, noise[: len(frames) + 1]))
    assert reader.garbage == spent


@given(st.integers(0, 200), st.binary(min_size=1, max_size=300))
def test_a_message_that_is_torn_apart_is_lost_alone(at: int, noise: bytes) -> None:
    first, torn, last = frames_of([{"a": 1}, {"b": "x" * 150}, {"c": 3}])
    at = 1 + at % (len(torn) - 1)
    data = first + torn[:at] + noise + torn[at:] + last
    found, _ = read_in_pieces(data + bytes(400), [])
    assert found in ([{"a": 1}, {"c": 3}], [{"a": 1}, {"b": "x" * 150}, {"c": 3}])


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_message_with_a_changed_byte_is_not_read(at: int, change: int) -> None:
    (frame,) = frames_of([{"result": {"run_seconds": [1.0]}}])
    broken = bytearray(frame)
    broken[at % len(broken)] ^= change
    found, _ = read_in_pieces(bytes(broken) + frame, [])
    assert found == [{"result": {"run_seconds": [1.0]}}]


def test_a_message_made_with_another_nonce_is_not_read() -> None:
    data = b"".join(frames_of([{"result": {}}], "t" * 32))
    found, _ = read_in_pieces(data, [])
    assert found == []


def test_a_message_that_is_sent_again_is_read_once() -> None:
    one, two = frames_of([{"a": 1}, {"b": 2}])
    found, _ = read_in_pieces(one + one + two + one + two, [])
    assert found == [{"a": 1}, {"b": 2}]


@given(st.integers(0, 10**6))
def test_a_message_that_was_begun_and_never_ends_is_not_waited_for(at: int) -> None:
    (frame,) = frames_of([{"a": 1}])
    begun = frame[: at % len(frame)]
    found, reader = read_in_pieces(begun + frame, [])
    assert found == [{"a": 1}]
    assert reader.garbage == len(begun)


def test_a_flood_of_noise_takes_no_memory() -> None:
    reader = FrameReader(NONCE)
    for _ in range(100):
        assert reader.feed(bytes(1 << 16)) == []
        assert len(reader._begun) <= MOST_NBYTES
    assert reader.feed(pack_frame(NONCE, 1, {"a": 1})) == [{"a": 1}]


def test_a_writer_whose_descriptor_is_closed_says_so() -> None:
    read_end, write_end = os.pipe()
    writer = FrameWriter(write_end, NONCE)
    os.close(write_end)
    with pytest.raises(DescriptorLostError):
        writer.send({})
    os.close(read_end)


def test_a_writer_does_not_write_to_another_file_under_the_same_number(tmp_path: Any) -> None:
    read_end, write_end = os.pipe()
    writer = FrameWriter(write_end, NONCE)
    path = tmp_path / "the user's own"
    with path.open("wb") as file:
        os.dup2(file.fileno(), write_end)
        with pytest.raises(DescriptorLostError):
            writer.send({"a": 1})
    os.close(write_end)
    os.close(read_end)
    assert path.read_bytes() == b""


def test_a_writer_whose_reader_has_gone_says_so() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(DescriptorLostError):
        FrameWriter(write_end, NONCE).send({})
    os.close(write_end)


def test_a_forked_copy_of_the_writer_is_ended_without_a_word() -> None:
    read_end, write_end = os.pipe()
    writer = FrameWriter(write_end, NONCE)
    writer._process = os.getppid()  # as after a fork, which a test process must not do
    ended = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "_exit", end)
        writer.send({"a": 1})
    os.close(write_end)
    assert (ended, os.read(read_end, 100)) == ([1], b"")
    os.close(read_end)
