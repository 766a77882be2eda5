"""Where this library keeps what it measures, builds and downloads: the user's cache directory.

It is ``$XDG_CACHE_HOME/layer-streamer``, without that ``~/.cache/layer-streamer``. Where there is
no home, or nothing can be written there (a container's read-only root, a full disk), it is a folder
among the temporary files, which only its owner can enter and which lasts as long as those do.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "layer-streamer"
TRIAL_NBYTES = 4096
"""What is written to see if something can be: less can fit on a disk that is full."""
NOWHERE = Path(os.devnull, NAME)
"""A path that never is there."""

_refused: set[Path | None] = set()
"""Places that could not be written in this process; each is told of once."""


def user_cache() -> Path | None:
    """The user's cache directory for this library; None without a home. It may not exist."""
    # The specification has a path that is not absolute ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / NAME
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor an entry in the table of users
        return None
    return home / ".cache" / NAME if home.is_absolute() else None


def cache_path(*parts: str, make: bool = False) -> Path:
    """Path of what is kept under the names ``parts``; it need not exist.

    With ``make``, it is a folder that exists and has been written to: where the user's cache
    directory cannot be, one among the temporary files, and a warning says so, once. OSError if that
    cannot be written either.
    """
    place = user_cache()
    if not make:
        spare = _spare()
        usual, other = ((p.joinpath(*parts) if p else NOWHERE) for p in (place, spare))
        there = os.path.exists(usual)  # noqa: PTH110 - in a folder that is closed to us, too
        return usual if there or (place not in _refused and can_be_made(place)) else other
    reason = "there is no home directory"
    if place is not None:
        folder = place.joinpath(*parts)
        try:
            _make(folder)
            return folder
        except OSError as error:
            reason = f"{folder} cannot be written ({error.strerror or error})"
    return _make_spare(place, parts, reason)


def can_be_made(folder: Path | None) -> bool:
    """False if it is known that ``folder`` is not there and cannot be, or cannot be written."""
    if folder is None:
        return False
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:  # a name that is too long, a loop of links, a folder that is closed to us
        return False
    place = existing(folder)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)  # noqa: PTH112


def existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that is there, which may be a file."""
    # Path.exists() raises for what is in a folder that is closed to us.
    found = (place for place in (folder, *folder.parents) if os.path.exists(place))  # noqa: PTH110
    return next(found, Path("/"))


@contextmanager
def trial_file(folder: Path) -> Iterator[Path]:
    """A small file in ``folder``, or where that would be made. Raises OSError."""
    place = existing(folder)
    if not os.path.isdir(place):  # noqa: PTH112
        raise NotADirectoryError(f"{place} is not a directory")
    with tempfile.NamedTemporaryFile(dir=place, prefix=f".{NAME}-trial-") as file:
        file.write(bytes(TRIAL_NBYTES))
        file.flush()
        yield Path(file.name)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with trial_file(folder):
        pass


def _make_spare(place: Path | None, parts: tuple[str, ...], reason: str) -> Path:
    spare = _spare(make=True)
    if spare is None:
        # Another user has taken the name: a folder of which nobody can know it.
        spare = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
    folder = spare.joinpath(*parts)
    _make(folder)
    if place not in _refused:
        _refused.add(place)
        logger.warning(
            "%s: %s is used instead; set XDG_CACHE_HOME to a folder that can be written and lasts",
            reason, spare,
        )  # fmt: skip
    return folder


def _spare(*, make: bool = False) -> Path | None:
    """Our folder among the temporary files; None if what has its name there is not ours alone."""
    user = os.geteuid()
    try:
        spare = Path(tempfile.gettempdir()) / f"{NAME}-{user}"
        if make:
            spare.mkdir(mode=0o700, exist_ok=True)
        found = spare.lstat()
    except FileExistsError:
        return None
    except OSError:
        if make:
            raise
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user
    return spare if ours and not stat.S_IMODE(found.st_mode) & 0o022 else None
