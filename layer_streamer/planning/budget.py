"""Amounts of memory as people write and read them: "6GiB", "1.5 GB", "512 MiB". Pure."""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import ConfigError

DECIMAL = ("B", "kB", "MB", "GB", "TB")
"""Units in powers of 1000."""
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
"""Units in powers of 1024."""
MAX_BYTES = 2**63 - 1
ACCEPTED = (
    'bytes as an int from 0 to 2**63 - 1, or a string such as "6GiB", "1.5 GB" or "1e9" '
    f"(units: {', '.join(DECIMAL)}, {', '.join(BINARY[1:])})"
)

_FACTORS = {
    **{unit.lower(): 1000**power for power, unit in enumerate(DECIMAL)},
    **{unit.lower(): 1024**power for power, unit in enumerate(BINARY)},
    "": 1,
}
# The lengths are bounded: a power of ten with a nine-digit exponent would fill the memory.
_AMOUNT = re.compile(
    r"((?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:e[+-]?[0-9]{1,2})?)[ \t]*([a-z]*)",
    re.IGNORECASE | re.ASCII,
)


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of an amount: an int, or a number and a unit; parts of a byte are dropped.

    Units are B; kB, MB, GB, TB (powers of 1000); KiB, MiB, GiB, TiB (powers of 1024); none means
    bytes. Upper and lower case are one, except that a small b after a capital ("Gb") means bits
    and is refused. ``name`` is the setting, for the message. Errors: ConfigError for anything
    else, a negative amount, or one above MAX_BYTES.
    """
    nbytes = _parse(value) if isinstance(value, str) else value
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes <= MAX_BYTES:
        raise ConfigError(f"{name}={value!r}: must be {ACCEPTED}")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """An amount for people, three digits of it: "6.00 GiB", "312 MiB", "17 B"."""
    power = 0
    # The rounded amount decides: 1023.6 MiB is 1.00 GiB.
    while power < len(BINARY) - 1 and round(nbytes / 1024**power) >= 1024:
        power += 1
    if power == 0:
        return f"{nbytes} B"
    amount = nbytes / 1024**power
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:.{digits}f} {BINARY[power]}"


def _parse(text: str) -> int | None:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        return None
    number, unit = match.groups()
    means_bits = unit.endswith("b") and unit != unit.lower()
    if means_bits or unit.lower() not in _FACTORS:
        return None
    return int(Fraction(number) * _FACTORS[unit.lower()])
