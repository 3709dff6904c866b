"""Conversations in the formats that people keep them in, as lists of messages with roles and contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""`role` and `content`, and whatever else a template may read, such as `tool_calls`."""

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
"""Roles by the other names that they have in data."""
BEFORE = {
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
    "system": (None,),
}
"""The roles that each may follow; None: it may open the conversation."""


def from_messages(value: Any) -> Any:
    """A list of `{role, content}`; the roles by the names that templates use."""
    return _renamed(value, "role", "content")


def from_sharegpt(value: Any) -> Any:
    """A list of `{from, value}`."""
    return _renamed(value, "from", "value")


def from_alpaca(instruction: Any, context: Any, answer: Any) -> list[Message]:
    """An instruction with what it is about below it, and the answer if there is one."""
    asked = f"{instruction}\n{context}" if isinstance(context, str) and context.strip() else instruction
    messages = [{"role": "user", "content": asked}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The same, opened by a system text unless it has its own."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def with_turns_first(messages: list[Message], shown: Sequence[Message]) -> list[Message]:
    """The same after other turns, below the system text."""
    opening = 1 if messages and messages[0]["role"] == "system" else 0
    return [*messages[:opening], *shown, *messages[opening:]]


def fault(messages: Any, answered: bool) -> str | None:
    """Why a conversation is of no use, in a few words that many rows share; None when it is.

    Args:
        answered: the assistant must have said something.
    """
    if not isinstance(messages, list) or not messages:
        return "no messages"
    before: str | None = None
    for message in messages:
        found = _message_fault(message, before)
        if found:
            return found
        before = message["role"]
    roles = {message["role"] for message in messages}
    if answered and "assistant" not in roles:
        return "no assistant turn"
    return None if "user" in roles else "no user turn"


def _message_fault(message: Any, before: str | None) -> str | None:
    if not isinstance(message, Mapping) or "role" not in message:
        return "a message without a role"
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"unknown role '{role}'"
    if content is not None and not isinstance(content, str):
        return "content that is not text"
    if not (content or "").strip() and not (role == "assistant" and message.get("tool_calls")):
        return f"an empty {role} turn"
    if before not in BEFORE[role]:
        return f"turns out of order ({role} {'first' if before is None else f'after {before}'})"
    return None


def _renamed(value: Any, role: str, content: str) -> Any:
    """Messages with our names for keys and roles; what is no message stays for `fault` to tell of."""
    if not isinstance(value, list):
        return value
    return [_message(one, role, content) if isinstance(one, Mapping) else one for one in value]


def _message(one: Mapping[str, Any], role: str, content: str) -> Message:
    others = {key: value for key, value in one.items() if key not in (role, content) and value is not None}
    if role not in one:
        return others
    speaker = one[role]
    named = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": named, "content": one.get(content), **others}
