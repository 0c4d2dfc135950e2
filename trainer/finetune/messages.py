"""A conversation's messages as chat templates expect them. Imports no torch."""

import json
from typing import Any


def as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI has the arguments of a call as a string of JSON, templates as an object."""
    kept = {name: value for name, value in message.items() if name != "weight"}
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call
