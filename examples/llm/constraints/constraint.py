"""What a text is to be like: read and bounded, but of no tokenizer yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .grammar_text import as_lark
from .library import llguidance
from .schema import SPACES, check_pattern, check_text, read_schema

Schema: TypeAlias = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One of the three. What it says is compiled, and errors in it are told, by
    :class:`.vocabulary.Vocabulary`; ValueErrors here are of bounds and form, in one line."""

    kind: str
    """"schema", "regex" or "grammar"."""
    text: str
    """As llguidance takes it."""
    document: dict[str, Any] | None = field(default=None, compare=False)
    """Of a schema."""
    is_gbnf: bool = False
    """The grammar was written so."""

    @classmethod
    def of_schema(cls, schema: Schema, *, spaces: bool = False) -> Constraint:
        """A JSON document that a JSON schema describes, without a space between its parts; with
        ``spaces``: with those that the model likes."""
        return cls.of_document(read_schema(schema), spaces=spaces)

    @classmethod
    def of_document(cls, document: dict[str, Any], *, spaces: bool = False) -> Constraint:
        """Likewise, of a schema that has been read."""
        convert = llguidance().LLMatcher.grammar_from_json_schema
        options = SPACES | {"whitespace_flexible": spaces}
        try:  # as text: it takes no integers beyond 64 bits from Python
            text: str = convert(json.dumps(document), overrides=options)
        except ValueError as error:
            raise ValueError(f"schema: {' '.join(str(error).split())}") from error
        return cls("schema", text, document)

    @classmethod
    def of_regex(cls, regex: str) -> Constraint:
        """A text that a regular expression matches from end to end, in the syntax of Rust's regex
        crate: without look-around, without references to groups."""
        check_text("regex", regex)
        check_pattern("regex", regex)
        text: str = llguidance().LLMatcher.grammar_from_regex(regex)
        return cls("regex", text)

    @classmethod
    def of_grammar(cls, grammar: str) -> Constraint:
        """A text of a context-free grammar: in llguidance's Lark, whose first rule is ``start``, or
        in GBNF, whose first rule is ``root``."""
        lark, is_gbnf = as_lark(grammar)
        return cls.of_lark(lark, is_gbnf=is_gbnf)

    @classmethod
    def of_lark(cls, lark: str, *, is_gbnf: bool = False) -> Constraint:
        """Likewise, of a grammar that is known to be within bounds."""
        # Bare, one that begins with a brace would be taken for this form, which knows no bounds.
        text = json.dumps({"grammars": [{"lark_grammar": lark}]})
        return cls("grammar", text, is_gbnf=is_gbnf)


def constraint_of(
    schema: Schema | None = None, regex: str | None = None, grammar: str | None = None
) -> Constraint | None:
    """The one that is named; None if none is. ValueError for more than one, and those of
    :class:`Constraint`; ImportError names the extra that brings llguidance."""
    named = {"schema": schema, "regex": regex, "grammar": grammar}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: one of them, not several")
    if schema is not None:
        return Constraint.of_schema(schema)
    if regex is not None:
        return Constraint.of_regex(regex)
    return None if grammar is None else Constraint.of_grammar(grammar)
