"""Numbers that are sent to a device come as they were sent, however late it reads them."""

from __future__ import annotations

import pytest
import torch

from layer_streamer.devices.accelerator import open_device
from layer_streamer.devices.staging import ROWS, WIDTH, Staging


@pytest.mark.parametrize("numbers", [[], [7], [3, -1, 1 << 40], list(range(WIDTH + 1))])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_arrive_as_they_were_sent(kind: str, numbers: list[int]) -> None:
    found = Staging(open_device(kind)).send(numbers)
    assert found.dtype == torch.int64 and found.device.type == kind
    assert found.tolist() == numbers


@pytest.mark.gpu
def test_a_row_is_not_written_again_before_the_device_has_read_it() -> None:
    device = open_device("cuda")
    staging, stream = Staging(device), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        found = [staging.send([turn, turn + 1]) for turn in range(3 * ROWS)]
        assert torch.stack(found).tolist() == [[turn, turn + 1] for turn in range(3 * ROWS)]


@pytest.mark.gpu
def test_an_interrupt_between_a_copy_and_its_event_leaves_no_row_open() -> None:
    device = open_device("cuda")
    staging, stream = Staging(device), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        staging.send([0])
        sent = staging._sent[(staging._turn + 1) % ROWS]
        record, sent.record = sent.record, _interrupt  # type: ignore[method-assign]
        torch.cuda._sleep(200_000_000)
        with pytest.raises(KeyboardInterrupt):
            staging.send([1])
        sent.record = record  # type: ignore[method-assign]
        before = torch.cuda.Event()
        before.record()
        assert not before.query()
        staging.send([2])
        assert before.query(), "the copy without an event has been waited for"


def _interrupt(stream: object) -> None:
    raise KeyboardInterrupt
