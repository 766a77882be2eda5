"""An engine's texts are as asked, with what has to follow drafted and without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import smollm2
from byte_model import END, VOCABULARY, byte_model, byte_tokenizer
from documents import SCHEMAS, an_object, check_document, matcher_of
from small_engine import CHOICES, PROMPTS, drafted, make_engine

from layer_streamer.llm.constraints.vocabulary import Vocabulary
from layer_streamer.llm.drafts.drafting import GRAMMAR
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text.tokenizer import BROKEN

DRAWN = {"temperature": 1.0, "seed": 5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}
BOUNDED = [name for name in SCHEMAS if name not in ("numbers", "more properties")]
"""Those of which no part goes on for ever; of others random weights write 0.3333."""
PERSON = an_object(name={"type": "string", "maxLength": 4}, unit={"enum": ["celsius", "kelvin"]})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path, max_length=256, kv_tokens=1024) as made:
        yield made


def undrafted(engine: StreamingEngine, *args: Any, **options: Any) -> Any:
    """What the engine gives where nothing is drafted."""
    drafting, engine.scheduler.drafting = engine.scheduler.drafting, None
    try:
        return engine.generate(*args, **options)
    finally:
        engine.scheduler.drafting = drafting


@pytest.mark.parametrize("choice", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", BOUNDED)
def test_every_document_is_as_its_schema_says(
    name: str, choice: dict[str, Any], engine: StreamingEngine
) -> None:
    text = engine.generate("a", schema=SCHEMAS[name], max_new_tokens=200, **choice)
    check_document(text, SCHEMAS[name])


@pytest.mark.parametrize("choice", ["greedy", "sampled and punished"])
def test_the_text_with_what_is_forced_drafted_is_the_one_without(
    choice: str, engine: StreamingEngine
) -> None:
    options = CHOICES[choice] | {"schema": PERSON, "max_new_tokens": 60, "return_details": True}
    plain = undrafted(engine, ["a", "bc"], **options)
    found = engine.generate(["a", "bc"], **options)
    for one, other in zip(found, plain, strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, "stop")
        assert other.passes == len(other.ids) and not other.drafts
        # All that is drafted is right; behind the end of a text nothing counts.
        counted = one.drafts[GRAMMAR]
        assert counted.agreed >= max(10, counted.tokens - 1)
        assert one.passes + one.agreed == len(one.ids)


def wrong(rest: Sequence[int], most: int) -> list[int]:
    return [(token + 1) % 200 for token in rest[:most]]


def right_then_wrong(rest: Sequence[int], most: int) -> list[int]:
    return [*rest[:2], 65, *rest[3:]][:most]


@pytest.mark.parametrize(("how", "choice"), [(wrong, "greedy"), (right_then_wrong, "sampled")])
def test_drafts_of_others_change_no_constrained_text(
    how: Callable[[Any, int], Any], choice: str, path: Path
) -> None:
    options = CHOICES[choice] | {"regex": "[a-f]{3}(xyz|12)[g-k]{4}[ -~]{9}", "max_new_tokens": 24}
    with make_engine(path) as made:
        plain = undrafted(made, PROMPTS, return_details=True, **options)
        script = drafted(made, plain, how, **options)
    assert script.judged and all(done.finish_reason == "stop" for done in plain)


def test_a_text_that_is_cut_short_is_the_beginning_of_one(engine: StreamingEngine) -> None:
    known = Vocabulary(byte_tokenizer(), VOCABULARY)
    whole = engine.generate("a", schema=PERSON, return_details=True)
    for most in [*range(1, len(whole.ids), 4), len(whole.ids), 100]:
        cut = engine.generate("a", schema=PERSON, max_new_tokens=most, return_details=True)
        assert cut.ids == whole.ids[:most] and whole.text.startswith(cut.text.rstrip(BROKEN))
        assert cut.finish_reason == ("length" if most < len(whole.ids) else "stop")
        matcher = matcher_of(known, schema=PERSON)
        for token in cut.ids:
            matcher.accept(token)


@pytest.mark.parametrize(
    ("options", "most"), [({}, 8), ({"max_batch": 3}, 3), ({"lookup": True}, 72)]
)
def test_drafts_stay_within_the_logits_that_the_plan_has_room_for(
    options: dict[str, Any], most: int, path: Path
) -> None:
    with make_engine(path, max_length=128, **options) as made:
        counts, forward = list[int](), made._runner.forward

        def counting(entries: Any, *, drafts: Any, **others: Any) -> torch.Tensor:
            counts.append(len(entries) + sum(map(len, drafts)))
            return forward(entries, drafts=drafts, **others)

        made._runner.forward = counting  # type: ignore[method-assign]
        text = made.generate("a", schema=SCHEMAS["const"], max_new_tokens=100)
        check_document(text, SCHEMAS["const"])
        assert max(counts) <= most and max(counts) >= min(most, 45)


def test_what_is_forced_is_drafted_with_keys_and_values_in_eight_bits_too(path: Path) -> None:
    with make_engine(path, max_length=128, kv="host", kv_int8=True) as made:
        done = made.generate("a", schema=SCHEMAS["const"], return_details=True)
    check_document(done.text, SCHEMAS["const"])
    assert done.agreed > 9


@pytest.mark.parametrize("choice", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_model_that_ends_texts_ends_one_only_where_it_may(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    path = byte_model(tmp_path, eos_token_id=END)
    with make_engine(path) as made:
        prompts = [f"{i}" for i in range(8)]
        found = made.generate(
            prompts, regex="(ab?){2}c*", max_new_tokens=40, return_details=True, **choice
        )
    for done in found:
        assert re.fullmatch("(ab?){2}c*", done.text)
        assert END not in done.ids[:-1]


def test_a_constraint_that_is_wrong_is_told_and_ends_nothing_that_runs(
    engine: StreamingEngine,
) -> None:
    pieces = engine.generate("a", regex="[ab]{6}", stream=True)
    first = next(pieces)
    for options in ({"schema": {"type": "foo"}}, {"regex": "("}, {"regex": "a", "grammar": "b"}):
        with pytest.raises(ValueError, match=r"^(schema, at /|regex|regex and grammar): .*$"):
            engine.generate("a", **options)
    assert re.fullmatch("[ab]{6}", first + "".join(pieces))


def test_a_stop_string_ends_a_constrained_text_before_its_own_end(engine: StreamingEngine) -> None:
    text = engine.generate("a", schema=SCHEMAS["const"], stop='weather"')
    assert text == '{"name":"get_'


def test_prompts_of_a_list_are_held_each_by_itself(engine: StreamingEngine) -> None:
    together = engine.generate(["a", "bcd", "e"], schema=PERSON, **CHOICES["sampled"])
    alone = [
        engine.generate(prompt, schema=PERSON, **(CHOICES["sampled"] | {"seed": 3 + i}))
        for i, prompt in enumerate(["a", "bcd", "e"])
    ]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested", "enums", "const", "any of"])
def test_a_real_model_writes_documents_in_fewer_passes(name: str) -> None:
    schema = SCHEMAS[name]
    with StreamingEngine(smollm2(), device="cpu", max_length=512) as made:
        question = [{"role": "user", "content": f"Write JSON for: {json.dumps(schema)}"}]
        done = made.generate(question, schema=schema, max_new_tokens=200, return_details=True)
    check_document(done.text, schema)
    assert done.passes < len(done.ids)
