"""Constraints that are wrong, lead elsewhere or are too large are refused in a line, with where."""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from byte_model import END, VOCABULARY, byte_tokenizer
from documents import matcher_of, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.constraints.constraint import constraint_of
from layer_streamer.llm.constraints.grammar_text import MOST_RULES
from layer_streamer.llm.constraints.matcher import Matcher
from layer_streamer.llm.constraints.schema import MANY, MOST_DEPTH, ONE
from layer_streamer.llm.constraints.vocabulary import Vocabulary

FOO = {"type": "string", "format": "foo"}
LONG_A = "a" * 5_000


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(byte_tokenizer(), VOCABULARY, [END])


def refusal(vocabulary: Vocabulary, **asked: Any) -> str:
    """What is said, in one line."""
    with pytest.raises(ValueError) as caught:
        matcher_of(vocabulary, **asked)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "schema: it is no JSON (Expecting property name"),
        ("true", "schema: must be a JSON object"),
        ([1], "schema: must be a JSON object"),
        ({"a": {1, 2}}, "schema: it cannot be written as JSON"),
        ({"const": "\ud83d"}, "schema: "),
        ({"allOf": 3}, "schema, at /: "),
        ('{"minimum": Infinity}', "schema: it is no JSON (Infinity is no number of JSON)"),
        ({"type": "foo"}, "schema, at /: Invalid type: foo"),
        ({"properties": {"a/b": {"items": FOO}}},
         "schema, at /properties/a~1b/items: Unknown format: foo"),
        ({"$defs": {"x": FOO}, "anyOf": [{"$ref": "#/$defs/x"}]},
         "schema, at /$defs/x: Unknown format: foo"),
        ({"items": {"type": "string", "pattern": "a(b"}},
         "schema, at /items: 'a(b', character 2: unclosed group"),
        ({"type": "object", "not": {}}, 'schema, at /: Unimplemented keys: ["not"]'),
        ({"x-guidance": {"lenient": True}, "not": {}}, "schema, at /: Unimplemented keys"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "schema, at /: Unsatisfiable schema"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
         "schema: no text goes on from here"),
    ],
)  # fmt: skip
def test_a_schema_that_is_wrong_is_refused_with_its_place(
    schema: Any, message: str, vocabulary: Vocabulary
) -> None:
    assert refusal(vocabulary, schema=schema).startswith(message)


WORDS = (*MANY, *ONE, "type", "enum", "const", "pattern", "minLength", "maximum", "multipleOf",
         "required", "format", "$ref", "$schema", "$id", "x-guidance", "other")  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3), st.sampled_from(["string", "object", "array", "number", "#", "^[a-c]+$"]),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        VALUES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
        ),
        max_leaves=12,
    ).filter(lambda schema: schema is not None)
)
def test_whatever_a_schema_is_made_of_it_serves_or_is_refused_in_one_line(
    vocabulary: Vocabulary, schema: Any
) -> None:
    try:
        matcher = matcher_of(vocabulary, schema=schema)
        random_ids(matcher, VOCABULARY, 0, most=20)
    except ValueError as error:
        assert str(error).startswith("schema") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("https://example.com/a.json", "leads out of the schema"),
        ("http://127.0.0.1:8000/", "leads out of the schema"),
        ("file:///etc/passwd", "leads out of the schema"),
        ("other.json#/a", "leads out of the schema"),
        ("urn:a", "leads out of the schema"),
        ("//example.com", "leads out of the schema"),
        ("", "leads out of the schema"),
        ("#/$defs/none", "leads nowhere"),
        ("#/properties/a/enum/7", "leads nowhere"),
        ("#/properties/a/enum/0", "leads to no schema"),
        ("#anchor", "leads to no schema"),
    ],
)
def test_a_reference_that_leads_elsewhere_is_refused_before_anyone_follows_it(
    reference: str, message: str, vocabulary: Vocabulary
) -> None:
    schema = {
        "properties": {"a": {"enum": ["x"]}, "b": {"items": {"anyOf": [{"$ref": reference}]}}}
    }
    found = refusal(vocabulary, schema=schema)
    assert found.startswith(f"schema, at /properties/b/items/anyOf/0: $ref {reference!r}: it ")
    assert message in found
    assert message in refusal(vocabulary, grammar=f"start: %json {json.dumps(schema)}")


