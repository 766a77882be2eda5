"""JSON schemas: read, bounded, and told where they are wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

MOST_NBYTES = 64 << 10
"""Of a schema as JSON."""
MOST_DEPTH = 200
"""Schemas one in the other, references followed: what compiles them goes down on the stack, and
at 450 it is at the end of the smallest that threads have (2 MiB), which nothing survives."""
MOST_PATTERNS = 4_096
"""Characters of all regular expressions of a schema."""
MOST_OPTIONAL = 500
"""Parts of regular expressions that may be left out or repeated: to compile n takes n * n steps."""
OPTIONAL = re.compile(r"[?*{]|\|[|)]|\(\|")
MOST_MULTIPLE = 50_000
"""The least common multiple of all numbers of ``multipleOf``, and MOST_STATES of them all: an
automaton counts so far."""
SPACES: dict[str, Any] = {"lenient": False, "item_separator": ",", "key_separator": ":"}
"""How documents are written. What llguidance does not know is an error, and never left out."""
MANY = ("$defs", "definitions", "properties", "patternProperties", "prefixItems", "anyOf",
        "oneOf", "allOf", "dependentSchemas")  # fmt: skip
ONE = ("items", "additionalProperties", "additionalItems", "not", "contains", "propertyNames",
       "if", "then", "else", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
TRIALS = 200
"""Parts of a schema that are looked at, to say where it is wrong."""

Pointer = str
"""Of a part of a schema: "" is the whole, "/items" a part of it."""


def read_schema(schema: str | Mapping[str, Any]) -> dict[str, Any]:
    """A schema as a dict; ValueError in one line for what is none, or is beyond a bound."""
    text = schema
    if not isinstance(schema, str):
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema: it cannot be written as JSON ({error})") from error
    assert isinstance(text, str)
    if len(text) > MOST_NBYTES:
        raise ValueError(f"schema: {len(text):,} characters, the most are {MOST_NBYTES:,}")
    try:
        document = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("schema: parts lie too deep in each other") from error
    except ValueError as error:
        raise ValueError(f"schema: it is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError("schema: must be a JSON object")
    check_bounds(document)
    return document


def check_bounds(document: dict[str, Any]) -> None:
    """ValueError for references out of the document, and for what would take too long to compile,
    or too much memory."""
    nodes = Nodes(document)
    if nodes.depth > MOST_DEPTH:
        raise ValueError(
            f"schema: with its references, {nodes.depth} schemas lie one in the other, the most "
            f"are {MOST_DEPTH}"
        )
    check_pattern("schema: patterns", "\n".join(nodes.patterns))
    multiple, total = math.lcm(*nodes.multiples), sum(nodes.multiples)
    if max(multiple, total // 4) > MOST_MULTIPLE:
        raise ValueError(
            f"schema: multipleOf: the least common multiple of all is {multiple:,}, their sum "
            f"{total:,}: the most are {MOST_MULTIPLE:,} and {4 * MOST_MULTIPLE:,}"
        )


def check_text(kind: str, text: object) -> None:
    """ValueError for what is no text, or has no bytes."""
    if not isinstance(text, str):
        raise ValueError(f"{kind}: must be a text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{kind}: character {error.start + 1} is half of a pair") from error


def check_pattern(kind: str, pattern: str, most: int = MOST_PATTERNS) -> None:
    """ValueError for regular expressions that would take too long to compile."""
    counts = {
        "characters": (len(pattern), most),
        "optional or repeated parts": (len(OPTIONAL.findall(pattern)), MOST_OPTIONAL),
    }
    for what, (count, limit) in counts.items():
        if count > limit:
            raise ValueError(f"{kind}: {count:,} {what}, the most are {limit:,}")


class Nodes:
    """The schemas that a schema is made of, by the identity of their dicts."""

    def __init__(self, document: dict[str, Any]) -> None:
        """ValueError for a reference that leads out of the document, or nowhere in it."""
        self.patterns: list[str] = []
        self.multiples: list[int] = []
        self._below: dict[int, list[int]] = {}
        waiting: list[tuple[Pointer, dict[str, Any]]] = [("", document)]
        while waiting:
            pointer, node = waiting.pop()
            if id(node) in self._below:
                continue
            if pointer and any(isinstance(node.get(key), str) for key in ("$id", "id")):
                # References below would begin there.
                raise ValueError(f"schema, at {pointer}: $id: only the whole schema may have one")
            parts = [(pointer + key, part) for key, part in parts_of(node)]
            if isinstance(node.get("$ref"), str):
                parts.append(refer(document, pointer, node["$ref"]))
            self._below[id(node)] = [id(part) for _, part in parts]
            waiting += parts
            self._note(pointer, node)

    def _note(self, pointer: Pointer, node: Mapping[str, Any]) -> None:
        if isinstance(node.get("pattern"), str):
            self.patterns.append(node["pattern"])
        if isinstance(node.get("patternProperties"), dict):
            self.patterns += node["patternProperties"]
        multiple = node.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            digits = "".join(map(str, Decimal(str(multiple)).as_tuple().digits)).rstrip("0")
            self.multiples.append(max(int(digits or "1"), 1))

    @property
    def depth(self) -> int:
        """The most schemas that lie one in the other, references followed; where they lead back,
        each that is on such a way counts once."""
        above = self._peel(self._below)
        inner = {node: set(below) - above.keys() for node, below in self._below.items()}
        rest = {node: below for node, below in inner.items() if node not in above}
        back: dict[int, list[int]] = {node: [] for node in rest}
        for node, below in rest.items():
            for part in below:
                back[part].append(node)
        ends = self._peel(back)
        core = len(rest) - len(ends)
        return max(above.values(), default=0) + core + max(ends.values(), default=0)

    @staticmethod
    def _peel(below: Mapping[int, list[int]]) -> dict[int, int]:
        """How deep what lies below a node is, itself counted; without those below which is one
        that they lie in."""
        over: dict[int, list[int]] = {node: [] for node in below}
        missing = {node: len(parts) for node, parts in below.items()}
        for node, parts in below.items():
            for part in parts:
                over[part].append(node)
        depths = {node: 1 for node, count in missing.items() if not count}
        ready = list(depths)
        while ready:
            part = ready.pop()
            for node in over[part]:
                missing[node] -= 1
                if not missing[node]:
                    depths[node] = 1 + max(depths[part] for part in below[node])
                    ready.append(node)
        return depths


def parts_of(node: Mapping[str, Any]) -> Iterator[tuple[Pointer, dict[str, Any]]]:
    """The schemas right in a schema, each with where it stands there. What is data (``const``,
    ``enum``) is none."""
    for key in MANY:
        value = node.get(key)
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"/{key}/{escape(i)}", part) for i, part in pairs if is_schema(part))
    for key in ONE:
        value = node.get(key)
        if isinstance(value, list):  # items, as older drafts have it
            yield from ((f"/{key}/{i}", part) for i, part in enumerate(value) if is_schema(part))
        elif is_schema(value):
            yield f"/{key}", value


def is_schema(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def escape(key: object) -> str:
    """A key in a pointer."""
    return str(key).replace("~", "~0").replace("/", "~1")


def refer(
    document: dict[str, Any], pointer: Pointer, reference: str
) -> tuple[Pointer, dict[str, Any]]:
    """What a reference leads to; ValueError for one that leads out of the document or nowhere."""
    where = f"schema, at {pointer or '/'}: $ref {reference!r}"
    if not reference.startswith("#"):
        raise ValueError(f"{where}: it leads out of the schema, where nothing is fetched from")
    found: Any = document
    for step in unquote(reference[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(f"{where}: it leads nowhere") from error
    if not is_schema(found) or (len(reference) > 1 and reference[1] != "/"):
        raise ValueError(f"{where}: it leads to no schema")
    return unquote(reference[1:]), found


def where_wrong(document: dict[str, Any], is_wrong: Callable[[dict[str, Any]], bool]) -> Pointer:
    """The smallest part of a schema that ``is_wrong``; the whole one is."""
    shared = {key: document[key] for key in ("$defs", "definitions") if key in document}
    place, waiting = "", list(parts_of(document))
    for _ in range(TRIALS if waiting else 0):
        key, part = waiting.pop(0)
        if is_wrong(shared | part):
            place, waiting = place + key, list(parts_of(part))
        if not waiting:
            break
    return place


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
