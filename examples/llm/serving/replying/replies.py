"""The shapes of replies: whole ones, and the chunks of a stream."""

from __future__ import annotations

import struct
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from layer_streamer import __version__

from ...reading.choice_text import Delta
from ...reading.families import new_call_id
from ..working.pieces import Account, ScoredToken

Json = dict[str, Any]
FINGERPRINT = f"layer-streamer-{__version__}"
"""Of what makes the texts: one seed gives one text as long as it is the same."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all documents of one reply have in common."""

    kind: str
    """"chat.completion" or "text_completion"."""
    model: str
    family: str = "generic"
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        object.__setattr__(self, "id", self.id or f"{prefix}-{token_hex(12)}")

    @property
    def is_chat(self) -> bool:
        """False: a plain completion."""
        return self.kind == "chat.completion"

    def document(self, choices: Sequence[Json], **more: Any) -> Json:
        """A whole reply."""
        return self._document(self.kind, choices, more)

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """One of a stream."""
        kind = f"{self.kind}.chunk" if self.is_chat else self.kind
        return self._document(kind, choices, more)

    def _document(self, kind: str, choices: Sequence[Json], more: Json) -> Json:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": FINGERPRINT, "choices": list(choices), **more,
        }  # fmt: skip

    def calls(self, delta: Delta, first: int | None = None) -> list[Json]:
        """Its calls; in a stream they have numbers, from ``first`` on."""
        found: list[Json] = []
        for number, call in enumerate(delta.calls):
            shape: Json = {} if first is None else {"index": first + number}
            shape |= {
                "id": new_call_id(self.family),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            found.append(shape)
        return found


def message(envelope: Envelope, whole: Delta) -> Json:
    """A whole answer in a chat."""
    found: Json = {"role": "assistant", "content": whole.answer, "refusal": None}
    if whole.reasoning:
        found["reasoning_content"] = whole.reasoning
    if whole.calls:
        found |= {"content": whole.answer or None, "tool_calls": envelope.calls(whole)}
    return found


def delta_message(envelope: Envelope, delta: Delta, calls_before: int) -> Json:
    """What more there is of one."""
    found: Json = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.answer:
        found["content"] = delta.answer
    if delta.calls:
        found["tool_calls"] = envelope.calls(delta, calls_before)
    return found


def chat_logprobs(scored: Iterable[ScoredToken]) -> Json:
    """Of a chat's choice."""
    return {
        "content": [
            _scored(token) | {"top_logprobs": [_scored(one) for one in token.top]}
            for token in scored
        ],
        "refusal": None,
    }


def _scored(token: ScoredToken) -> Json:
    return {"token": token.text, "logprob": token.finite, "bytes": list(token.bytes)}


def plain_logprobs(scored: Iterable[ScoredToken], offset: int = 0) -> Json:
    """Of a plain completion's choice; ``offset``: characters of the text before these tokens."""
    found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in scored:
        found["tokens"].append(token.text)
        found["token_logprobs"].append(token.finite)
        found["top_logprobs"].append({one.text: one.finite for one in token.top})
        found["text_offset"].append(offset)
        offset += len(token.text)
    return found


def usage(accounts: Sequence[Account], n: int = 1) -> Json:
    """What texts have taken together; ``n`` of them share each prompt, which counts once."""
    prompts = accounts[:: max(n, 1)]
    prompt = sum(account.prompt_tokens for account in prompts)
    new = sum(account.new_tokens for account in accounts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached_tokens for a in prompts)},
    }


def timings(accounts: Sequence[Account]) -> Json:
    """How long it took, by llama.cpp's names: of texts that were made side by side, the longest;
    and in how many passes."""
    prompt_s = max((account.prompt_seconds for account in accounts), default=0.0)
    decode_s = max((account.decode_seconds for account in accounts), default=0.0)
    cached = sum(account.cached_tokens for account in accounts)
    read = sum(account.prompt_tokens for account in accounts) - cached
    new = sum(account.new_tokens for account in accounts)
    later = new - len(accounts)
    """The first token of each came with its prompt."""
    return {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": prompt_s * 1e3,
        "prompt_per_token_ms": prompt_s * 1e3 / read if read else 0.0,
        "prompt_per_second": read / prompt_s if prompt_s else 0.0,
        "predicted_n": new,
        "predicted_ms": decode_s * 1e3,
        "predicted_per_token_ms": decode_s * 1e3 / later if later > 0 else 0.0,
        "predicted_per_second": later / decode_s if decode_s else 0.0,
        "passes": max((account.passes for account in accounts), default=0),
        "draft_n": sum(account.drafted for account in accounts),
        "draft_n_accepted": sum(account.agreed for account in accounts),
    }


def embeddings_document(
    model: str, vectors: Sequence[Sequence[float]], tokens: int, *, packed: bool
) -> Json:
    """POST /v1/embeddings; ``packed``: as base64 of little-endian float32, which OpenAI's client
    asks for."""
    found = [
        {
            "object": "embedding",
            "index": index,
            "embedding": b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            if packed
            else list(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": found, "model": model, "usage": used}


def models(name: str, created: int, **more: Any) -> Json:
    """GET /v1/models."""
    one = {"id": name, "object": "model", "created": created, "owned_by": "layer-streamer", **more}
    return {"object": "list", "data": [one]}