@pytest.mark.parametrize("key", ["$id", "id"])
def test_a_part_of_a_schema_has_no_references_of_its_own(key: str, vocabulary: Vocabulary) -> None:
    part = {key: "https://example.com/x", "$defs": {"a": {}}, "$ref": "#/$defs/a"}
    schema = {"$defs": {"a": {"type": "null"}}, "items": part}
    assert refusal(vocabulary, schema=schema).startswith("schema, at /items: $id: only the whole")
    hidden = {"other": {"x": part}, "$ref": "#/other/x"}
    assert refusal(vocabulary, schema=hidden).startswith("schema, at /other/x: $id: only the")
    named = {"$id": "https://example.com/x", "$defs": {"a": {"const": 7}}, "$ref": "#/$defs/a"}
    assert matcher_of(vocabulary, schema=named).forced() == [ord("7")]


def test_references_in_data_are_data(vocabulary: Vocabulary) -> None:
    value = {"$ref": "https://example.com"}
    ids = random_ids(matcher_of(vocabulary, schema={"const": value}), VOCABULARY, 0)
    assert json.loads(bytes(ids)) == value


def ladder(count: int, step: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Schemas of which each refers to the next one."""
    links = [{"$ref": f"#/$defs/{i + 1}"} for i in range(count)]
    defs = {str(i): step(link) for i, link in enumerate(links)} | {str(count): {"type": "null"}}
    return {"$defs": defs, "$ref": "#/$defs/0"}


STEPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "array": lambda link: {"type": "array", "items": link},
    "tuple": lambda link: {"type": "array", "prefixItems": [link], "minItems": 1},
    "object": lambda link: {"type": "object", "properties": {"a": link}, "required": ["a"]},
    "others": lambda link: {"type": "object", "additionalProperties": link},
    "patterns": lambda link: {"type": "object", "patternProperties": {"^a": link}},
    "any": lambda link: {"anyOf": [{"type": "null"}, link]},
    "all": lambda link: {"allOf": [link, {"type": "null"}]},
    "beside": lambda link: link | {"title": "one", "type": "null"},
    "mixed": lambda link: {
        "anyOf": [{"allOf": [{"type": "object", "properties": {"a": link}}]}, {"type": "null"}]
    },
}


def on_the_smallest_stack(task: Callable[[], object]) -> None:
    """Run it in a thread with 2 MiB; what raises there fails."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert not errors, errors


@pytest.mark.parametrize("name", STEPS)
def test_the_deepest_schema_that_is_let_in_leaves_room_on_the_smallest_stack(
    name: str, vocabulary: Vocabulary
) -> None:
    """What compiles them goes down on the stack, and its end would be the process's."""

    def compile_them() -> None:
        for count in range(20, 2 * MOST_DEPTH, 20):
            try:
                matcher_of(vocabulary, schema=ladder(count, STEPS[name]))
            except ValueError as error:
                if "lie one in the other" in str(error):
                    assert count > 20
                    return
        raise AssertionError("all are let in")

    on_the_smallest_stack(compile_them)


@pytest.mark.parametrize(
    ("rule", "separator"),
    [
        ('r{i}{is_}"(" r{j} ")"\n', "::="),
        ('r{i}{is_}("z" r{j} | "x" (("y" | r{j})*))+\n', "::="),
        ('r{i}{is_}("z" r{j} | "x" (("y" | r{j})*))+\n', ":"),
        ('r{i}{is_}("(" r{j}) | "x"\n', ":"),
        ('R{i}{is_}"(" (R{j} | "x") ")"\n', ":"),
    ],
)
def test_the_deepest_grammar_that_is_let_in_leaves_room_on_the_smallest_stack(
    rule: str, separator: str, vocabulary: Vocabulary
) -> None:
    root = "root ::= r0\n" if separator == "::=" else f"start: {rule[0]}0\n"
    count = MOST_RULES - 6
    ladders = [rule.format(i=i, j=i + 1, is_=f" {separator} ") for i in range(count)]
    deep = json.dumps(ladder(MOST_DEPTH // 2 - 1, STEPS["object"]))
    last = '::= "a"' if separator == "::=" else f": %json {deep}"
    last = ': "a"' if rule[0] == "R" else last
    grammar = root + "".join(ladders) + f"{rule[0]}{count} {last}\n"
    on_the_smallest_stack(lambda: matcher_of(vocabulary, grammar=grammar))


def test_a_schema_that_refers_to_itself_is_as_deep_as_what_is_on_its_ways(
    vocabulary: Vocabulary,
) -> None:
    ring = ladder(50, STEPS["any"])
    ring["$defs"]["50"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/0"}]}
    assert matcher_of(vocabulary, schema=ring).forced() == list(b"null")
    ring = ladder(120, STEPS["any"])
    ring["$defs"]["120"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/0"}]}
    assert "lie one in the other" in refusal(vocabulary, schema=ring)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"items":' * 100_000, "schema: 900,000 characters, the most are 65,536"),
        ('{"items":' * 5_000 + "{}" + "}" * 5_000, "schema: parts lie too deep in each other"),
        ({"enum": ["x" * 66_000]}, "schema: 66,014 characters, the most are 65,536"),
        ({"pattern": LONG_A}, "schema: patterns: 5,000 characters, the most are 4,096"),
        (
            {"patternProperties": {"^" + "\\w?" * 700: {}}},
            "schema: patterns: 700 optional or repeated",
        ),
        ({"multipleOf": 99_991}, "schema: multipleOf: the least common multiple of all is 99,991"),
        ({"multipleOf": 0.0099991}, "schema: multipleOf"),
        ({"allOf": [{"multipleOf": 9_973}, {"multipleOf": 9_967}]}, "schema: multipleOf"),
    ],
)
def test_a_schema_that_would_take_too_long_is_refused_at_once(
    schema: Any, message: str, vocabulary: Vocabulary
) -> None:
    assert refusal(vocabulary, schema=schema).startswith(message)


@pytest.mark.parametrize("value", [1, 10**18, 1e300, 0.25, 0.01, 5e-7, 0, -3, True])
def test_multiples_that_cost_little_are_not_refused_for_it(
    value: float, vocabulary: Vocabulary
) -> None:
    try:
        matcher_of(vocabulary, schema={"type": "number", "multipleOf": value})
    except ValueError as error:  # of llguidance's own
        assert "schema: multipleOf" not in str(error)


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        (3, "regex: must be a text, not int"),
        ("a\ud83d", "regex: character 2 is half of a pair"),
        ("a(b", "regex: 'a(b', character 2: unclosed group"),
        ("(?=a)b", "regex: '(?=a)b', character 1: look-around"),
        (LONG_A, "regex: 5,000 characters, the most are 4,096"),
        ("a?" * 501, "regex: 501 optional or repeated parts, the most are 500"),
        ("(a|)" * 501, "regex: 501 optional or repeated parts, the most are 500"),
    ],
)
def test_a_regex_that_is_wrong_or_too_large_is_refused(
    regex: Any, message: str, vocabulary: Vocabulary
) -> None:
    assert refusal(vocabulary, regex=regex).startswith(message)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (b"start: x", "grammar: must be a text, not bytes"),
        ("", "grammar: no start rule found"),
        ('start: "a"\n  b\n', "grammar: line "),
        ('start: "a" <|nowhere|>', "grammar: line 1, column 8: unknown special token"),
        ('start: %json {"type": "foo"}', "grammar: line 1, column 8: failed to compile JSON"),
        ("start: %json {'type'}", "grammar: line 1: %json without a schema"),
        ('{"grammars": [{"json_schema": {"type": "null"}}]}', "grammar: line 1, column 1: "),
        ('root ::= ("a"\n', "grammar: line 2, column 1: Expected ')'"),
        ('root ::= "a" |\n"b"\nc ::= @', "grammar: line 3, column 7: Expected"),
        ('root ::= "a" foo', "grammar: Rule 'foo' not found"),
        ('foo ::= "a"', "grammar: No 'root' rule found"),
        ("root ::= a-b\n\na-b ::= [z-a]", "grammar: rule A_B: '[z-a]', character 2: invalid"),
        ('root ::= "\\uD83D"', "grammar: \\uD83D is no character"),
        ('root ::= "\\\n"', "grammar: line 1, column 12: Invalid escape sequence"),
        ('root ::= "\ud83d"', "grammar: character 11 is half of a pair"),
        ("start: " + "x? " * 300 + "\nx: /a/", None),
        ("start: " + '"abc" ' * 3_000, "grammar: 18,007 characters, the most are 16,384"),
        ("".join(f"r{i}: r{i + 1}\n" for i in range(257)), "grammar: 257 rules, the most are 256"),
        ("".join(f"r{i} ::= r{i + 1}\n" for i in range(257)), "grammar: 257 rules, the most"),
        ("root ::= " + "(" * 1_001, "grammar: 1,001 brackets, the most are 1,000"),
        ("root ::= " + "(" * 900 + '"a"' + ")" * 900, "grammar: brackets lie too deep"),
        ("start: %json {}\n" * 17, "grammar: 17 schemas, the most are 16"),
    ],
)
def test_a_grammar_that_is_wrong_or_too_large_is_refused_with_its_place(
    grammar: Any, message: str | None, vocabulary: Vocabulary
) -> None:
    if message is None:
        assert matcher_of(vocabulary, grammar=grammar).allowed().any()
    else:
        assert refusal(vocabulary, grammar=grammar).startswith(message)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (r'root ::= "\u0041\u00e9\x42" "\U0001F600"', "Aé\x42\U0001f600"),
        (r'root ::= [\u0042-\u0042] "\""', 'B"'),
        ('start ::= "x"\nroot ::= begin\nbegin ::= "ab"', None),
        ('root ::= begin\nbegin ::= "a:b" # start: x\n', "a:b"),
        ('start: "a ::= b"', "a ::= b"),
        ('%llguidance {}\nstart: foo\nfoo: "x ::= y"', "x ::= y"),
    ],
)
def test_gbnf_is_told_from_lark_by_how_its_rules_are_written(
    grammar: str, text: str | None, vocabulary: Vocabulary
) -> None:
    if text is None:
        assert "already exists" in refusal(vocabulary, grammar=grammar)
    else:
        assert bytes(matcher_of(vocabulary, grammar=grammar).forced()).decode() == text


