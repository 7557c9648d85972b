"""Read one conversation from a line of JSON: messages and tools, or the reason why it is left out."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from elastic.corpus.files import SkipReason

LossOn = Literal["all", "response", "last_response"]
ASSISTANT = "assistant"
TEXT_FIELDS = ("role", "content", "reasoning_content", "tool_call_id", "name")
MESSAGE_FIELDS = {*TEXT_FIELDS, "tool_calls"}
COLUMNS = ("messages", "tools")


@dataclass(frozen=True)
class Conversation:
    """The messages of one conversation, fields of null left out, and the tools that were offered, None if none."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    def content(self) -> bytes:
        """Return the same bytes for the same conversation, whatever the order of its fields."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False).encode()

    @property
    def ends_without_answer(self) -> bool:
        """Tell whether the last message is not the assistant's."""
        return bool(self.messages[-1]["role"] != ASSISTANT)


def parse_object(line: str) -> dict[str, Any] | SkipReason:
    """Read the JSON object that a line holds."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return SkipReason.INVALID_JSON
    return record if isinstance(record, dict) else SkipReason.NOT_AN_OBJECT


def parse_conversation(line: str, loss_on: LossOn) -> Conversation | SkipReason:
    """Read `{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`; other top-level fields are ignored.

    A message's fields all mean something to a template, so one that is not known leaves the conversation out. So does
    an answer of the assistant without content and calls: it was never given, or cut off within its thoughts. A
    conversation without any answer is left out unless the loss is taken on everything.
    """
    record = parse_object(line)
    if isinstance(record, SkipReason):
        return record
    messages, tools = record.get("messages"), record.get("tools") or None
    if messages is None:
        return SkipReason.MISSING_FIELD
    if messages == []:
        return SkipReason.EMPTY
    if not _is_objects(messages) or not (tools is None or _is_objects(tools)):
        return SkipReason.BAD_MESSAGE
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if reason := _message_problem(message):
            return reason
    if loss_on != "all" and not any(message["role"] == ASSISTANT for message in messages):
        return SkipReason.NO_RESPONSE
    return Conversation(messages, tools)


def _message_problem(message: dict[str, Any]) -> SkipReason | None:
    if not message.get("role"):
        return SkipReason.MISSING_ROLE
    if message.keys() - MESSAGE_FIELDS:
        return SkipReason.UNKNOWN_FIELD
    if not all(isinstance(message.get(name, ""), str) for name in TEXT_FIELDS):
        return SkipReason.BAD_MESSAGE
    calls = message.get("tool_calls") or []
    if not _is_objects(calls):
        return SkipReason.BAD_MESSAGE
    if message["role"] == ASSISTANT and not calls and not message.get("content", "").strip():
        return SkipReason.EMPTY_ANSWER
    return None


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
