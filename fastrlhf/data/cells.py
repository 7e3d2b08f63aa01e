"""What a cell may hold: a string, or a conversation as a list of {"role", "content"} messages."""

from __future__ import annotations

import math

from datasets import Dataset

Message = dict[str, object]
Text = str | list[Message]

# Anthropic's hh-rlhf writes a conversation as one string; the last turn begins after this mark.
LAST_TURN = "\n\nAssistant:"


def require_dataset(dataset: object, purpose: str) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{purpose}: a datasets.Dataset is wanted, {type(dataset).__name__} given. Pick one split of a DatasetDict "
            "(dataset['train']); make rows into one with Dataset.from_list(rows)."
        )
    if len(dataset) == 0:
        raise ValueError(f"{purpose}: the data set is empty, at least one row is wanted")


def wrong_columns(dataset: Dataset, purpose: str, layouts: str) -> ValueError:
    return ValueError(
        f"{purpose}: the data set has the columns {', '.join(dataset.column_names) or '(none)'}; wanted {layouts}. "
        "Rename yours with dataset.rename_column(old, new)."
    )


def wrong_cell(row: int, column: str, value: object, wanted: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"row {row}, column {column!r}: {type(value).__name__} {shown} given, wanted {wanted}")


def check_string(value: object, column: str, row: int) -> str:
    if not isinstance(value, str):
        raise wrong_cell(row, column, value, "a string")
    return value


def check_messages(value: object, column: str, row: int) -> list[Message]:
    if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
        raise wrong_cell(row, column, value, "a non-empty list of messages {'role': string, 'content': string}")
    return value


def check_text(value: object, column: str, row: int) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
        raise wrong_cell(row, column, value, "a string, or a non-empty list of messages {'role': ..., 'content': ...}")
    return value


def check_number(value: object, column: str, row: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_cell(row, column, value, "a finite number")
    return float(value)


def _is_message(value: object) -> bool:
    """Content may be a string, a list of parts, or absent beside tool calls; the chat template has the last word."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def as_messages(value: Text, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def join(prompt: Text, completion: Text) -> tuple[list[Message], int]:
    """One conversation and how many of its messages are the prompt, which the completion may already begin with."""
    head, tail = as_messages(prompt, "user"), as_messages(completion, "assistant")
    if [_said(message) for message in tail[: len(head)]] == [_said(message) for message in head]:
        return tail, len(head)
    return head + tail, len(head)


def chat_of(prompt: Text, completion: Text) -> list[Message] | None:
    """The conversation that they are, or None where both are plain text."""
    return None if isinstance(prompt, str) and isinstance(completion, str) else join(prompt, completion)[0]


def _said(message: Message) -> tuple[object, object]:
    return message.get("role"), message.get("content")


def last_assistant_turn(messages: list[Message], column: str, row: int) -> int:
    """Index of the last message by the assistant, which needs something before it to answer."""
    for index in range(len(messages) - 1, 0, -1):
        if messages[index]["role"] == "assistant":
            return index
    roles = ", ".join(str(message["role"]) for message in messages)
    raise ValueError(
        f"row {row}, column {column!r}: no assistant turn after another message (roles: {roles}); there is nothing to "
        "answer. Leave such rows out with dataset.filter(...)."
    )


def split_transcript(text: str, column: str, row: int) -> tuple[str, str]:
    """A transcript cut after its last "\\n\\nAssistant:" into prompt and response."""
    head, mark, tail = text.rpartition(LAST_TURN)
    if not mark:
        raise wrong_cell(row, column, text, "a transcript with a turn that begins with '\\n\\nAssistant:'")
    return head + mark, tail
