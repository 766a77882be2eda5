"""In which order experts are copied to slots, and used there."""

from __future__ import annotations

from ..devices.device import Device, Stream


class ExpertCopies:
    """A stream for copies, which is behind all use of a slot that has been given up, and ahead of
    the use of what it has brought. Thread rules: the thread that runs the pass."""

    def __init__(self, device: Device) -> None:
        """From the thread, and on the stream, that slots' memory was taken on."""
        self._device = device
        self.stream = device.new_stream()
        self._given_up, self._brought = device.new_event(), device.new_event()
        self._given_up.record(device.current_stream())
        self.follow_allocation()

    def give_up(self) -> None:
        """The current stream's work on slots has been enqueued."""
        self._given_up.record(self._device.current_stream())
        self.follow_use()

    def brought(self) -> None:
        """Copies have been enqueued, which :meth:`order_after_copies` has others wait for."""
        self._brought.record(self.stream)

    def avoid(self, current: Stream) -> None:
        """Torch deals streams out in turn, and may have dealt the caller this one: go on by
        another."""
        if current == self.stream and not self._device.unified:
            self._given_up.record(self.stream)
            self.stream = self._device.new_stream()
            self.follow_stream()

    def wait_copied(self) -> None:
        """Block until nothing copies from the host's memory any more."""
        self.stream.synchronize()

    def follow_allocation(self) -> None:
        """The first copies wait for whatever used the slots' memory before it was theirs."""
        self._given_up.wait(self.stream)

    def follow_use(self) -> None:
        """Copies wait for the work on what has been given up."""
        self._given_up.wait(self.stream)

    def follow_stream(self) -> None:
        """Copies wait for those on the stream before, and for what these wait for."""
        self._given_up.wait(self.stream)

    def order_after_copies(self, current: Stream) -> None:
        """The caller's stream waits for all that was brought."""
        self._brought.wait(current)
