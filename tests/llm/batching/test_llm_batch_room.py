"""How many rows and tokens a batch takes, where nobody says."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from layer_streamer.llm.batching.room import room_for
from layer_streamer.llm.models.config import model_config

GIB = 1 << 30
QWEN_7B = model_config(
    Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
    )
)  # fmt: skip
TOKEN = 2 * 4 * 128 * 2 * 28


@given(
    st.integers(0, 200 * GIB), st.integers(1, 32768), st.none() | st.integers(1, 500),
    st.integers(1, 28),
)  # fmt: skip
def test_tokens_take_a_quarter_at_most_unless_one_row_takes_more(
    free: int, length: int, rows: int | None, devices: int
) -> None:
    found = room_for(QWEN_7B, torch.bfloat16, free, length, rows, devices)
    assert found.kv_tokens >= length and found.max_batch == (rows or found.max_batch)
    layers = -(-28 // devices)  # of the device that has the most
    assert found.kv_tokens == length or found.kv_tokens * TOKEN // 28 * layers <= free // 4
    assert 8 <= found.max_batch <= 256 or rows is not None
    assert found.max_batch == 8 or rows or found.max_batch * 8 * 152064 <= free // 16


def test_there_are_hundreds_of_rows_where_there_is_room() -> None:
    found = room_for(QWEN_7B, torch.bfloat16, 24 * GIB, 4096)
    assert found.max_batch == 256 and found.kv_tokens > 90_000
    assert room_for(QWEN_7B, torch.bfloat16, GIB, 4096).max_batch < 60


def test_each_device_has_room_for_its_own_layers() -> None:
    one, two = (room_for(QWEN_7B, torch.bfloat16, 8 * GIB, 4096, 256, n) for n in (1, 2))
    assert 1.7 * one.kv_tokens < two.kv_tokens < 2 * one.kv_tokens
