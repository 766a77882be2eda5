"""A tiny model that always says the same: each token of its text follows from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from assets import tiny_checkpoint, tiny_model
from byte_model import byte_tokenizer
from tokenizers import AddedToken

HIDDEN = 288


def chain_model(
    directory: Path, template: str, pieces: Sequence[str], special: Sequence[str] = ()
) -> Path:
    """A Qwen2 whose answer is these pieces, a token each, of which the last ends it; ``special``:
    what of them and of the template are special tokens. Prompts end in the template's last byte,
    which is in none of the pieces' places."""
    tokenizer = byte_tokenizer()
    added = [*dict.fromkeys([*special, *pieces])]
    tokenizer.add_tokens([AddedToken(one, special=one in special, normalized=False)
                          for one in added])  # fmt: skip
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids([*pieces])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    model = tiny_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32,
        eos_token_id=ids[-1], tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(len(tokenizer), HIDDEN))
        for before, after in pairwise([prompt[-1], *ids]):
            model.lm_head.weight[after, before] = 1.0
    tiny_checkpoint(directory, model)
    tokenizer.save_pretrained(directory)
    return directory
