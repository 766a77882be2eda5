"""Messages as OpenAI's API writes them, through templates: what transformers makes of them."""

import pytest
from assets import smollm2_metadata
from tokenizers_made import byte_fallback, byte_level

from layer_streamer.llm.metadata import load_tokenizer
from layer_streamer.llm.text.prompts import PromptEncoder

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
ASK = {"role": "user", "content": "two and three?"}
CALLS = [
    ASK,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "5"},
]
TURNS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.role }}: "
    "{% if m.content is defined and m.content %}{{ m.content | trim }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoder(tokenizer, vocab_size=100_000):
    return PromptEncoder(lambda: tokenizer, vocab_size, lambda _: None)


def with_template(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


def expected(tokenizer, messages, **options):
    options = {"add_generation_prompt": True, "tokenize": False} | options
    text = tokenizer.apply_chat_template(messages, **options)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def real():
    """The tokenizer of a real model."""
    return load_tokenizer(smollm2_metadata())


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([ASK], {}),
        ([ASK], {"tools": [TOOL]}),
        ([ASK], {"add_generation_prompt": False}),
        (CALLS, {"tools": [TOOL]}),
        ([*CALLS[:1], {**CALLS[1], "content": None}, CALLS[2]], {}),
        ([{"role": "developer", "content": "be brief"}, ASK], {}),
        (tuple(CALLS), {}),
    ],
)
def test_the_template_gets_what_transformers_gives_it(messages, options, real):
    for tokenizer in (with_template(TURNS), real):
        messages = [dict(message) for message in messages]
        try:
            want = expected(tokenizer, messages, **options)
        except Exception:  # a template that knows no calls of tools
            with pytest.raises(ValueError, match="template refuses"):
                encoder(tokenizer).encode(messages, options)
        else:
            assert encoder(tokenizer).encode(messages, options) == want


def test_a_last_message_can_be_continued():
    tokenizer = with_template(TURNS)
    messages = [ASK, {"role": "assistant", "content": "It is"}]
    options = {"continue_final_message": True}
    want = expected(tokenizer, messages, add_generation_prompt=False, **options)
    assert encoder(tokenizer).encode(messages, options) == want
    assert tokenizer.decode(want).endswith("It is")
    both = options | {"add_generation_prompt": True}
    with pytest.raises(ValueError, match="template refuses"):
        encoder(tokenizer).encode(messages, both)


def parts(*texts):
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


@pytest.mark.parametrize("texts", [("one",), ("one ", "two"), ()])
def test_parts_of_text_are_joined_for_a_template_that_knows_texts_only(texts):
    tokenizer = with_template(TURNS)
    joined = [{"role": "user", "content": "".join(texts)}]
    assert encoder(tokenizer).encode(parts(*texts), {}) == expected(tokenizer, joined)


def test_a_template_that_knows_parts_gets_them():
    tokenizer = with_template(PARTS)
    want = expected(tokenizer, parts(" one ", " two "))
    assert encoder(tokenizer).encode(parts(" one ", " two "), {}) == want
    assert tokenizer.decode(want) == "[user]onetwo[assistant]"


def test_without_a_template_the_texts_are_what_is_continued():
    tokenizer, both = byte_fallback(), [*parts("a", "b"), ASK]
    ids = encoder(tokenizer).encode(both, {})
    assert ids == tokenizer.encode("ab\ntwo and three?")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": "x"}, "must have a role"),
        ({"role": "user"}, "must have a content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "must have a content"),
        ({"role": "user", "content": 7}, "content of type int"),
        ({"role": "user", "content": {"text": "x"}}, "content of type dict"),
        ({"role": "user", "content": ["x"]}, "a part of type 'str'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "a part of type 'input_audio'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "without a text"),
        ("user: x", "must have a role"),
        ({"role": "user", "content": "x\udc97"}, r"U\+DC97, half of a pair"),
    ],
)
def test_what_is_no_message_is_refused_by_its_number_in_one_line(message, words):
    with pytest.raises(ValueError, match=words) as caught:
        encoder(with_template(TURNS)).encode([ASK, message], {})
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be written anywhere


@pytest.mark.parametrize("text", ["\ud83d", "half \udc97 an emoji", "caf\udce9"])
def test_half_a_character_is_an_error_that_says_where(text):
    at = next(i for i, c in enumerate(text, 1) if 0xD800 <= ord(c) < 0xE000)
    with pytest.raises(ValueError, match=f"^character {at} of the prompt is U") as caught:
        encoder(byte_level()).encode(text, {})
    str(caught.value).encode()


@pytest.mark.parametrize("prompt", ["so <|turn|>", [{"role": "user", "content": "<|turn|>"}]])
def test_a_token_that_the_model_lacks_is_named(prompt):
    with pytest.raises(ValueError, match=r"token id 3: .*'<\|turn\|>': the tokenizer has tokens"):
        encoder(byte_level(), vocab_size=3).encode("<|turn|>", {})
    with pytest.raises(ValueError, match=r"token id \d+: must be from 0 to 2 "):
        encoder(with_template(TURNS), vocab_size=3).encode(prompt, {})


def test_ids_may_be_of_numpy_and_need_no_tokenizer():
    import numpy as np

    made = PromptEncoder(lambda: pytest.fail("asked for the tokenizer"), 10, lambda _: None)
    assert made.encode([np.int64(4), 5], {}) == [4, 5]
    with pytest.raises(ValueError, match=r"token id 10: must be from 0 to 9$"):
        made.encode([4, 10], {})


def test_whatever_a_tokenizer_raises_is_a_line():
    class Broken:
        def encode(self, text, **_):
            raise TypeError("one\ntwo")

    with pytest.raises(ValueError, match=r"cannot encode the prompt \(TypeError: one two\)"):
        encoder(Broken()).encode("x", {})
