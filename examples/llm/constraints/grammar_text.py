"""Context-free grammars as people write them, to Lark; bounded."""

from __future__ import annotations

import json
import re
from typing import Any

from .library import llguidance
from .schema import MOST_NBYTES, check_bounds, check_pattern, check_text

MOST_CHARACTERS = 16 << 10
"""Of a grammar, the schemas in it not counted."""
MOST_RULES = 256
MOST_SCHEMAS = 16
MOST_GROUPS = 1_000
"""Of brackets. What compiles rules goes down on the stack: at 640 rules one in the other, or at
2,000 brackets in 400 of them, it is at the end of the smallest that threads have (2 MiB)."""
GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
SCHEMA = re.compile(r"%json\s*(?=\{)")
ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)


def as_lark(grammar: str) -> tuple[str, bool]:
    """A grammar in Lark, and whether it was written in GBNF: that is one with a rule that is
    written ``name ::=``. ValueError in one line for what is beyond a bound, or cannot be read."""
    check_text("grammar", grammar)
    is_gbnf = GBNF.search(grammar) is not None
    rest = grammar if is_gbnf else _without_schemas(grammar[: MOST_NBYTES + 1])
    counts = {
        "characters with its schemas": (len(grammar), MOST_NBYTES),
        "schemas": (len(SCHEMA.findall(grammar)), MOST_SCHEMAS),
        "rules": (rest.count("::=" if is_gbnf else ":"), MOST_RULES),
        "brackets": (rest.count("(") + rest.count("["), MOST_GROUPS),
    }
    for what, (count, most) in counts.items():
        if count > most:
            raise ValueError(f"grammar: {count:,} {what}, the most are {most:,}")
    check_pattern("grammar", rest, MOST_CHARACTERS)
    return (_of_gbnf(grammar) if is_gbnf else grammar), is_gbnf


def _of_gbnf(grammar: str) -> str:
    llguidance()
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(ESCAPED.sub(_plain, grammar)))
    except RecursionError as error:
        raise ValueError("grammar: brackets lie too deep in each other") from error
    except GbnfToLarkError as error:
        line = error.pos.text.count("\n", 0, error.pos.pos) + 1
        column = error.pos.pos - error.pos.text.rfind("\n", 0, error.pos.pos)
        reason = " ".join(str(error).partition(" at line ")[0].split())
        raise ValueError(f"grammar: line {line}, column {column}: {reason}") from error
    except Exception as error:  # it raises nothing narrower
        raise ValueError(f"grammar: {' '.join(str(error).split())}") from error


def _plain(escaped: re.Match[str]) -> str:
    """A character by its number, as what Lark reads: llguidance's converter loses zeros before."""
    if escaped[3] is not None:
        return escaped[0]
    code = int(escaped[1] or escaped[2], 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"{escaped[0]} is no character")
    return f"\\x{code:02X}" if code < 0x80 else chr(code)


def _without_schemas(grammar: str) -> str:
    """A grammar without the JSON schemas that stand in it, which are within their own bounds."""
    decoder, rest, at = json.JSONDecoder(), list[str](), 0
    for found in SCHEMA.finditer(grammar):
        if found.start() < at:
            continue
        try:
            document: Any
            document, end = decoder.raw_decode(grammar, found.end())
        except (ValueError, RecursionError) as error:
            line = grammar.count("\n", 0, found.start()) + 1
            raise ValueError(f"grammar: line {line}: %json without a schema ({error})") from error
        check_bounds(document)
        rest.append(grammar[at : found.end()])
        at = end
    return "".join([*rest, grammar[at:]])
