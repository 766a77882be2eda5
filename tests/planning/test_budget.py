"""Amounts of memory: what people may write, and what they get to read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layer_streamer.errors import ConfigError
from layer_streamer.planning.budget import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 << 30),
        ("6 GiB", 6 << 30),
        (" 6  gib ", 6 << 30),
        ("1.5GB", 1_500_000_000),
        (".5 KiB", 512),
        ("512MiB", 512 << 20),
        ("800 MB", 800_000_000),
        ("3kB", 3000),
        ("3 KB", 3000),
        ("3kb", 3000),
        ("2 TB", 2 * 10**12),
        ("2TIB", 2 << 40),
        ("1e9", 10**9),
        ("2.5E3 B", 2500),
        ("17", 17),
        ("17b", 17),
        ("0", 0),
    ],
)
def test_a_number_and_a_unit_are_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes("device_budget", text) == nbytes


def test_parts_of_a_byte_are_dropped_and_nothing_else() -> None:
    assert parse_bytes("x", "0.9999 B") == 0
    assert parse_bytes("x", "1e-3 KiB") == 1
    # A float would round this to the next multiple of 1024.
    assert parse_bytes("x", "9007199254740993") == 2**53 + 1


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "GiB", "auto", "3T", "3 G", "3Gi", "6 XB", "6Gb", "6Gib", "6 G B", "6GiB/s"),
        *("-1", "-6GiB", "+6GiB", "nan", "inf", "1e400", "1e", "1.2.3", "1_000", "0x10", "٣GiB"),
        *("1e400000000", "9" * 5000, "6,5GB", "6GiB\x00", str(2**63), "8388608 TiB"),
        *(-1, 2**63, True, False, None, 6e9, float("nan"), float("inf"), b"6GiB", [6]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_anything_else_is_refused_with_field_value_and_what_is_accepted(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes("host_budget", value)
    message = str(caught.value)
    assert message.startswith(f"host_budget={value!r}: must be bytes as an int")
    assert "6GiB" in message
    assert "TiB" in message
    assert "\n" not in message


@settings(deadline=None)
@given(st.integers(0, MAX_BYTES))
def test_an_int_is_its_own_amount_also_as_a_string(nbytes: int) -> None:
    assert parse_bytes("x", nbytes) == parse_bytes("x", str(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (6 << 30, "6.00 GiB"),
        (312 << 20, "312 MiB"),
        ((10 << 20) - 1, "10.0 MiB"),
        ((100 << 20) - 1, "100 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (3 << 39, "1.50 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_people_get_three_digits_and_a_unit(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@settings(deadline=None)
@given(st.integers(0, MAX_BYTES // 2))
@example(1152)  # parts of a byte are dropped, too
def test_what_people_read_can_be_written_back_and_is_off_by_half_a_percent_at_most(
    nbytes: int,
) -> None:
    assert abs(parse_bytes("x", format_bytes(nbytes)) - nbytes) < nbytes / 200 + 1


@settings(deadline=None)
@given(st.integers(0, MAX_BYTES), st.integers(0, MAX_BYTES))
def test_the_larger_amount_never_reads_smaller(a: int, b: int) -> None:
    small, large = (parse_bytes("x", format_bytes(min(n, MAX_BYTES // 2))) for n in sorted((a, b)))
    assert small <= large
