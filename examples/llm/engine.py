"""StreamingEngine: text in, text out, with a model that streams through bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layer_streamer import LayerStreamer

from .constraints.vocabulary import Vocabulary
from .drafts.opening import Wanted
from .errors import TELLING, one_line_errors
from .expert_record import ExpertRecord
from .memory.memory_plan import MemoryPlan
from .memory.placing import Named
from .memory.wishes import Wishes
from .models.config import id_set
from .models.rope_config import rotated_alike
from .opening import Limits, Model, model_of, place
from .parts import open_parts, plan_parts
from .passes.pooling import vectors
from .reading.turn_marks import TurnMarks
from .request import Event, Request
from .scheduling.client import Client
from .scheduling.scheduler import Scheduler
from .text.completion import Asked, Completion, Shape, in_order, raising
from .text.prompts import Prompt, PromptEncoder, is_batch
from .text.requests import Encoded, Prompts, RequestMaker, Room

logger = logging.getLogger(__name__)


class StreamingEngine:
    """A language model whose layers stream, with its tokenizer, its cache and its memory plan.

    Construction plans the memory, refuses what cannot fit, and opens the streamer; leaving the
    ``with`` block returns everything. Thread rules: one thread at a time, on which several calls
    may be under way. On a CPU, torch's threads of this process leave the streamer a core, unless
    OMP_NUM_THREADS says how many there are.

    ``model_path`` is a safetensors directory, a GGUF file, or a repository on the Hugging Face hub,
    which is downloaded (:mod:`.hub`). Options:

    * ``device``: a torch device, or several GPUs, of which each streams every so manieth layer.
    * ``max_length``: most tokens of a row, prompt and text (4096, or the model's context if less).
    * ``kv``: "device" and "host" say where keys and values live; "auto": on the device while
      its budget lasts. ``kv_int8``: those in host memory in eight bits.
    * ``kv_tokens``: tokens of all rows together (``max_length``); ``max_batch``: rows at a time.
    * ``prefill_chunk``: tokens that go through a layer at a time (2048; less if memory is short).
    * ``device_budget`` (of each device), ``host_budget``: of streamer and engine together; on a
      CPU, unless a pool or a read mode is named, what free memory holds stays where it lies.
    * ``lookup``, ``draft``: a pass also looks at tokens that may follow, and may give several; the
      text is the same. They followed the same words before in this engine (``lookup``), or are
      those of a small model with the same tokenizer, or ("self") of the model in four bits.
    * ``reproducible``: logits, to the bit, whatever shares a pass: with and without drafts, too.
    * ``adapter``: a folder of peft's with a LoRA of this model, which stays on the device.
    * ``host_layers``: so many layers are computed in host memory, in passes of few tokens; "auto":
      as many as end with the others, by products that are measured, once a machine.
    * ``notify`` hears of what takes seconds or is not as expected.
    * ``streamer_options``: those of ``LayerStreamer.from_checkpoint``, such as the tuner prints;
      ``reserve_bytes`` is the caller's part of ``device_budget``.

    Errors, each in one line: ValueError for the model, an option, or a budget that is too small;
    StreamerError for what the machine refuses (:mod:`.errors`).
    """

    def __init__(  # noqa: PLR0913 - every option by name
        self,
        model_path: str | Path | Model,
        *,
        max_length: int | None = None,
        device: Named | Sequence[Named] | None = None,
        dtype: torch.dtype | None = None,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        kv: str = "auto",
        kv_int8: bool = False,
        kv_tokens: int | None = None,
        max_batch: int = 8,
        prefill_chunk: int | None = None,
        lookup: bool = False,
        draft: str | Path | Model | None = None,
        reproducible: bool = False,
        adapter: str | Path | None = None,
        notify: Callable[[str], None] = logger.info,
        **streamer_options: Any,
    ) -> None:
        """Plan, and open; the options are above."""
        limits = Limits(
            max_length, kv_tokens, max_batch, kv_int8=kv_int8, reproducible=reproducible
        )
        wanted = Wanted.of(draft, notify, lookup=lookup)
        reserve = streamer_options.pop("reserve_bytes", 0)
        self.model = model_of(model_path, notify, streamer_options, adapter)
        self.config = self.model.config
        self.max_length = limits.length(self.config)
        own = wanted.own_weights
        options, dtype = place(self.model, device, dtype, streamer_options, loads_head=own)
        wishes = Wishes(
            kv=kv, prefill_chunk=prefill_chunk, device_budget=device_budget,
            host_budget=host_budget, reserve_bytes=reserve, options=options,
        )  # fmt: skip
        planned = plan_parts(self.model, limits, wishes, dtype, wanted)
        self._parts = open_parts(self.model, planned, wanted)
        self.plan: MemoryPlan = self._parts.plan
        """Where everything is, and the bytes that it takes."""
        self._runner = self._parts.runner
        alike = rotated_alike(self.config.ropes)
        self.scheduler = Scheduler(self._runner, drafting=self._parts.drafting, alike=alike)
        """What all calls go through, and whoever submits requests by himself."""
        self.max_batch, self._notify = max_batch, notify
        vocab, context = self.config.vocab_size, self.config.max_positions
        self._room = Room(self.max_length, context, vocab)
        self._prompts = Prompts(PromptEncoder(lambda: self.tokenizer, vocab, notify), self._room)
        self._defaults = self.model.default_sampling(notify)

    @property
    def streamer(self) -> LayerStreamer:
        """The streamer of the model's layers; ``last_pass`` says where the time went, of the last
        pass that was not captured (``plan.captures``)."""
        return self._parts.streamer

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
        n: int | None = None,
        stream: bool = False,
        return_details: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reuse_prefix: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continue a text, answer messages, or continue token ids; or several of them in a list.

        One prompt gives its text, a list gives a list. ``return_details``: a Completion instead of
        a text. ``stream``: an iterator of pieces of text, for a list of (row, piece); none cuts a
        character or shows a part of a stop string. Closing it ends it; others may be under way.

        * ``stop``: strings that end the text and are no part of it, special tokens among them.
        * ``sampling``: temperature (0: greedy), top_k, top_p, min_p, repetition_penalty (by default
          what the model's generation_config says, else greedy), skip_special_tokens (True); as in
          OpenAI's API presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs.
        * ``seed``: the same seed gives the same text; row i of a list takes seed + i.
        * ``n``: of each prompt a list of so many texts; rows are those of a list of prompts that
          has each n times, one behind the other: so seeds, pieces and errors are counted.
        * ``schema``, ``regex``, ``grammar``: what the text is like, by one of them (docs/llm.md).
        * ``chat_template_kwargs``: tools, continue_final_message, what else the template knows.
        * ``reuse_prefix``: for one prompt: start from what it has in common with the last such
          prompt and its text, whose keys and values are kept until a prompt without it is let in.

        ValueError, in one line, for an option that makes no sense or a bad prompt. Of a list, each
        prompt fails alone: when the others have ended, its Completion has the ``error``, or a
        RowsError is raised that has all Completions.
        """
        shape = Shape(is_batch(prompt), n, stream, return_details)
        if reuse_prefix and not shape.is_one:
            raise ValueError("reuse_prefix=True: takes one prompt, not a list, and gives one text")
        if not return_details:
            _ = self.tokenizer  # the error of a model without one, before anything is computed
        prompts = self._prompts.take(prompt, chat_template_kwargs or {}, several=shape.several)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed,
            "reuse_prefix": reuse_prefix, **sampling,
        }  # fmt: skip
        rows = shape.rows(prompts)
        if stream:
            return shape.pieces(self.events(rows, **options))
        return shape.results(list(self.completions(rows, **options)))

    def events(
        self,
        prompts: Iterable[Encoded],
        *,
        on_layer: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """What :meth:`generate` is made of: every pass's (request, piece of text), row by row.

        ``prompts`` are token ids, taken one by one as rows come free, so that there may be any
        number; ``on_layer(layer_idx)`` hears of the layers of the first one's first pass. The other
        options are ``generate``'s, but for those that shape its result. What several passes have
        brought a row, while another call was asked, is one event. A prompt that fails has none:
        what it raised is raised when all others have ended, the error itself if there is no other,
        else a RowsError.
        """
        return raising(self._start(prompts, on_layer, options))

    def completions(self, prompts: Iterable[Encoded], **options: Any) -> Iterator[Completion]:
        """The results of any number of prompts, taken as by :meth:`events`, in their order.

        One that fails has its ``error``, and raises nothing. An exception among the prompts is the
        result of its place, so that what was wrong with it may be told there.
        """
        return in_order(self._start(prompts, None, options))

    def requests(self, prompts: Iterable[Encoded], **options: Any) -> Iterator[Request]:
        """Requests for :attr:`scheduler`, each made when it is asked for: of prompts as
        :meth:`events` takes them, with its options. One that cannot be made has an ``error``.

        ValueError for options that make no sense. Any thread, also while a pass runs.
        """
        asked = Asked.of(self._defaults, options)
        return RequestMaker(
            asked=asked,
            room=self._room,
            tokenizer=self.tokenizer if self._has_text(bool(asked.stop)) else None,
            notify=self._notify,
            stop_ids=self._stop_ids,
            matcher=asked.matcher(lambda: self.vocabulary),
        ).requests(prompts)

    def embed(self, prompts: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        """A vector of each prompt of token ids, in their order: what the final norm gives of its
        tokens, on average, made 1 long; float32, (hidden_size,), on the CPU.

        A pass is done when its first vector is asked for. ValueError for ids that are none or too
        many; EngineError if there is no room beside other calls at present.
        """
        return vectors(self._runner, [self._room.check(ids) for ids in prompts])

    def encode(
        self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a prompt; ValueError if it is malformed, empty or too long, or if the
        tokenizer cannot take it."""
        return self._prompts.encode(prompt, chat_template_kwargs or {})

    def record_experts(self, path: str | Path) -> None:
        """From now on, put on record which experts passes ask for, in a file that
        ``layer-streamer experts`` reads. ValueError without ``experts="demand"``."""
        record = ExpertRecord(Path(path), self.config, self.streamer)
        self._parts.closing.callback(record.close)
        self._runner.on_pass = record.hear

    def close(self) -> None:
        """End what is being generated, with a ClosedError, and return all memory. Idempotent."""
        self.scheduler.close()
        self._parts.closing.close()

    def __enter__(self) -> StreamingEngine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except Exception as later:  # after an error of a device, all that follows fails, too
            if error is None:
                raise
            error.add_note(str(later))

    def _start(
        self,
        prompts: Iterable[Encoded],
        on_layer: Callable[[int], object] | None,
        options: Mapping[str, Any],
    ) -> Iterator[Event]:
        """A new generation, beside those that are under way; it begins when it is asked."""
        return Client(self.scheduler, self.requests(prompts, **options), on_layer).events()

    def _has_text(self, needed: bool = False) -> bool:
        """False for a model without a tokenizer that can be used, of which ids alone can be had;
        its error if it is ``needed``."""
        try:
            with one_line_errors("the tokenizer cannot be loaded"):
                return self.tokenizer is not None
        except TELLING:
            if needed:
                raise
            return False

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What constraints are compiled for; its errors are those of :class:`Vocabulary`."""
        return Vocabulary(self.tokenizer, self.config.vocab_size, self._stop_ids)

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        if not self._has_text():
            return self.config.eos_ids
        own = id_set(self.tokenizer.eos_token_id)
        return TurnMarks(self.tokenizer).stops(self.config.eos_ids | own)
