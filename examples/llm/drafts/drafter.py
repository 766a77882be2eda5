"""What says which tokens may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .tree import Draft


class Drafter(Protocol):
    """Proposes tokens, of one row at a time; the model decides, so any proposal is a right one.

    A row is named by a key of the caller's, any number that no other row has until
    :meth:`forget`. Thread rules: one thread.
    """

    @property
    def weighs(self) -> bool:
        """True: a draft ends by itself where more of it would not pay."""

    def propose(self, key: int, ids: Sequence[int], most: int) -> Draft:
        """At most ``most`` tokens, perhaps none, that may follow ``ids``: one after the other, or a
        tree, where several of them may follow the same one.

        ``ids`` are the row's prompt and text so far. From call to call they grow at their end, or
        are shorter than before; what is known of them is not read again. What is returned is the
        caller's.
        """

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        """The model has looked at the first ``proposed`` tokens of the row's last proposal, and
        agreed with the first ``agreed`` of them; of a tree, with so many of one branch."""

    def forget(self, key: int) -> None:
        """The row has ended. A key that is not known is none, and no error."""
