"""What is learned of a row: the assistant's words as the template writes them, and their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers_made import byte_level
from torch import nn
from transformers import Qwen2Config

from layer_streamer.llm.finetuning.room import LEAST, step_nbytes
from layer_streamer.llm.finetuning.rows import Row, read_rows
from layer_streamer.llm.finetuning.samples import UNSAID, Sample, encode_rows
from layer_streamer.llm.finetuning.settings import Settings
from layer_streamer.llm.finetuning.training import Batches, hold_out, linear_modules

PLAIN = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
FORGETS = PLAIN.replace(
    "m['content']", "m['content'] if loop.last or m['role'] == 'user' else '...'"
)
"""As templates do that leave out what a model thought in earlier turns."""
CHAT = [
    {"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"},
    {"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"},
]  # fmt: skip
PATH = Path("rows.jsonl")


def tokenizer(template: str | None = PLAIN) -> Any:
    made = byte_level()
    made.chat_template = template
    return made


def samples(content: Any, template: str | None = PLAIN, length: int = 200) -> list[Sample]:
    return encode_rows(tokenizer(template), [Row(1, content)], PATH, length).samples


def said(sample: Sample) -> str:
    """What of a sample is learned."""
    return str(tokenizer().decode([label for label in sample.labels if label != UNSAID]))


def test_of_a_chat_all_that_the_assistant_says_is_learned_with_its_ends() -> None:
    (sample,) = samples({"messages": CHAT})
    assert said(sample) == "one</s>two</s>"
    made = tokenizer()
    text = made.apply_chat_template(CHAT, tokenize=False)
    assert sample.ids == made.encode(text, add_special_tokens=False)


def test_what_a_template_writes_otherwise_later_is_not_learned() -> None:
    (sample,) = samples({"messages": CHAT}, FORGETS)
    assert said(sample) == "two</s>"
    assert str(tokenizer().decode(sample.ids)).count("...") == 1


def test_of_a_text_all_is_learned_behind_its_begin_and_that_it_ends() -> None:
    (sample,) = samples({"text": "abc"})
    assert said(sample) == "abc</s>" and sample.labels[0] == UNSAID


def test_of_a_prompt_and_its_completion_the_latter_is_learned() -> None:
    (sample,) = samples({"prompt": "ab", "completion": " cd"})
    assert said(sample) == " cd</s>"
    assert str(tokenizer().decode(sample.ids)) == "<s>ab cd</s>"


def test_a_row_that_is_too_long_is_cut_and_one_without_anything_left_is_told() -> None:
    rows = [Row(3, {"prompt": "a" * 30, "completion": "b"}), Row(7, {"text": "c" * 30})]
    found = encode_rows(tokenizer(), rows, PATH, 10)
    assert (found.longer, found.unlearned, len(found.samples)) == (2, [3], 1)
    assert said(found.samples[0]) == "c" * 9
    with pytest.raises(ValueError, match=r"rows\.jsonl: nothing of it can be learned within 10"):
        encode_rows(tokenizer(), rows[:1], PATH, 10)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "line 1: is a chat, and the model's tokenizer has no chat template"),
        ("{{ raise_exception('no such role') }}", "line 1: .*no such role"),
        ("{{ messages | length }}", "does not show where an answer begins and ends"),
    ],
)
def test_a_chat_that_no_template_can_write_is_named_by_its_line(
    template: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}|{message}"):
        samples({"messages": CHAT}, template)


def test_blank_lines_are_no_rows_and_a_file_of_them_has_none(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n \n{"text": "b"}')
    assert [row.line for row in read_rows(path)] == [1, 4]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(path)


def test_rows_of_a_batch_are_padded_by_what_is_not_looked_at() -> None:
    batch = Batches(9)([Sample([1, 2, 3], [UNSAID, 2, 3]), Sample([4], [UNSAID])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[UNSAID, 2, 3], [UNSAID] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_what_is_held_out_is_drawn_by_the_seed_and_learned_by_nobody() -> None:
    every = [Sample([n], [n]) for n in range(20)]
    learned, held_out = hold_out(every, 0.2, 3)
    assert (learned, held_out) == hold_out(every, 0.2, 3) != hold_out(every, 0.2, 4)
    assert len(held_out) == 4 and sorted(learned + held_out) == every


class Tiny(nn.Module):
    """A head, and experts that are linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.lm_head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_adapters_stand_beside_all_linear_modules_but_the_head_and_experts() -> None:
    assert linear_modules(Tiny()) == ["q_proj"]


def test_room_for_a_step_grows_with_rows_tokens_and_ranks() -> None:
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064
    )
    one = step_nbytes(config, Settings(), 2048)
    assert 3 << 30 < one < 4 << 30
    assert one < step_nbytes(config, Settings(batch=2), 2048) < 2 * one
    assert one < step_nbytes(config, Settings(), 4096)
    assert one < step_nbytes(config, Settings(rank=32), 2048)
    assert step_nbytes(object(), Settings(), 2048) == LEAST
