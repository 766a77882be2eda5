"""One text on its way to a client: what of it is reasoning, answer, or a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .found import Call, CallParser, Thought
from .reasoning import ReasoningSplitter


@dataclass(slots=True)
class Delta:
    """What more there is of a text."""

    answer: str = ""
    reasoning: str = ""
    calls: Sequence[Call] = ()

    def __bool__(self) -> bool:
        return bool(self.answer or self.reasoning or self.calls)


@dataclass(slots=True)
class ChoiceText:
    """Takes a text apart, piece by piece."""

    splitter: ReasoningSplitter | None = None
    """None: the model has no such part."""
    parser: CallParser | None = None
    """None: there are no tools, and no reasoning stands among calls."""
    several: bool = True
    """False: the text ends behind its first call, whatever the model goes on with."""
    whole: Delta = field(default_factory=Delta)
    """All that has been told."""

    def push(self, text: str) -> Delta:
        """What one more piece brings."""
        reasoning, answer = ("", text) if self.splitter is None else self.splitter.push(text)
        return self._tell(reasoning, answer, ended=False)

    def finish(self) -> Delta:
        """What was held back."""
        reasoning, answer = ("", "") if self.splitter is None else self.splitter.finish()
        return self._tell(reasoning, answer, ended=True)

    def reason(self, reason: str) -> str:
        """OpenAI's name for why the text ended."""
        called = self.whole.calls and (reason == "stop" or not self.several)
        return "tool_calls" if called else reason

    def _tell(self, reasoning: str, answer: str, *, ended: bool) -> Delta:
        if self.whole.calls and not self.several:
            return Delta()
        calls: list[Call] = []
        if self.parser is not None:
            found = self.parser.push(answer) if answer else []
            if ended:
                found += self.parser.finish()
            first = next((at for at, one in enumerate(found) if isinstance(one, Call)), None)
            if first is not None and not self.several:
                del found[first + 1 :]
            answer = "".join(one for one in found if isinstance(one, str))
            reasoning += "".join(one.text for one in found if isinstance(one, Thought))
            calls = [one for one in found if isinstance(one, Call)]
        delta, whole = Delta(answer, reasoning, calls), self.whole
        whole.answer, whole.reasoning = whole.answer + answer, whole.reasoning + reasoning
        whole.calls = [*whole.calls, *calls]
        return delta
