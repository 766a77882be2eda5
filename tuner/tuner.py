"""LayerStreamerTuner: the fastest settings for one machine, one checkpoint and one compute."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from ..checkpoint.formats import as_manifest
from ..checkpoint.manifest import Manifest
from ..errors import ConfigError, TuneError
from ..modules.tuning import SetupFn as ModuleSetupFn
from ..planning.options import Bytes, DeviceName
from ..streamer import LayerStreamer
from .model import Model, SetupFn, split_options
from .options import MAX_TOKENS, TuneKeywords, TuneOptions, TuneValues, check_int
from .report import Findings, write_report
from .session import Session
from .trials.record import TrialRecord
from .trials.setup_fn import end_import_in_child

logger = logging.getLogger(__name__)

ENGINE = "layer_streamer.llm.tuning"
MODULES = "layer_streamer.modules.tuning"
"""Names, no imports: they are resolved in the processes of trials (see TrialSpec.engine)."""


class LayerStreamerTuner:
    """Finds pool sizes, batches and read settings for this machine, by trials.

    Each candidate runs in a process of its own. A tune may be interrupted: finished trials are on
    record, and the next one goes on from there. Thread rules: one thread; one tune at a time.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the published constructor
        self,
        setup_fn: SetupFn | None,
        model_dir: str | Path,
        tensor_info: Mapping[str, tuple[str, int, Sequence[int]]],
        shard_offsets: Mapping[str, int],
        block_keys: Sequence[str],
        block_sizes: Mapping[str, int],
        dtype: torch.dtype,
        num_layers: int,
        n_gpu_values: Sequence[int] | None = None,
        n_cpu_pinned_values: Sequence[int | None] | None = None,
        n_cpu_values: Sequence[int | None] | None = None,
        batch_gpu_values: Sequence[int | None] | None = None,
        batch_cpu_pinned_values: Sequence[int | None] | None = None,
        batch_cpu_values: Sequence[int | None] | None = None,
        n_runs: int = 4,
        sleep_seconds: float = 0.0,
        *,
        device: DeviceName | Sequence[DeviceName] | None = None,
        **options: Unpack[TuneValues],
    ) -> None:
        """Tune ``LayerStreamer(model_dir=..., ...)``; values that are not given are not searched.

        The model's arguments are the streamer's. The other options, ``read_mode_values`` and such
        among them, are those of :meth:`from_checkpoint`. Raises ConfigError, TypeError.
        """
        values, own, tune = split_options(_options_in(locals()), LayerStreamer)
        self._session = Session(Model(own, setup_fn), values, TuneOptions(**tune))

    @classmethod
    def from_checkpoint(  # noqa: PLR0913 - every option by name
        cls,
        path: str | Path | Manifest,
        *,
        setup_fn: SetupFn | None = None,
        n_gpu_values: Sequence[int] | None = None,
        n_cpu_pinned_values: Sequence[int | None] | None = None,
        n_cpu_values: Sequence[int | None] | None = None,
        batch_gpu_values: Sequence[int | None] | None = None,
        batch_cpu_pinned_values: Sequence[int | None] | None = None,
        batch_cpu_values: Sequence[int | None] | None = None,
        read_mode_values: Sequence[str] | None = None,
        read_threads_values: Sequence[int | None] | None = None,
        read_chunk_values: Sequence[int | None] | None = None,
        device_budget_values: Sequence[Bytes | None] | None = None,
        host_budget_values: Sequence[Bytes | None] | None = None,
        host_layers_values: Sequence[int | Literal["auto"] | None] | None = None,
        device: DeviceName | Sequence[DeviceName] | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[TuneKeywords],
    ) -> LayerStreamerTuner:
        """Tune ``LayerStreamer.from_checkpoint(path, device=device, dtype=dtype, ...)``.

        * ``setup_fn(streamer)`` returns ``run()``, which is measured; a function that a fresh
          process can import. None: each matrix times ``tokens`` vectors stands in for it.
        * ``*_values``: what to try of each setting; None: values that suit the machine. Among the
          sizes of a host pool None is 0: no such pool.
        * ``tail``, ``layer_pattern``, ``reserve_bytes``, ``on_copy``, ``layers``: the streamer's,
          the same for all; ``on_copy`` is imported by a fresh process, as ``setup_fn`` is.
        * ``n_runs`` (4): runs of each, the first is discarded; ``sleep_seconds`` (0) between them;
          ``cache``: the page cache before each, "warm" or "cold".
        * ``max_device_bytes`` of each device, ``max_host_bytes``: the most a candidate may take.
        * ``max_seconds``: the best so far is returned when they are over.
        * ``strategy``: "race" (the default) stops once no candidate that is left can be better by
          more than ``tolerance`` (0.02; docs/tuning.md says by what rule); "grid" tries all.
        * ``margin`` (0.1): a run is ended once it is that much slower than the best; None: never.
        * ``trial_seconds``, ``hang_seconds``: bounds of one trial, and of each of its stages.
        * ``results_path``: where results are kept; None: in the user's cache directory.
        * ``track_progress``: a bar and lines, on stderr.

        Raises ConfigError, and TypeError for an option that neither tuner nor streamer has.
        """
        self = cls.__new__(cls)
        self._session = _checkpoint_session(path, setup_fn, _options_in(locals()))
        return self

    @classmethod
    def for_engine(
        cls,
        path: str | Path,
        *,
        prompt_tokens: int = 512,
        new_tokens: int = 8,
        **options: Any,
    ) -> LayerStreamerTuner:
        """Tune ``layer_streamer.llm.StreamingEngine(path, ...)``; needs the extra "llm".

        A run, whose seconds count, is a prompt of ``prompt_tokens`` made-up tokens and
        ``new_tokens`` after it: one pass over the prompt, which gives the first of them, and a pass
        for each of the others. Records have both in ``parts``: "prompt", "decode".

        The engine's default settings are tried first, then these with the budgets granted, so that
        the best is no slower than either. ``tune()`` returns keyword arguments for the engine:
        ``StreamingEngine(path, **best)``, {} if nothing beats its defaults.

        ``options``: ``*_values`` and those of a tune as in :meth:`from_checkpoint`; all others are
        the engine's, the same for all candidates, such as ``max_length``, ``kv``, ``dtype``. The
        budgets are the engine's as well: it shares them out with keys and values.

        Raises ConfigError; ``tune()`` also what the engine says of its model and its options.
        """
        values, own, tune = split_options(options, None)
        text = _text_options(prompt_tokens, new_tokens, tune)
        model = Model({"path": path, **text, **own}, engine=ENGINE)
        self = cls.__new__(cls)
        self._session = Session(model, values, TuneOptions(**tune))
        return self

    @classmethod
    def for_module(
        cls,
        path: str | Path | None = None,
        *,
        setup_fn: ModuleSetupFn | None = None,
        prompt_tokens: int = 512,
        new_tokens: int = 8,
        **options: Any,
    ) -> LayerStreamerTuner:
        """Tune ``layer_streamer.stream(path, ...)``, or what ``setup_fn`` opens by ``stream``.

        ``setup_fn(**settings)`` returns ``(model, run)``: the model by ``stream(..., **settings)``,
        and what is to be fast, one forward or more; a function that a fresh process can import.
        Without one, ``path`` is a transformers model that writes text, and a run is a prompt and
        new tokens as in :meth:`for_engine`, by the model's own ``generate``.

        The default settings are tried first, then these with the budgets granted. ``tune()``
        returns keyword arguments for ``stream``: ``stream(path, **best)``, {} if nothing beats its
        defaults. Budgets are the model's: all its sequences of blocks, and what is outside of them.

        ``options``: ``*_values`` and those of a tune as in :meth:`from_checkpoint`; all others are
        handed to ``stream``, or to ``setup_fn``, the same for all candidates.

        Raises ConfigError; ``tune()`` also what opening the model says.
        """
        values, own, tune = split_options(options, None)
        if (path is None) == (setup_fn is None):
            raise ConfigError("for_module: takes a path, or a setup_fn that opens the model")
        text = _text_options(prompt_tokens, new_tokens, tune)
        model = {**own} if path is None else {"path": path, **text, **own}
        self = cls.__new__(cls)
        subject = Model(model, setup_fn, engine=MODULES, streamed=True)
        self._session = Session(subject, values, TuneOptions(**tune))
        return self

    def tune(self) -> dict[str, int | str | None]:
        """The best settings: keyword arguments for LayerStreamer and its from_checkpoint.

        A pool that is not to be there is 0, never None, which means something else to each.

        Raises ConfigError before anything is started, TuneError if no candidate gave a result.
        KeyboardInterrupt comes through once everything that was started has ended. This process
        opens no device. In the process of a trial, a script's import ends here.
        """
        end_import_in_child()
        if torch.cuda.is_initialized():
            logger.warning(
                "CUDA is initialised in this process already: what it holds of the devices' memory "
                "and time, trials do not have"
            )
        return self._session.tune()

    @property
    def results(self) -> list[TrialRecord]:
        """What became of each candidate, in the order in which they were settled; the pruned last.

        Candidates that were not tried are not there. After an interrupt: what there was.
        """
        return self._session.records()

    @property
    def best(self) -> TrialRecord | None:
        """The best candidate's record, of the last tune or of the one that was interrupted."""
        return self._session.best

    def report(self, path: str | Path) -> tuple[Path, ...]:
        """Write a table (tune.md) and a picture (tune.png) into the directory ``path``.

        Returns the files. Raises TuneError before a tune, OSError, and ImportError without
        matplotlib (the extra "report"); the table is written even then.
        """
        records = self.results
        if not records:
            raise TuneError("there is nothing to report: tune() has not been called")
        session = self._session
        return write_report(
            Path(path), Findings(session.title, records, session.best, session.num_untried)
        )


