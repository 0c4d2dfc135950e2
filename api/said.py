"""What /v1/chat/completions and /v1/completions answer, in OpenAI's shapes."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from trainer.generation.protocol import Began, Ended, Line, Piece


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SaidMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """What a choice has at both."""

    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatChoice(Choice):
    message: SaidMessage


class TextChoice(Choice):
    text: str


class Completion(BaseModel):
    """What both answer."""

    id: str
    created: int
    model: str
    usage: Usage
    system_fingerprint: None = None


class ChatCompletion(Completion):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextCompletion(Completion):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Chat:
    """Of one request; the same id in all that is said of it."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str) -> None:
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, lines: Sequence[Line]) -> Completion:
        choices = [
            ChatChoice(index=end.index, message=SaidMessage(content=text), finish_reason=end.finish_reason)
            for end, text in _choices(lines)
        ]
        return ChatCompletion(**self._said(lines), choices=choices)

    def first(self, index: int) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": "", "refusal": None}} | _OPEN

    def piece(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "delta": {"content": piece.text}} | _OPEN

    def last(self, end: Ended) -> dict[str, Any]:
        return {"index": end.index, "delta": {}, "logprobs": None, "finish_reason": end.finish_reason}

    def _said(self, lines: Sequence[Line]) -> dict[str, Any]:
        return {key: self.head[key] for key in ("id", "created", "model")} | {"usage": usage_of(lines)}


class Text(Chat):
    kind, prefix = "text_completion", "cmpl"

    def whole(self, lines: Sequence[Line]) -> Completion:
        choices = [
            TextChoice(index=end.index, text=text, finish_reason=end.finish_reason) for end, text in _choices(lines)
        ]
        return TextCompletion(**self._said(lines), choices=choices)

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "text": piece.text} | _OPEN

    def last(self, end: Ended) -> dict[str, Any]:
        return {"index": end.index, "text": "", "logprobs": None, "finish_reason": end.finish_reason}


_OPEN: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def usage_of(lines: Sequence[Line]) -> Usage:
    prompt = sum(line.prompt_tokens for line in lines if isinstance(line, Began))
    completion = sum(line.tokens for line in lines if isinstance(line, Ended))
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _choices(lines: Sequence[Line]) -> Iterator[tuple[Ended, str]]:
    for end in lines:
        if isinstance(end, Ended):
            yield end, "".join(line.text for line in lines if isinstance(line, Piece) and line.index == end.index)
