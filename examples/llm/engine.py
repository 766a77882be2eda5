"""StreamingEngine: text in, text out, with a model that streams through bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layer_streamer import LayerStreamer

from .errors import PromptTooLongError
from .kv.rows import Row
from .memory.plan import MemoryPlan, Wishes
from .models.config import id_set
from .opening import Limits, Model, open_runner, place, plan_memory
from .scheduler import Event, Request, Scheduler
from .text.completion import Asked, Completion, in_order
from .text.prompts import Prompt, PromptEncoder, is_batch
from .text.sampling import Sampler, default_sampling, merge_options
from .text.stopping import TextStream

logger = logging.getLogger(__name__)


class StreamingEngine:
    """A language model whose layers stream, with its tokenizer, its cache and its memory plan.

    Construction plans the memory, refuses what cannot fit, and opens the streamer; leaving the
    ``with`` block returns everything. Thread rules: one thread at a time. On a CPU, torch's threads
    of this process leave the streamer a core, unless OMP_NUM_THREADS says how many there are.

    ``model_path`` is a safetensors directory, a GGUF file, or a repository on the Hugging Face hub,
    which is downloaded (:mod:`.hub`). Options:

    * ``max_length``: the most tokens of one row, prompt and text (4096, or the model's context
      if that is shorter).
    * ``kv``: "device" and "host" say where keys and values live; "auto": on the device while
      its budget lasts. ``kv_int8``: those in host memory in eight bits.
    * ``kv_tokens``: tokens of all rows together (``max_length``); ``max_batch``: rows at a time.
    * ``prefill_chunk``: tokens that go through a layer at a time (2048; less if memory is
      short).
    * ``device_budget``, ``host_budget``: of streamer and engine together.
    * ``notify`` hears of what takes seconds or is not as expected.
    * ``streamer_options``: those of ``LayerStreamer.from_checkpoint``, such as the tuner prints;
      ``reserve_bytes`` is the caller's part of ``device_budget``.

    Errors: ValueError, in one line, for the model, an option, or a budget that is too small.
    """

    def __init__(  # noqa: PLR0913 - every option by name
        self,
        model_path: str | Path | Model,
        *,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        kv: str = "auto",
        kv_int8: bool = False,
        kv_tokens: int | None = None,
        max_batch: int = 8,
        prefill_chunk: int | None = None,
        notify: Callable[[str], None] = logger.info,
        **streamer_options: Any,
    ) -> None:
        """Plan, and open; the options are above."""
        limits = Limits(
            max_length=max_length, kv_tokens=kv_tokens, max_batch=max_batch, kv_int8=kv_int8
        )
        reserve = streamer_options.pop("reserve_bytes", 0)
        if not isinstance(model_path, Model):
            pattern = streamer_options.pop("layer_pattern", None)
            model_path = Model.read(model_path, notify, pattern)
        self.model: Model = model_path
        self.config = self.model.config
        self.max_length = limits.length(self.config)
        options, dtype = place(self.model, device, dtype, streamer_options)
        wishes = Wishes(
            kv=kv,
            prefill_chunk=prefill_chunk,
            device_budget=device_budget,
            host_budget=host_budget,
            reserve_bytes=reserve,
            options=options,
        )
        plan, needs = plan_memory(self.model, limits, wishes, dtype)
        self.plan: MemoryPlan = plan
        """Where everything is, and the bytes that it takes."""
        self._notify = notify
        self._encoder = PromptEncoder(lambda: self.tokenizer, self.config.vocab_size, notify)
        self._defaults = default_sampling(self.model.generation_config())
        self._kept: tuple[Row, list[int]] | None = None
        self._current: Generator[Event] | None = None
        self._runner = open_runner(self.model, plan, needs)

    @property
    def streamer(self) -> LayerStreamer:
        """The streamer of the model's layers; ``last_pass`` says where the time went, of the last
        pass that was not captured (``plan.captures``)."""
        return self._runner.streamer

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first needed."""
        return self.model.tokenizer

    def generate(  # noqa: PLR0913 - every option by name
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        stream: bool = False,
        return_details: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reuse_prefix: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continue a text, answer messages, or continue token ids; or several of them in a list.

        One prompt gives its text, a list gives a list. ``return_details``: a Completion instead of
        a text. ``stream``: an iterator of pieces of text, for a list of (row, piece); none cuts a
        character or shows anything of a stop string. An iterator that is left early ends its
        generation, and so does a newer call.

        * ``stop``: strings that end the text and are no part of it.
        * ``sampling``: temperature (0: greedy), top_k, top_p, min_p, repetition_penalty; what is
          not named is what the model's generation_config says, else greedy.
        * ``seed``: the same seed gives the same text; row i of a list takes seed + i.
        * ``chat_template_kwargs``: what the model's template knows, such as enable_thinking.
        * ``reuse_prefix``: for one prompt: start from what it has in common with the last such
          prompt and its text, whose keys and values are kept until a call without it.

        ValueError, in one line, for a prompt that is too long or an option that makes no sense.
        """
        if stream and return_details:
            raise ValueError("return_details=True: not together with stream=True")
        several = is_batch(prompt)
        if several and reuse_prefix:
            raise ValueError("reuse_prefix=True: takes one prompt, not a list")
        prompts: Any = prompt if several else [prompt]
        events = self.events(
            [self.encode(item, chat_template_kwargs) for item in prompts],
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            reuse_prefix=reuse_prefix,
            **sampling,
        )
        if stream:
            pairs = ((request.index, piece) for request, piece in events if piece)
            return pairs if several else (piece for _, piece in pairs)
        found = list(in_order(events))
        results = found if return_details else [self._text(done) for done in found]
        return results if several else results[0]

    def events(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        on_layer: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """What :meth:`generate` is made of: every pass's (request, piece of text), row by row.

        ``prompts`` are token ids, taken one by one as rows come free, so that there may be any
        number; ``on_layer(layer_idx)`` hears of the first pass's layers. The other options are
        ``generate``'s, but for those that shape its result.
        """
        asked = self._asked(options)
        self._end_current()
        requests = self._requests(prompts, asked)
        row = None
        if asked.reuse_prefix:
            first = next(requests)
            row, requests = self._reuse(first.prompt_ids), iter([first])
        else:
            self._forget()
        stop_ids = self._stop_ids()
        scheduler = Scheduler(self._runner, requests, stop_ids, row=row, on_layer=on_layer)
        events = self._current = scheduler.run()
        return self._guard(events)

    def encode(
        self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a prompt; ValueError if it is malformed, empty or too long."""
        ids = self._encoder.encode(prompt, chat_template_kwargs or {})
        if len(ids) >= self.max_length:
            context, length = self.config.max_positions, self.max_length
            limit = f"the model's context is {context}"
            if length < context:
                limit = f"max_length={length} ({limit}): grant more"
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens, {limit}")
        return ids

    def close(self) -> None:
        """End what is being generated and return all memory. Idempotent."""
        self._end_current()
        self._runner.streamer.close()
        self._runner.close()
        self._runner.kv.close()

    def __enter__(self) -> StreamingEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _asked(self, options: Mapping[str, Any]) -> Asked:
        own = ("max_new_tokens", "stop", "seed", "reuse_prefix")
        given = {name: options[name] for name in own if name in options}
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        rest = {name: value for name, value in options.items() if name not in own}
        return Asked(sampling=merge_options(self._defaults, rest), **given)

    def _requests(self, prompts: Iterable[Sequence[int]], asked: Asked) -> Iterator[Request]:
        noted = False
        for index, ids in enumerate(prompts):
            room = self.max_length - len(ids)
            if room < asked.max_new_tokens and not noted:
                noted = True
                self._notify(f"the context has room for {room} new tokens")
            count = min(room, asked.max_new_tokens)
            seed = None if asked.seed is None else asked.seed + index
            sampler = Sampler(asked.sampling, seed=seed)
            sampler.see(ids, self.config.vocab_size, self.streamer.device)
            text = TextStream(self.tokenizer, ids, asked.stop) if self._has_text(asked) else None
            places = self.max_length if asked.reuse_prefix else len(ids) + count
            yield Request(index, ids, count, sampler, text, places)

    def _has_text(self, asked: Asked) -> bool:
        """False for a model without a tokenizer, of which ids alone can be had."""
        try:
            return self.tokenizer is not None
        except ValueError:
            if asked.stop:
                raise
            return False

    def _text(self, done: Completion) -> str:
        """The text, or the error that there is no tokenizer to make it."""
        return done.text if self.tokenizer is not None else ""

    def _stop_ids(self) -> frozenset[int]:
        try:
            own = id_set(self.tokenizer.eos_token_id)
        except ValueError:
            own = frozenset()
        return self.config.eos_ids | own

    def _guard(self, events: Generator[Event]) -> Iterator[Event]:
        """The events; RuntimeError once a newer call has ended them."""
        try:
            for request, piece in events:
                yield request, piece
                if self._kept is not None and request.row is self._kept[0]:
                    self._kept = self._kept[0], [*request.prompt_ids, *request.new_ids]
                if self._current is not events:
                    raise RuntimeError("this generation was ended by a newer one")
        finally:
            events.close()

    def _reuse(self, ids: Sequence[int]) -> Row:
        """The kept row, cut back to what it has in common with these tokens; or a new one."""
        if self._kept is None:
            row = self._runner.kv.rows.add(self.max_length)
            assert row is not None
            self._kept = row, []
        row, known = self._kept
        same = 0
        # The last token is computed in any case: its logits are needed.
        for a, b in zip(known[: row.length], ids[:-1], strict=False):
            if a != b:
                break
            same += 1
        self._runner.kv.rows.truncate(row, same)
        self._kept = row, list(ids)
        return row

    def _forget(self) -> None:
        if self._kept is not None:
            self._runner.kv.rows.drop(self._kept[0])
            self._kept = None

    def _end_current(self) -> None:
        """No generation is under way any more, and no row is held but the one that is kept."""
        current, self._current = self._current, None
        if current is not None:
            current.close()
        kept = self._kept[0] if self._kept is not None else None
        for row in self._runner.kv.rows:
            if row is not kept:
                self._runner.kv.rows.drop(row)
