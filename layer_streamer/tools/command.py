"""What the command lines of the examples share. Imports nothing large: --help is to be quick."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError, in one line, for arguments that make no sense."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


@contextmanager
def library_errors() -> Iterator[None]:
    """Context in which a model is used: what its libraries raise for users becomes ValueError.

    ImportError, which says what to install, if they are not there.
    """
    try:
        import torch
        import transformers  # noqa: F401 - imported later, where it is used

        from .. import StreamerError
    except ImportError as error:
        raise ImportError(f"{error} (pip install 'layer-streamer[examples]')") from error
    try:
        yield
    except (StreamerError, torch.OutOfMemoryError) as error:
        raise ValueError(str(error)) from error
