"""A tiny model with a tokenizer of bytes, which loads in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assets import tiny_checkpoint, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<quick>{% endif %}{% endif %}"
)
START, END = 256, 257
VOCABULARY = 258
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def byte_tokenizer() -> Any:
    """Ids 0 to 255 are bytes; two more mark a message."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


def byte_model(directory: Path, **changes: Any) -> Path:
    """A Qwen2 of three layers that ends no text by itself."""
    options = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32}
    model = tiny_model("qwen2", **(options | {"eos_token_id": None} | changes))
    tiny_checkpoint(directory, model)
    byte_tokenizer().save_pretrained(directory)
    return directory
