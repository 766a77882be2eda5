"""What clients may send: the bodies of requests, by OpenAI's names.

A field that is null counts as absent. Unknown ones are ignored; those that are known, would change
the answer, and are not served, are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 16
Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _some(count: int) -> int:
    if count == 0:
        raise ValueError("must be at least 1, or -1 for as many as there is room for")
    return count


Count = Annotated[int, Field(ge=-1), AfterValidator(_some)]
"""Tokens of an answer; clients of llama.cpp and LM Studio send -1."""


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="ignore")
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not served, each with the values that ask for nothing."""
    model: str | None = None
    """Of a server that has one model, which answers to any name."""
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _loudly(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, harmless in cls.REFUSED.items():
                value = data.get(name)
                if value is not None and value not in harmless:
                    raise ValueError(f"{name}: is not served here")
        return data


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool | None = None


OTHER_NAMES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""What llama.cpp calls fields that have other names here."""


class Sampled(Body):
    """What chats and plain completions share."""

    n_predict: Count | None = None
    repeat_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None
    grammar: Text | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_grammar: Text | None = None
    structured_outputs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_one_of_both_names(self) -> Sampled:
        for other, name in OTHER_NAMES.items():
            if (value := getattr(self, other)) is None:
                continue
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{other}: is another number than {name}")
            setattr(self, name, value)
        return self

    @model_validator(mode="after")
    def _biases_are_of_tokens(self) -> Sampled:
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) <= 18):
                raise ValueError(f"logit_bias: {key[:40]!r} is no token id")
        return self


class Part(Body):
    """A part of a content. Only text can be read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; what else it has goes to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Text
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: must be there, or tool_calls in its place")
        return self


class Function(Body):
    """What a tool is."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """One that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The function of a :class:`NamedTool`."""

    name: Text


class NamedTool(Body):
    """A ``tool_choice`` of one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema of a ``response_format``."""

    name: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: must be there with type json_schema")
        return self


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],), "function_call": ("none",), "audio": (), "modalities": (["text"],),
        "web_search_options": (), "chat_template": (), "best_of": (1,), "echo": (False,),
    }  # fmt: skip
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_completion_tokens: is another number than max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: belongs to logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        if isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                raise ValueError("tool_choice: names none of the tools")
        elif self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: there are no tools")
        return self


class CompletionBody(Sampled):
    """POST /v1/completions."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": ("",), "echo": (False,), "best_of": (1,),
    }  # fmt: skip
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"dimensions": ()}
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or messages."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"with_pieces": (False,)}
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special: bool | None = None
    """Put what the tokenizer itself puts before a text."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizeBody:
        if (self.content is None) == (self.messages is None):
            raise ValueError("content: either that or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[Token]
