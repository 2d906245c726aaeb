"""Conversations to learn from, as OpenAI's training files have them: messages, and the tools that they call.

{"messages": [{"role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content"}], "tools"}, with
each content a text or a list of {"type": "text", "text"}. What is null counts as left out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jaxserve.adapters.fields import show
from jaxserve.adapters.files import strict_json
from jaxserve.chat_template import REASONING, content_text

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("content", "name", "tool_call_id", *REASONING)
_OPTIONAL = {  # role -> the keys that its messages may have beside role and content
    **dict.fromkeys(ROLES, ("name",)),
    "assistant": ("name", "weight", "tool_calls", *REASONING),
    "tool": ("name", "tool_call_id"),
}


@dataclass(frozen=True)
class Chat:
    """A conversation; ``weights`` holds 1 for every message that is learnt and 0 for the others."""

    messages: tuple[Mapping[str, Any], ...]
    weights: tuple[int, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # descriptions of functions, for the chat template


def parse_chat(value: Mapping[str, Any]) -> Chat:
    """The conversation that a record with messages is. Raises ValueError with the reason."""
    messages = value["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a list of at least one message")
    checked = _each("messages", messages, _checked_message)
    if checked[-1]["role"] != "assistant":
        raise ValueError("nothing to learn: the last message must be the assistant's")
    weights = tuple(int(m.pop("weight", 1)) if m["role"] == "assistant" else 0 for m in checked)
    if not any(weights):
        raise ValueError("nothing to learn: every assistant message has weight 0")
    if not isinstance(value.get("parallel_tool_calls"), bool | None):  # of requests: no template reads it
        raise ValueError("parallel_tool_calls must be true or false")
    return Chat(tuple(checked), weights, _tools(value.get("tools")))


def check_keys(value: Mapping[str, Any], keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raises ValueError where one of ``keys`` is missing, or there is one beside those and the optional ones."""
    unknown = [key for key in value if key not in keys + optional]
    if unknown:
        raise ValueError(f"unknown key {show(unknown[0])}, known here are {', '.join(keys + optional)}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"key {missing[0]!r} is missing")


def check_text(key: str, text: Any) -> str:
    """The text itself. Raises ValueError for anything but a string of Unicode without NUL."""
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string")
    if "\0" in text:
        raise ValueError(f"{key} holds NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} is not Unicode: it holds half of a surrogate pair") from None
    return text


def _each(name: str, values: Sequence[Any], check: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``check`` makes of each value; its ValueErrors say which one it was."""
    checked = []
    for place, value in enumerate(values):
        try:
            checked.append(check(value))
        except ValueError as error:
            raise ValueError(f"{name}[{place}]: {error}") from None
    return checked


def _checked_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError("must be an object")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role", "user")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}")
    if "tool_calls" in given and role == "assistant":
        check_keys(given, ("role",), ("content", *_OPTIONAL[role]))
        given["tool_calls"] = _tool_calls(given["tool_calls"])
    else:
        check_keys(given, ("role", "content"), _OPTIONAL[role])
    texts = {key: given[key] for key in _TEXTS if key in given}
    if isinstance(parts := given.get("content"), list | tuple):
        texts["content"] = content_text(parts)
        _each("content", parts, _checked_part)
    for key, text in texts.items():
        check_text(key, text)
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise ValueError("weight must be 0 or 1")
    if role == "assistant" and weight and not (texts.get("content") or given.get("tool_calls")):
        raise ValueError("nothing to learn: the assistant's content is empty")
    return given


def _checked_part(part: Mapping[str, Any]) -> dict[str, Any]:
    check_keys(part, ("type", "text"))
    return dict(part)


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ValueError("tool_calls must be a list")
    return _each("tool_calls", calls, _checked_call)


def _checked_call(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object."""
    if not isinstance(call, Mapping):
        raise ValueError("must be an object")
    check_keys(call, ("function",), ("id", "type", "index"))
    function = call["function"]
    if not isinstance(function, Mapping):
        raise ValueError("function must be an object")
    check_keys(function, ("name", "arguments"))
    if not check_text("name", function["name"]):
        raise ValueError("name is empty")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = strict_json(arguments.encode(), "")
    if not isinstance(arguments, Mapping):
        raise ValueError("arguments must be a JSON object, or a string that holds one")
    others = {key: value for key, value in call.items() if value is not None}
    return _json("it", {**others, "function": {"name": function["name"], "arguments": arguments}})


def _tools(tools: Any) -> tuple[Any, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools must be a list of objects")
    return tuple(_json("tools", tools))


def _json(what: str, value: Any) -> Any:
    """A copy of ``value`` as JSON holds it. Raises ValueError where it cannot."""
    try:
        text = json.dumps(value, allow_nan=False)
        copy = strict_json(text.encode(), "")
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{what} must be JSON in Unicode, not deeply nested") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise ValueError(f"{what} holds NUL")
    return copy
