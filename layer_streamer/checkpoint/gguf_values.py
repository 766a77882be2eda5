"""GGUF metadata values: scalars parsed at once, arrays stepped over and read when asked for."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np

from ..errors import CheckpointChangedError, CheckpointError
from .header import MAX_HEADER_BYTES, MAX_WALKED, WINDOW_BYTES, HeaderFile, Quota, open_header
from .manifest import TRUNCATED, FileStamp

Scalar: TypeAlias = int | float | bool | str

NUMBERS = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
"""Value types of fixed size, by the format's type ids."""

BOOL, STRING, ARRAY = 7, 8, 9

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array in a GGUF file's metadata, read from the file only by ``load()``."""

    element_type: str
    """"string", "bool", "int8" to "uint64", "float32" or "float64"."""
    count: int
    """Number of elements."""
    offset: int
    """Byte offset of the first element in the file."""
    nbytes: int
    """Bytes that all elements take in the file."""
    stamp: FileStamp
    """The file, as it was when the array was found."""

    def __len__(self) -> int:
        return self.count

    def load(self) -> list[Any]:
        """The elements: ints, floats, bools or strings.

        Errors: CheckpointChangedError if the file is no longer the same; CheckpointError if it
        cannot be read, and beyond MAX_WALKED elements.
        """
        path = self.stamp.path
        if self.count > MAX_WALKED:
            raise CheckpointError(f"{path}: array of {self.count} elements, more than {MAX_WALKED}")
        with open_header(path) as file:
            change = self.stamp.change(file.stamp.size, file.stamp.mtime_ns)
            if change is not None:
                raise CheckpointChangedError(f"{path}: changed since it was opened: {change}")
            cursor = Cursor(file, self.offset)
            if self.element_type == "string":
                what = "array element"
                return [cursor.string(what, MAX_HEADER_BYTES) for _ in range(self.count)]
            data = cursor.take(self.nbytes, "array")
        name = "uint8" if self.element_type == "bool" else self.element_type
        values = np.frombuffer(data, np.dtype(name).newbyteorder("<"))
        if self.element_type != "bool":
            return list(values.tolist())
        if values.size and values.max() > 1:
            raise CheckpointError(f"{path}: array at byte {self.offset}: a bool is neither 0 nor 1")
        return [value == 1 for value in values.tolist()]


class Cursor:
    """Reads a GGUF header forwards, through a window; never past the file or ``limit``.

    Nothing is read, skipped or allocated by a claimed length before that is checked against the
    bytes left; what does not fit is a CheckpointError.
    """

    def __init__(self, file: HeaderFile, pos: int = 0, limit: int = MAX_HEADER_BYTES) -> None:
        self.file = file
        self.pos = pos
        self._limit = min(file.size, limit)
        self._window = b""
        self._start = 0

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file, or of the longest header."""
        return self._limit - self.pos

    def fail(self, problem: str) -> NoReturn:
        """CheckpointError that names the file and ``problem``."""
        raise CheckpointError(f"{self.file.path}: {problem}")

    def number(self, form: struct.Struct, what: str) -> Any:
        """One number; ``what`` names it in an error."""
        at = self._reach(form.size, what)
        (value,) = form.unpack_from(self._window, at)
        self.pos += form.size
        return value

    def numbers(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        """Several numbers packed by ``form``."""
        at = self._reach(form.size, what)
        self.pos += form.size
        return form.unpack_from(self._window, at)

    def take(self, count: int, what: str) -> bytes:
        """``count`` bytes."""
        at = self._reach(count, what)
        self.pos += count
        return self._window[at : at + count]

    def string(self, what: str, max_bytes: int) -> str:
        """A string of at most ``max_bytes`` bytes; one that is no UTF-8 is written ``\\xff``."""
        length = self.number(U64, what)
        if length > max_bytes:
            self.fail(f"{what}: string of {length} bytes at byte {self.pos}, more than {max_bytes}")
        # The format says UTF-8, its writers put in bytes of any kind. No replacement mark: what
        # differs in the file stays different.
        return self.take(length, what).decode(errors="backslashreplace")

    def skip(self, count: int, what: str) -> None:
        """Step over ``count`` bytes without reading them."""
        self._check(count, what)
        self.pos += count

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings, from one length to the next."""
        length_at = U64.unpack_from
        while count:
            pos = self._reach(U64.size, what)
            window = self._window
            last = len(window) - U64.size
            while count and pos <= last:
                pos += 8 + length_at(window, pos)[0]
                count -= 1
            self.skip(self._start + pos - self.pos, what)

    def _check(self, count: int, what: str) -> None:
        if count > self.left:
            if self.file.size > self._limit:
                self.fail(
                    f"{what}: the header goes on beyond byte {self._limit} (at most "
                    f"{MAX_HEADER_BYTES} bytes in all)"
                )
            self.fail(
                f"{what}: {count} bytes from byte {self.pos} on, the file has {self.file.size} "
                f"({TRUNCATED})"
            )

    def _reach(self, count: int, what: str) -> int:
        """Where in the window ``count`` bytes from here on begin, read if they are not there."""
        at = self.pos - self._start
        if at + count > len(self._window) or at < 0:
            self._check(count, what)
            size = min(max(count, WINDOW_BYTES), self.left)
            self._window = self.file.read(self.pos, size)
            self._start = self.pos
            return 0
        return at


def read_value(cursor: Cursor, key: str, quota: Quota) -> Scalar | GGUFArray:
    """The value of ``key``, that begins with its type."""
    what = f"key {key!r}"
    value_type = cursor.number(U32, what)
    if value_type == STRING:
        text = cursor.string(what, quota.text)
        quota.text -= len(text)
        return text
    if value_type == ARRAY:
        return _read_array(cursor, what, quota)
    if value_type not in NUMBERS:
        cursor.fail(f"{what}: unknown value type {value_type}")
    value: int | float = cursor.number(NUMBERS[value_type][1], what)
    if value_type != BOOL:
        return value
    if value > 1:
        cursor.fail(f"{what}: a bool of {value}, neither 0 nor 1")
    return value == 1


def _read_array(cursor: Cursor, what: str, quota: Quota) -> GGUFArray:
    element_type = cursor.number(U32, what)
    count = cursor.number(U64, what)
    offset = cursor.pos
    if element_type == STRING:
        name = "string"
        if count * U64.size > cursor.left:
            cursor.fail(f"{what}: array of {count} strings, {cursor.left} bytes are left")
        if count > quota.elements:
            cursor.fail(f"{what}: array of {count} strings, more than {MAX_WALKED} in all")
        quota.elements -= count
        cursor.skip_strings(count, what)
    elif element_type in NUMBERS:
        name, form = NUMBERS[element_type]
        cursor.skip(count * form.size, f"{what}: array of {count} {name}")
    elif element_type == ARRAY:
        cursor.fail(f"{what}: an array of arrays, which no reader of the format supports")
    else:
        cursor.fail(f"{what}: array of unknown element type {element_type}")
    return GGUFArray(name, count, offset, cursor.pos - offset, cursor.file.stamp)
