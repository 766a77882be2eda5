"""Direct reads that come back short, at the end of a file, and off the pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import Disk, pages, stamp, warnings_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_streamer import CheckpointChangedError
from layer_streamer.planning.layout import PAGE
from layer_streamer.transport.files import OpenFiles


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def whole(tmp_path: Path, disk: Disk) -> Iterator[tuple[Path, OpenFiles]]:
    """A file whose last page is not full, open for direct reads."""
    path = tmp_path / "odd"
    path.write_bytes(os.urandom(5 * PAGE + 777))
    opened = OpenFiles({path: stamp(path)})
    opened.use_direct()
    yield path, opened
    opened.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_bytes_are_the_files_whatever_reads_come_back_short(
    whole: tuple[Path, OpenFiles], disk: Disk, data: st.DataObject
) -> None:
    path, _ = whole
    opened = OpenFiles({path: stamp(path)})
    opened.use_direct()
    first = data.draw(st.integers(0, 5))
    wanted = data.draw(st.integers(0, path.stat().st_size - first * PAGE))
    lengths = st.one_of(st.none(), st.integers(1, 3 * PAGE), st.sampled_from([1, 512, PAGE - 1]))
    pattern = iter(data.draw(st.lists(lengths, max_size=6)))
    disk.read = lambda path, view, offset: next(pattern, None)
    disk.calls = 0
    view = pages(wanted)
    opened.read_into(path, view, first * PAGE, wanted)
    assert bytes(view[:wanted]) == path.read_bytes()[first * PAGE :][:wanted]
    assert disk.calls <= 7
    opened.close()


def test_reads_that_never_get_beyond_a_part_of_a_page_are_given_up_for_buffered_ones(
    whole: tuple[Path, OpenFiles], disk: Disk, caplog: Any
) -> None:
    path, opened = whole
    disk.read = lambda path, view, offset: 512
    view = pages(3 * PAGE)
    opened.read_into(path, view, PAGE)
    assert bytes(view) == path.read_bytes()[PAGE : 4 * PAGE]
    assert opened.read_modes == {path: "buffered"}
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("left", [0, 100, PAGE, 2 * PAGE, 2 * PAGE + 1, 5 * PAGE + 776])
def test_a_file_that_shrinks_ends_a_direct_read_with_an_error_after_a_few_calls(
    whole: tuple[Path, OpenFiles], disk: Disk, left: int
) -> None:
    path, opened = whole
    os.truncate(path, left)
    wanted = 5 * PAGE + 777
    with pytest.raises(CheckpointChangedError, match=rf"odd: expected {wanted} .* got {left}\b"):
        opened.read_into(path, pages(wanted), 0, wanted)
    assert disk.calls <= 3
    assert opened.read_modes == {path: "direct"}


@pytest.mark.parametrize("offset", [1, 4095, 4097])
def test_a_read_off_the_pages_goes_through_the_page_cache(
    whole: tuple[Path, OpenFiles], disk: Disk, offset: int
) -> None:
    path, opened = whole
    view = pages(PAGE)
    opened.read_into(path, view, offset)
    assert bytes(view) == path.read_bytes()[offset : offset + PAGE]
    assert disk.calls == 0
