"""The tokens of an engine, as llguidance knows them: made once, and slow to make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import is_panic
from .constraint import Constraint
from .library import limits, llguidance

PROBE = 'a {"b": [1, "\u00e9 \u6f22"]}\n'
END = "<|end of a constrained text|>"
"""A token that no model has: where it may follow, a text may end."""

Allowed: TypeAlias = npt.NDArray[np.bool_]


class Vocabulary:
    """Tokens by their bytes, and those that end a text. Thread rules: any number of threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Iterable[int] = ()) -> None:
        """``tokenizer``: transformers', if the package tokenizers computes it, or DirectTokenizer.
        ``vocab_size``: the model's; an id that the tokenizer lacks is never allowed. ``stop_ids``
        end a text.

        ValueError in one line for a tokenizer of which the bytes of tokens are not known;
        ImportError names the extra that brings llguidance. 50,000 tokens take a second.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "to_str"):
            raise ValueError(_refused(f"it is a {type(tokenizer).__name__}"))
        self.size = vocab_size
        """The model's."""
        self._tokens, self._end = _read(backend, vocab_size)
        self.most = min(self._end, vocab_size)
        """Ids below may follow."""
        self.stops = sorted({i for i in stop_ids if 0 <= i < self.most})
        """Those that end a text."""
        _check_bytes(backend, self._tokens)

    def automaton(self, constraint: Constraint) -> Any:
        """llguidance's, of a constraint; it may be in error."""
        return llguidance().LLMatcher(self._tokens, constraint.text, log_level=0, limits=limits())

    def spelled(self, token: int) -> bytes:
        """The bytes of a token; nothing of one that the tokenizer lacks."""
        known = 0 <= token < self.most
        return bytes(self._tokens.decode_bytes([token])) if known else b""

    def cut(self, text: bytes) -> list[int]:
        """Its tokens."""
        found: list[int] = self._tokens.tokenize_bytes(text)
        return found

    def special(self, text: str) -> int | None:
        """The special token that is written so, if there is one: no grammar means it by text."""
        found = self.cut(text.encode())
        return found[0] if len(found) == 1 and self._tokens.is_special_token(found[0]) else None

    def allowed(self, automaton: Any) -> tuple[Allowed, bool]:
        """Which tokens may go on with a text, (size,), and whether it may end. Of an automaton that
        is then in error, neither: what leads nowhere offers an end, too."""
        bits = np.frombuffer(automaton.compute_bitmask(), dtype=np.uint8)
        count = max(self.size, self._end + 1)
        found = np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)
        may_end = bool(found[self._end])
        found[self._end :] = False
        return found[: self.size], may_end


def _read(backend: Any, vocab_size: int) -> tuple[Any, int]:
    """llguidance's tokenizer, and the id of END, behind all others."""
    from tokenizers import Tokenizer

    lib = llguidance()
    try:
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([END])
        end = copy.token_to_id(END)
        assert end is not None
        size = max(vocab_size, end + 1)
        return lib.LLTokenizer(copy.to_str(), n_vocab=size, eos_token=[end]), end
    except BaseException as error:  # of two packages that are written in Rust, and may panic
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError(_refused(" ".join(str(error).split()))) from error


def _check_bytes(backend: Any, tokens: Any) -> None:
    """ValueError unless llguidance finds the bytes of a text in its tokens."""
    ids = backend.encode(PROBE, add_special_tokens=False).ids
    text = bytes(tokens.decode_bytes(ids)).decode("utf-8", "replace")
    if text.removeprefix(" ") != PROBE:
        raise ValueError(_refused(f"{PROBE!r} is read as {text!r}"))


def _refused(why: str) -> str:
    return f"text of this model's tokenizer cannot be constrained ({why})"
