"""Tokens into text that is fit to be shown: whole characters only, and nothing of a stop string. Imports no torch."""

from collections.abc import Callable, Sequence

# What decoders write for bytes that are no character, or none yet.
_UNFINISHED = "\ufffd"


class Spoken:
    """The text of tokens that come one by one; `decode` makes text of some, special ones left out.

    A character may be made of several tokens, and how a token reads may depend on the one before it (a word's first one
    brings its space, except at the start). So the last tokens that were shown are decoded together with the new ones,
    and what they add is new; where it ends in the middle of a character, it waits for the next token.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """`before`: the last tokens of what the text continues."""
        self._decode = decode
        self._stops = stops
        self._before: list[int] = list(before)
        self._new: list[int] = []
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now; nothing behind a stop string."""
        if self.stopped:
            return ""
        self._new.append(token)
        text = self._text_of_new()
        if text.endswith(_UNFINISHED) or not text:
            return ""
        self._before, self._new = self._new, []
        return self._until_stop(text)

    def end(self) -> str:
        """What was held back, when no token follows any more."""
        text = "" if self.stopped else self._until_stop(self._text_of_new())
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _text_of_new(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]

    def _until_stop(self, text: str) -> str:
        """Without what may be the beginning of a stop string."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
