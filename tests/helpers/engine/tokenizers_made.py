"""Small real tokenizers of every type that models come with."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|turn|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
SPACE = "\u2581"


def byte_fallback(*, strips: bool = True) -> Any:
    """As LLaMA 2 has it; without ``strips`` as Gemma: what the vocabulary lacks is spelled in
    bytes."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *LETTERS, SPACE * 2]:
        vocab[token] = len(vocab)
    model = models.BPE(
        vocab, [(SPACE, SPACE)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = spaces
    made.decoder = decoders.Sequence(steps)
    return _wrapped(made)


def byte_level() -> Any:
    """As GPT-2 has it, with a token that ends inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    emoji = split.pre_tokenize_str("\U0001f600")[0][0]
    vocab[emoji[:2]] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [(emoji[0], emoji[1])]))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    return _wrapped(made)


def unigram() -> Any:
    """As T5 has it, with bytes for what the vocabulary lacks."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *LETTERS, f"{SPACE}the"]
    made = Tokenizer(models.Unigram([(t, -float(i)) for i, t in enumerate(tokens)], 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE)])
    return _wrapped(made)


def word_piece() -> Any:
    """As BERT has it; what the vocabulary lacks has no text."""
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "hello", "##ing"]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return _wrapped(made)


KINDS = {
    "byte fallback": byte_fallback,
    "byte fallback that strips nothing": lambda: byte_fallback(strips=False),
    "byte level": byte_level,
    "unigram": unigram,
    "word piece": word_piece,
}


def _wrapped(made: Tokenizer) -> Any:
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
