"""How many tokens the examples of a file have, and how many of them are learnt. Imports no torch."""

from array import array
from collections.abc import Callable
from typing import Any

from trainer.examine import spread
from trainer.examples import BadExample, Example

# (tokens of an example, those that are learnt; None of a label). Raises BadExample for one that cannot be counted.
Count = Callable[[Example], tuple[int, int | None]]


class Lengths:
    """Of examples, as they pass by."""

    def __init__(self, count: Count, sequence_length: int | None = None) -> None:
        self._count, self._limit = count, sequence_length
        self._lengths, self._learnt = array("Q"), 0

    def add(self, example: Example) -> None:
        """Raises BadExample where the chat template refuses it, and where nothing of it is learnt."""
        tokens, learnt = self._count(example)
        self._lengths.append(tokens)
        self._learnt += learnt or 0

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": sum(self._lengths), "tokens_per_example": spread(self._lengths)}
        if self._learnt:
            found["tokens_learnt"] = self._learnt
        if self._limit is not None:
            found["longer_examples"] = sum(length > self._limit for length in self._lengths)
        return found


class FileTokens:
    """The same for a file object's `statistics.tokens`, in the words of a job's `prepared` event, which replaces it.

    An example that cannot be counted is no error: another tokeniser's template may take it.
    """

    def __init__(self, tokenizer: str, count: Count) -> None:
        self._name, self._lengths = tokenizer, Lengths(count)
        self._refused, self._reason = 0, ""

    def add(self, example: Example) -> None:
        try:
            self._lengths.add(example)
        except BadExample as error:
            self._refuse(error.reason)
        except (UnicodeError, RecursionError) as error:
            # Half a surrogate pair in a call's arguments, which only parsing them brings to light; too many brackets.
            self._refuse(f"its tool calls cannot be written out: {type(error).__name__}")

    def _refuse(self, reason: str) -> None:
        self._refused += 1
        # Of a template's own words: a database takes no NUL.
        self._reason = self._reason or reason[:300].replace("\0", "\ufffd")

    def result(self) -> dict[str, Any]:
        counted = self._lengths.result()
        found = {"tokenizer": self._name, "tokens": counted["tokens"]}
        if "tokens_learnt" in counted:
            found["trained_tokens"] = counted["tokens_learnt"]
        if lengths := counted["tokens_per_example"]:
            found |= {"shortest": lengths["min"], "median": lengths["median"], "longest": lengths["max"]}
        if self._refused:
            found |= {"not_counted": self._refused, "not_counted_because": self._reason}
        return {"tokens": found}
