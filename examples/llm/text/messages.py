"""Messages of a chat, as OpenAI's API writes them, for chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CALLS = ("tool_calls", "function_call")
"""What a message may have instead of a content."""


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages, each of which has a role, and a content that is text or a list of parts that
    are text, or calls of tools and perhaps no content. ValueError, in one line, for another."""
    found = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {number} ({_short(message)}): must have a role and a content"
            )
        content = message.get("content")
        if content is None and not any(message.get(name) for name in CALLS):
            raise ValueError(f"message {number} ({_short(message)}): must have a content")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            content = [_checked(part, number) for part in content]
        elif content is not None and not isinstance(content, str):
            raise ValueError(
                f"message {number}: content of type {type(content).__name__}: must be text, or a "
                'list of parts such as {"type": "text", "text": ...}'
            )
        found.append({**message, "content": content} if "content" in message else dict(message))
    return found


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a checked message; its parts follow one another as they are."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def takes_parts(tokenizer: Any) -> bool:
    """True if a chat template writes the texts of a content that is a list of parts. Most write
    such a list in Python's notation, or raise."""
    word = "probe"
    messages = [{"role": "user", "content": [{"type": "text", "text": word}]}]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program, and may raise what it likes
        return False
    return word in rendered and f"'{word}'" not in rendered and f'"{word}"' not in rendered


def _checked(part: Any, number: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise ValueError(f"message {number}: a part of type {kind!r}: only text can be read")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"message {number}: a part of type 'text' without a text")
    return dict(part)


def _short(message: Any) -> str:
    shown = ascii(message)  # of one line, whatever is in it
    return shown if len(shown) <= 80 else shown[:77] + "..."
