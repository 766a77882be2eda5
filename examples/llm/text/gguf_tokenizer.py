"""The tokenizer that a GGUF file's metadata describes, with the token ids that llama.cpp gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .pre_tokenizers import DEFAULT, PRE_TOKENIZERS, REFUSED, PreTokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens that are found in a text before it is cut into words."""
ROLES = ("bos", "eos", "unknown", "padding")
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
"""Where a file does not say, by tokenizer.ggml.model."""
SPACE = "\u2581"


def pre_tokenizer(metadata: Mapping[str, Any]) -> tuple[PreTokenizer, str | None]:
    """How a file's byte-level tokenizer cuts words, and what to tell of it. ValueError for a way
    that is not known here."""
    name = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return PreTokenizer(()), None
    if not name:
        return DEFAULT, (
            "the file names no tokenizer.ggml.pre: words are cut by llama.cpp's default rule, "
            "perhaps not as the model has learned them"
        )
    if name in REFUSED:
        raise ValueError(f"tokenizer.ggml.pre {name!r}: this way to cut words is not supported")
    if name not in PRE_TOKENIZERS:
        return DEFAULT, (
            f"tokenizer.ggml.pre {name!r} is unknown: words are cut by llama.cpp's default rule, "
            "perhaps not as the model has learned them"
        )
    return PRE_TOKENIZERS[name], None


def added_ids(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a text to be continued begins with BOS, and ends with EOS."""
    model = metadata.get("tokenizer.ggml.model")
    bos = model in ("llama", "bert") or pre_tokenizer(metadata)[0].adds_bos
    eos = model == "t5"
    return (
        bool(metadata.get("tokenizer.ggml.add_bos_token", bos)),
        bool(metadata.get("tokenizer.ggml.add_eos_token", eos)),
    )


def gguf_tokenizer(metadata: Mapping[str, Any], other: Callable[[], Any]) -> Any:
    """A tokenizer of transformers.

    ``other()`` builds those that are not byte-level, through transformers. Errors: those of
    tokenizers, and ValueError for a way to cut words that is not known.
    """
    from tokenizers import decoders, normalizers
    from tokenizers.pre_tokenizers import Metaspace

    model = str(metadata["tokenizer.ggml.model"])
    backend = _byte_level(metadata) if model == "gpt2" else other().backend_tokenizer
    if model == "llama" and isinstance(backend.pre_tokenizer, Metaspace):
        # A space before the text, and after each special token, whether one is there or not.
        spaces: list[Any] = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        if metadata.get("tokenizer.ggml.add_space_prefix") is False:
            del spaces[0]
            backend.decoder = decoders.Sequence(
                [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), None
    return _wrapped(backend, metadata)


def _byte_level(metadata: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    rule, _ = pre_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"].load()
    # The first letter of the left part may be a space.
    cuts = [(merge, merge.find(" ", 1)) for merge in metadata["tokenizer.ggml.merges"].load()]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[(merge[:at], merge[at + 1 :]) for merge, at in cuts],
        ignore_merges=rule.takes_whole_words,
    )
    backend = Tokenizer(model)
    splits = [Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    backend.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type")
    for token, kind in zip(tokens, kinds.load() if kinds is not None else (), strict=False):
        if token and kind in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(token, normalized=False)])
        elif token and kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _wrapped(backend: Any, metadata: Mapping[str, Any]) -> Any:
    """transformers' tokenizer around one of tokenizers, with what surrounds a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    defaults = DEFAULT_IDS.get(str(metadata["tokenizer.ggml.model"]), {})
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ROLES}
    ids = {role: defaults.get(role) if i is None else int(i) for role, i in ids.items()}
    named = {role: backend.id_to_token(i) for role, i in ids.items() if i is not None}
    adds_bos, adds_eos = added_ids(metadata)
    around = [named.get("bos") if adds_bos else None, "$A", named.get("eos") if adds_eos else None]
    specials = [(named[role], ids[role]) for role in ("bos", "eos") if named.get(role)]
    backend.post_processor = TemplateProcessing(
        single=[part for part in around if part],
        pair=[*(part for part in around if part), "$B"],
        special_tokens=specials,
    )
    names = zip(("bos_token", "eos_token", "unk_token", "pad_token"), ROLES, strict=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: named.get(role) for name, role in names},
    )