def _text_options(prompt_tokens: int, new_tokens: int, tune: Mapping[str, Any]) -> dict[str, int]:
    """What a prompt and its answer are measured on. ConfigError."""
    check_int("prompt_tokens", prompt_tokens, 1, MAX_TOKENS)
    check_int("new_tokens", new_tokens, 2, MAX_TOKENS)
    if "tokens" in tune:
        raise ConfigError("tokens: an engine is measured on prompt_tokens and new_tokens")
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def _checkpoint_session(
    path: str | Path | Manifest, setup_fn: SetupFn | None, options: Mapping[str, Any]
) -> Session:
    """The session of a tune of LayerStreamer.from_checkpoint."""
    values, own, tune = split_options(options, LayerStreamer.from_checkpoint)
    if isinstance(path, Manifest):
        manifest = as_manifest(path, own.get("layer_pattern"))
        if manifest.layer_pattern is None:
            raise ConfigError(f"{path.path}: a manifest of tables, for LayerStreamerTuner(...)")
        # All read headers by themselves, as the processes of trials do.
        path, own["layer_pattern"] = manifest.path, manifest.layer_pattern
    return Session(Model({"path": path, **own}, setup_fn), values, TuneOptions(**tune))


def _options_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a door, those that it takes by ``**options`` included."""
    others = ("self", "cls", "path", "setup_fn", "options")
    named = {name: value for name, value in arguments.items() if name not in others}
    return {**named, **arguments["options"]}