def test_a_constraint_that_grows_too_large_ends_its_row_in_one_line(
    vocabulary: Vocabulary,
) -> None:
    schema = {"type": "string", "pattern": "^(ab?|b[cd])*$", "minLength": 50_000}
    with pytest.raises(ValueError, match=r"^schema: it cannot be followed any further \(.*\)$"):
        random_ids(matcher_of(vocabulary, schema=schema), VOCABULARY, 0)


def test_one_constraint_is_taken_not_several() -> None:
    with pytest.raises(ValueError, match="schema and regex: one of them, not several"):
        constraint_of(schema={}, regex="a")
    assert constraint_of() is None


def test_without_llguidance_an_error_says_which_extra_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "llguidance":
            raise ImportError("No module named 'llguidance'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"\(pip install 'layer-streamer\[serve\]'\)"):
        constraint_of(regex="a")


def test_a_model_that_ends_no_text_cannot_be_held_to_an_empty_one() -> None:
    endless = Vocabulary(byte_tokenizer(), VOCABULARY)
    assert "no text is like that, but perhaps an empty one" in refusal(endless, regex="")
    constraint = constraint_of(regex="")
    assert constraint is not None
    ending = Matcher.of(constraint, Vocabulary(byte_tokenizer(), VOCABULARY, [END]))
    assert ending.allowed()[END] and ending.allowed().sum() == 1
