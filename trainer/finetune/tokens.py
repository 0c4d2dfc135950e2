"""An example as tokens, with a mark for each whose prediction is learnt.

    chat     the template's text; learnt is what the assistant says, with the token that ends its turn
    prompt   the prompt, the completion, the end-of-text token; the latter two are learnt
    text     the text and the end-of-text token, all learnt

Prompts and texts begin with the token that the tokeniser puts before every text, where it has such a one. A prompt and
its completion are tokenised apart, as they are when the model is asked. The first token is predicted from nothing and
so never learnt. `train_on: all` learns every other one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trainer.datasetconfig import ExamplesDataset
from trainer.errors import SpecError
from trainer.examples import Chat, Example, Prompt, Text
from trainer.finetune.chat import Range, check_template, render, render_with_answers, template_of


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    marks: list[int]

    @property
    def learns(self) -> bool:
        return any(self.marks)


class Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, dataset: ExamplesDataset) -> None:
        if not tokenizer.is_fast:
            raise SpecError(
                "tokenizer: it cannot say which characters a token stands for (it is no fast one), which fine-tuning "
                "needs; give a directory with tokenizer.json"
            )
        self.template = template_of(tokenizer, dataset.chat_template)
        check_template(tokenizer, self.template)
        self._tokenizer, self._all = tokenizer, dataset.train_on == "all"
        first = tokenizer("", verbose=False)["input_ids"][:1]
        self._begin = first if first and first[0] == tokenizer.bos_token_id else []
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(self, example: Example) -> Tokens:
        """Whole, however long. Raises BadExample."""
        if isinstance(example, Chat):
            found = self._chat(example)
        elif isinstance(example, Prompt):
            prompt = [*self._begin, *self._ids(example.prompt)]
            completion = [*self._ids(example.completion), *self._end]
            found = Tokens([*prompt, *completion], [0] * len(prompt) + [1] * len(completion))
        else:
            assert isinstance(example, Text), "labels are another task's"
            ids = [*self._begin, *self._ids(example.text), *self._end]
            found = Tokens(ids, [1] * len(ids))
        return _first_unlearnt(Tokens(found.ids, [1] * len(found.ids)) if self._all else found)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _chat(self, chat: Chat) -> Tokens:
        if self._all:
            return Tokens(ids := self._ids(render(self._tokenizer, self.template, chat)), [1] * len(ids))
        text, learnt = render_with_answers(self._tokenizer, self.template, chat)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Tokens(list(found["input_ids"]), _marks(found["offset_mapping"], learnt))


def cut(tokens: Tokens, limit: int, truncation: str) -> Tokens | None:
    """At most `limit` of them; None where the example is to be left out (truncation: drop)."""
    if len(tokens.ids) <= limit:
        return tokens
    if truncation == "drop":
        return None
    part = slice(None, limit) if truncation == "end" else slice(len(tokens.ids) - limit, None)
    return _first_unlearnt(Tokens(tokens.ids[part], tokens.marks[part]))


def _first_unlearnt(tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids, [0, *tokens.marks[1:]])


def _marks(offsets: Sequence[Range], learnt: Sequence[Range]) -> list[int]:
    """1 for each token that has a character of one of the ranges. Both are in order."""
    marks, rest = [], list(reversed(learnt))
    for begin, end in offsets:
        while rest and rest[-1][1] <= begin:
            rest.pop()
        marks.append(int(bool(rest) and begin < rest[-1][1] and end > rest[-1][0]))
    return marks
