"""What clients may send: accepted, ignored, or refused by name, and what it asks of the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from layer_streamer.llm.serving.api_error import ApiError, of_validation
from layer_streamer.llm.serving.asking.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    TokenizeBody,
)
from layer_streamer.llm.serving.asking.order import inputs_of, order_of_chat, order_of_completion

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def chat(**fields: Any) -> Any:
    """The order of a chat with these fields; raises ApiError."""
    sent = {"messages": [USER]} | fields
    try:
        return order_of_chat(ChatBody.model_validate(sent))
    except ValidationError as error:
        raise of_validation(error, sent) from error


def completion(**fields: Any) -> Any:
    """That of a plain completion."""
    sent = {"prompt": "Hi"} | fields
    try:
        return order_of_completion(CompletionBody.model_validate(sent))
    except ValidationError as error:
        raise of_validation(error, sent) from error


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [USER, {"role": "user", "content": 3}]}, "messages[1].content",
         "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0].type", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -2}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools[0].function.name", "invalid_value"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs",
         "invalid_value"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs", "invalid_value"),
        ({"tools": [TOOL], "guided_regex": "a"}, "tools", "invalid_value"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_name_of_the_field(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    error = caught.value.body["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]}, {"audio": {}}, {"modalities": ["audio"]},
        {"chat_template": "{{ 1 }}"}, {"max_tokens": 3, "max_completion_tokens": 4},
        {"top_logprobs": 2}, {"tool_choice": "required"}, {"tools": [TOOL, TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"-1": 1}},
        {"grammar": "a", "guided_regex": "b"}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "grammar": "root ::= 'a'"},
    ],
)  # fmt: skip
def test_what_is_not_served_or_does_not_fit_together_is_refused_loudly(
    fields: dict[str, Any],
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and str(caught.value).split(":")[0].split(".")[0] in fields


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"echo": True}, {"best_of": 2}])
def test_what_plain_completions_do_not_serve_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(fields))):
        completion(**fields)


def test_what_clients_send_beside_it_is_ignored() -> None:
    sent = {
        "store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto",
        "parallel_tool_calls": True, "model": "gpt-4o", "x-unknown": [1], "functions": None,
        "audio": None, "modalities": ["text"], "temperature": None, "n": None, "stop": None,
    }  # fmt: skip
    assert chat(**sent) == chat()


def test_both_names_of_the_limit_are_one() -> None:
    assert chat(max_tokens=7) == chat(max_completion_tokens=7)
    assert chat(max_tokens=7, max_completion_tokens=7).options["max_new_tokens"] == 7
    assert chat().options["max_new_tokens"] == 1024
    assert completion().options["max_new_tokens"] == 16


@pytest.mark.parametrize("order", [chat, completion])
def test_llama_cpps_names_of_fields_are_taken(order: Any) -> None:
    assert order(n_predict=7, repeat_penalty=1.5) == order(max_tokens=7, repetition_penalty=1.5)
    assert order(n_predict=-1) == order(max_tokens=-1)
    assert order(n_predict=7, max_tokens=7) == order(max_tokens=7)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_predict": 7, "max_tokens": 8}, {"n_predict": 0}, {"n_predict": "7"},
        {"repeat_penalty": 1.5, "repetition_penalty": 1.2}, {"repeat_penalty": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [chat, completion])
def test_two_names_with_two_values_and_wrong_ones_are_refused_by_llama_cpps_name(
    order: Any, fields: dict[str, Any]
) -> None:
    with pytest.raises(ApiError) as caught:
        order(**fields)
    assert (caught.value.status, caught.value.param) == (400, next(iter(fields)))


def test_what_llama_cpp_calls_no_limit_and_the_likeliest_alone_is_taken() -> None:
    for order in (chat(max_tokens=-1), completion(max_tokens=-1), chat(max_completion_tokens=-1)):
        assert order.options["max_new_tokens"] > 1 << 30  # the engine has its own limit
    assert 0 < chat(top_p=0).options["top_p"] < 1e-6


def test_options_reach_the_engine_by_its_names() -> None:
    order = chat(
        temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=-3, stop="x", n=2, logprobs=True,
        top_logprobs=3, presence_penalty=1, frequency_penalty=-1.5, repetition_penalty=1.1,
        logit_bias={"12": -100}, ignore_eos=True,
    )  # fmt: skip
    assert order.options == {
        "max_new_tokens": 1024, "temperature": 0.0, "top_p": 0.5, "top_k": 0, "min_p": 0.1,
        "seed": -3, "stop": ["x"], "presence_penalty": 1.0, "frequency_penalty": -1.5,
        "repetition_penalty": 1.1, "logit_bias": {12: -100.0}, "logprobs": True,
        "top_logprobs": 3,
    }  # fmt: skip
    assert (order.n, order.count, order.ignore_eos) == (2, 2, True)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True,
          "schema": {"type": "array"}}}}, {"schema": {"type": "array"}}),
        ({"guided_json": {"type": "null"}}, {"schema": {"type": "null"}}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"guided_grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ],
)  # fmt: skip
def test_constraints_have_one_name_each_for_the_engine(
    fields: dict[str, Any], constraint: dict[str, Any]
) -> None:
    options = chat(**fields).options
    assert {k: v for k, v in options.items() if k in ("schema", "regex", "grammar")} == constraint


def test_tools_go_to_the_template_and_a_required_choice_constrains_the_text() -> None:
    auto = chat(tools=[TOOL])
    assert auto.template_options["tools"][0]["function"]["name"] == "find"
    assert not auto.forced and "schema" not in auto.options
    named = {"type": "function", "function": {"name": "find"}}
    forced = chat(tools=[TOOL], tool_choice=named)
    assert forced.forced and forced.options["schema"]["properties"]["name"] == {"const": "find"}
    assert chat(tools=[TOOL], tool_choice="required").options["schema"]["type"] == "array"
    single = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert single.options["schema"]["type"] == "object"
    none = chat(tools=[TOOL], tool_choice="none")
    assert not none.tools and "tools" not in none.template_options


def test_messages_reach_the_template_as_templates_know_them() -> None:
    call = {"id": "c", "type": "function",
            "function": {"name": "find", "arguments": '{"a": [1]}'}}  # fmt: skip
    ((first, second, third),) = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief"}]},
            {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ]
    ).prompts
    assert first == {"role": "system", "content": [{"type": "text", "text": "Be brief"}]}
    assert second["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    assert second["content"] == "" and second["reasoning_content"] == "hm"
    assert third == {"role": "tool", "tool_call_id": "c", "content": "3"}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_a_plain_prompt_is_text_or_ids_or_a_list_of_such(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt, n=3).prompts == prompts
    assert completion(prompt=prompt, n=3).count == 3 * len(prompts)
    assert inputs_of(EmbeddingsBody.model_validate({"input": prompt})) == prompts


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", 1], [1, "a"], [-1], None, 3, [[1], []]])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError, match=r"^prompt"):
        completion(prompt=prompt)


def test_tokenize_takes_a_text_or_messages_and_detokenize_ids() -> None:
    assert TokenizeBody.model_validate({"content": ""}).content == ""
    for sent in ({}, {"content": "a", "messages": [USER]}):
        with pytest.raises(ValidationError):
            TokenizeBody.model_validate(sent)
    with pytest.raises(ValidationError):
        DetokenizeBody.model_validate({"tokens": [-1]})


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(ChatBody.model_fields)), value=ANYTHING)
def test_whatever_a_field_holds_it_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    try:
        chat(**{name: value})
    except ApiError as error:
        assert error.status == 400 and "\n" not in str(error)
        json.dumps(error.body)
