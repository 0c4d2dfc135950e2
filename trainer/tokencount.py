"""How many tokens an example has by a tokeniser of transformers', as training tokenises it."""

from trainer.datasetconfig import ExamplesDataset
from trainer.examples import BadExample, Example, Labelled
from trainer.finetune.tokens import Encoder
from trainer.tokenizer import load_tokenizer


class TokenCounter:
    """Raises SpecError for a tokeniser that cannot be loaded, or used, and TrainerError where the hub is away."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        # Its files are of no matter here, nor its length: examples are counted whole.
        self._encoder = Encoder(self._tokenizer, ExamplesDataset(files=("-",)))

    def __call__(self, example: Example) -> tuple[int, int | None]:
        """(tokens, those that are learnt; None of a label). Raises BadExample where the chat template refuses it."""
        if isinstance(example, Labelled):
            texts = [example.text] if example.pair is None else [example.text, example.pair]
            return len(self._tokenizer(*texts, verbose=False)["input_ids"]), None
        tokens = self._encoder.encode(example)
        if not tokens.learns:
            raise BadExample("no token of it is learnt")
        return len(tokens.ids), sum(tokens.marks)
