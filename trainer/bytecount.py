"""How many tokens an example has by the tokeniser `bytes`, counted without a tokeniser: each byte is one, and so is the
end-of-text token, written out as well. Imports no torch.

The numbers are those of trainer/tokencount.py for trainer.tokenizer.byte_tokenizer, which the tests hold them to; of a
conversation those of trainer.finetune.chat.PLAIN_TEMPLATE, since `bytes` has no template of its own.
"""

import json
from typing import Any

from trainer.examples import BadExample, Chat, Example, Labelled, Prompt
from trainer.finetune.messages import as_templates_expect

END_OF_TEXT = "<|endoftext|>"


def count_bytes(example: Example) -> tuple[int, int | None]:
    """(tokens, those that are learnt; None of a label). Raises BadExample where none is."""
    if isinstance(example, Labelled):
        return _tokens(example.text) + _tokens(example.pair or ""), None
    if isinstance(example, Chat):
        tokens, learnt = _of_chat(example)
    elif isinstance(example, Prompt):
        prompt, completion = _tokens(example.prompt), _tokens(example.completion) + 1
        # The first token is predicted from nothing, and not learnt.
        tokens, learnt = prompt + completion, completion - (prompt == 0)
    else:
        learnt = _tokens(example.text)
        tokens = learnt + 1
    if not learnt:
        raise BadExample("no token of it is learnt")
    return tokens, learnt


def _of_chat(chat: Chat) -> tuple[int, int]:
    tokens = _tokens(f"Tools:\n{_json(chat.tools)}\n\n") if chat.tools else 0
    learnt = 0
    for given in chat.messages:
        message = as_templates_expect(given)
        said, end = message.get("content") or "", 0
        if message["role"] == "assistant":
            said += _json(message["tool_calls"]) if message.get("tool_calls") else ""
            end = 1
            learnt += (_tokens(said) + end) * given.get("weight", 1)
        tokens += _tokens(f"{message['role'].capitalize()}:\n") + _tokens(said) + end + _tokens("\n\n")
    return tokens, learnt


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tokens(text: str) -> int:
    return len(text.encode()) - text.count(END_OF_TEXT) * (len(END_OF_TEXT) - 1)
