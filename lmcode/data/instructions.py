"""Instruction data: rows of JSON that are a prompt with its completion, or a conversation, as text with marked answers.

`{"prompt": ..., "completion": ...}` becomes the prompt and right after it the completion, unchanged. `{"messages":
[{"role": ..., "content": ...}, ...]}` is written as plain text, with an empty line between two messages and none after the
last:

    user: What is the capital of France?

    assistant: Paris.

Only completions, and what "assistant" says, are targets of the loss: from the space after "assistant:" to the empty line,
or to the end token of a document that ends with an answer. All other text is read, and written to memory, but not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcode.config import ConfigError

LEARNED = "assistant"
BETWEEN = "\n\n"

Part = tuple[str, bool]  # text, and whether it is learned
Check = Callable[[Any, str], str]  # of a value and what to call it: the value, if it is text


class Instruction(str):
    """The text of a document of which only some parts are learned."""

    parts: tuple[Part, ...]

    def __new__(cls, parts: Sequence[Part]) -> Instruction:
        text = super().__new__(cls, "".join(text for text, _ in parts))
        text.parts = tuple(parts)
        return text


def parts_of(text: str) -> tuple[Part, ...]:
    """A document's parts; of plain text one, all of which is learned."""
    return text.parts if isinstance(text, Instruction) else ((text, True),)


def is_instruction(row: dict[str, Any]) -> bool:
    return isinstance(row.get("messages"), list) or {"prompt", "completion"} <= row.keys()


def instruction_of(row: dict[str, Any], place: str, check: Check) -> Instruction:
    """The text of a row that `is_instruction`, read from `place`.

    Raises:
        ConfigError: for what is no text, messages of another shape, or a conversation in which "assistant" says nothing.
    """
    messages = row.get("messages")
    if not isinstance(messages, list):
        return Instruction([(check(row["prompt"], "prompt"), False), (check(row["completion"], "completion"), True)])
    if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages):
        raise ConfigError(f"field 'messages' of '{place}' must be a list of objects with role and content")
    said = [(check(one["role"], "role"), check(one["content"], "content")) for one in messages]
    if LEARNED not in (role for role, _ in said):
        raise ConfigError(f"field 'messages' of '{place}' needs a message whose role is '{LEARNED}': got "
                          f"{', '.join(role for role, _ in said) or 'none'}")
    parts: list[Part] = []
    for number, (role, content) in enumerate(said, start=1):
        end = BETWEEN if number < len(said) else ""
        parts += [(f"{role}:", False), (f" {content}{end}", role == LEARNED)]
    return Instruction(parts)
