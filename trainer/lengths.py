"""How many tokens examples have, and how many of them are learnt: as training tokenises them."""

from array import array
from typing import Any

from trainer.datasetconfig import ExamplesDataset
from trainer.examine import spread
from trainer.examples import BadExample, Example, Labelled
from trainer.finetune.tokens import Encoder
from trainer.tokenizer import load_tokenizer


class Lengths:
    """Of examples, as they pass by. Raises SpecError for a tokeniser that cannot be loaded, or used."""

    def __init__(self, tokenizer: str, sequence_length: int | None) -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        # Its files are of no matter here, nor its length: examples are counted whole.
        self._encoder = Encoder(self._tokenizer, ExamplesDataset(files=("-",)))
        self._limit, self._lengths, self._learnt = sequence_length, array("Q"), 0

    def add(self, example: Example) -> None:
        """Raises BadExample where the chat template refuses it."""
        if isinstance(example, Labelled):
            texts = [example.text] if example.pair is None else [example.text, example.pair]
            self._lengths.append(len(self._tokenizer(*texts, verbose=False)["input_ids"]))
            return
        tokens = self._encoder.encode(example)
        if not tokens.learns:
            raise BadExample("no token of it is learnt")
        self._lengths.append(len(tokens.ids))
        self._learnt += sum(tokens.marks)

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": sum(self._lengths), "tokens_per_example": spread(self._lengths)}
        if self._learnt:
            found["tokens_learnt"] = self._learnt
        if self._limit is not None:
            found["longer_examples"] = sum(length > self._limit for length in self._lengths)
        return found
