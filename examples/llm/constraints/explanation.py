"""What is wrong with a constraint, and where."""

from __future__ import annotations

import json
from typing import Any

from .constraint import Constraint
from .library import told
from .schema import where_wrong
from .vocabulary import Vocabulary


def explain(constraint: Constraint, vocabulary: Vocabulary, message: str) -> str:
    """llguidance's message in one line, with the place: of a schema the smallest part that is wrong
    in that way, of a grammar line and column, or the rule."""
    document = constraint.document
    if document is not None:

        def judged(part: Any) -> str:
            return _first(fault(Constraint.of_document(part), vocabulary))

        place = where_wrong(document, lambda part: judged(part) == _first(message))
        return f"schema, at {place or '/'}: {told(message)}"
    lark: str | None = None
    if constraint.kind == "grammar":
        lark = json.loads(constraint.text)["grammars"][0]["lark_grammar"]
    return f"{constraint.kind}: {told(message, lark=lark, is_gbnf=constraint.is_gbnf)}"


def fault(constraint: Constraint, vocabulary: Vocabulary) -> str:
    """llguidance's message of a constraint that it does not compile; "" if it does."""
    automaton = vocabulary.automaton(constraint)
    return str(automaton.get_error()) if automaton.is_error() else ""


def _first(message: str) -> str:
    return message.partition("\n")[0]
