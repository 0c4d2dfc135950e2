"""Conversations as text, by a chat template, and which of its characters the assistant says.

A template that marks them itself, by {% generation %}, is believed. Of another one it is found out by rendering the
conversation up to each of the assistant's messages, with the header that invites an answer, and through it: what was
added is the answer, with what ends its turn. A template may write an answer otherwise once more follows (without its
reasoning, mostly): then the answer goes from its header to the special token that ends its turn. Where not even what
comes before an answer stays as it was, nobody can tell, and the example is refused.
"""

import re
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.errors import SpecError
from trainer.examples import BadExample, Chat
from trainer.finetune.messages import as_templates_expect
from trainer.tokenizer import ends_of_text

# For a tokeniser that has none: each message below its role; the end-of-text token after what the assistant says.
PLAIN_TEMPLATE = """\
{%- if tools %}{{ 'Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif -%}
{%- for message in messages -%}
{{- (message['role'] | capitalize) + ':\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] or '' -}}
{%- if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif -%}
{{- eos_token or '' -}}
{%- endgeneration -%}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif -%}
"""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Range = tuple[int, int]


def template_of(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str | dict[str, str]:
    """What was asked for, else the tokeniser's own (several by name, with some), else the plain one."""
    return wanted or tokenizer.chat_template or PLAIN_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str], chat: Chat) -> str:
    """The conversation as text. Raises BadExample."""
    messages, text_of = _prepared(tokenizer, template, chat)
    return text_of(messages)


def render_with_answers(
    tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str], chat: Chat
) -> tuple[str, list[Range]]:
    """(the same, the ranges of its characters that are learnt). A message of weight 0 is not. Raises BadExample."""
    messages, text_of = _prepared(tokenizer, template, chat)
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = [index for index in said if chat.messages[index].get("weight", 1)]
    if text_of.marks:
        text, ranges = text_of.marked(messages)
        if len(learnt) == len(said):
            return text, ranges
        if len(ranges) != len(said):
            raise BadExample(
                f"messages have weights, but the chat template marks {len(ranges)} parts of a conversation in which "
                f"the assistant speaks {len(said)} times; leave the weights out, or give dataset.chat_template"
            )
        return text, [part for index, part in zip(said, ranges, strict=True) if index in learnt]
    text = text_of(messages)
    return text, [text_of.added_by(messages, index, text) for index in learnt]


def _prepared(
    tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str], chat: Chat
) -> tuple[list[dict[str, Any]], "_Renderer"]:
    messages, tools = (
        [as_templates_expect(message) for message in chat.messages],
        list(chat.tools) if chat.tools else None,
    )
    return messages, _Renderer(tokenizer, template, tools)


class _Renderer:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str], tools: list[dict[str, Any]] | None
    ) -> None:
        if isinstance(template, dict):
            try:
                template = tokenizer.get_chat_template(None, tools)
            except ValueError as error:
                raise BadExample(
                    f"the tokeniser has several chat templates ({', '.join(sorted(template))}) and none is its "
                    "default; give the one that is meant as dataset.chat_template"
                ) from error
        self._template: str = template
        self._tools: Any = tools
        self._special: dict[str, Any] = {
            key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        self._ends = _special_tokens(tokenizer)
        self.marks = bool(_GENERATION.search(template))

    def __call__(self, messages: list[dict[str, Any]], invite: bool = False) -> str:
        return self._render(messages, invite, False)[0]

    def marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[Range]]:
        text, ranges = self._render(messages, False, True)
        return text, [(int(begin), int(end)) for begin, end in ranges]

    def added_by(self, messages: list[dict[str, Any]], index: int, text: str) -> Range:
        """The characters of `text`, the whole conversation, that the message adds behind its header."""
        before = self(messages[:index], invite=True) if index else ""
        through = self(messages[: index + 1])
        end = next((token for token in self._ends if through.rstrip().endswith(token)), None)
        if text.startswith(before) and not text.startswith(through) and end and end in text[len(before) :]:
            return len(before), text.index(end, len(before)) + len(end)
        if not through.startswith(before) or not text.startswith(through):
            raise BadExample(
                f"the chat template writes what comes before messages[{index}], or it, otherwise when more follows, "
                "so what the assistant says cannot be told from the rest; give dataset.chat_template with "
                "{% generation %} … {% endgeneration %} around it, or train on all tokens (train_on: all)"
            )
        # A line's end after the token that ends the turn comes from the template; no model is asked for it.
        return len(before), len(through if end is None else through.rstrip())

    def _render(self, messages: list[dict[str, Any]], invite: bool, marked: bool) -> tuple[str, Any]:
        try:
            found: Any = render_jinja_template(
                conversations=[messages],
                tools=self._tools,
                chat_template=self._template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=invite,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadExample(f"the chat template refuses the conversation: {error}") from error
        texts, ranges = found
        return texts[0], ranges[0] if marked else []


def ends_of_answers(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[int]:
    """The tokens that end what a fine-tuned model says: those of any text, and the template's end of a turn.

    `template` is the tokeniser's where none is given.
    """
    turn = end_of_turn(tokenizer, template)
    return sorted({*ends_of_text(config, tokenizer)} | (set() if turn is None else {turn}))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> int | None:
    """The token by which the template ends what the assistant says; None where it has none for it, or refuses the
    shortest of conversations.
    """
    template = wanted or tokenizer.chat_template
    if not template:
        return None
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "."})
    try:
        text = render(tokenizer, template, Chat(messages, None)).rstrip()
    except BadExample:
        return None
    end = next((token for token in _special_tokens(tokenizer) if text.endswith(token)), None)
    found = None if end is None else tokenizer.convert_tokens_to_ids(end)
    return found if isinstance(found, int) else None


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those that have a role, and those that were added as special without one, as Llama 3's <|eot_id|>."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def check_template(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str]) -> None:
    """Raises SpecError for a template that cannot be read."""
    for text in template.values() if isinstance(template, dict) else [template]:
        try:
            render_jinja_template(conversations=[], chat_template=text)
        except TemplateError as error:
            raise SpecError(f"dataset.chat_template: is no template that can be read: {error}") from error
