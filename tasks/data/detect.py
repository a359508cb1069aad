"""Detects the form of the rows of an unknown file from their columns. Pure; docs/audit.md has the rules in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smoltulu.schemas.data import DatasetKind, RowFormat
from smoltulu.tasks.data.formats import FORMAT_FIELDS, KIND_FORMATS

#: Rows that are looked at.
SAMPLE_ROWS = 10_000

_USER_COLUMNS = ("prompt", "instruction", "question", "problem", "query", "text")
_ANSWER_COLUMNS = ("output", "response", "completion", "answer", "solution", "target")
_CHAT_COLUMNS = ("messages", "conversation", "conversations")
_EXPECTED = (
    "messages (turns with role and content); chosen and rejected; input, output_1, output_2 and label; one of "
    f"{', '.join(_USER_COLUMNS)} for what the user says, with or without one of {', '.join(_ANSWER_COLUMNS)}"
)


@dataclass(frozen=True)
class DetectedFormat:
    """How rows are read, and a sentence about it for the user."""

    kind: DatasetKind
    format: RowFormat
    fields: Mapping[str, str] = field(default_factory=dict)  # our field name -> column, where they differ
    said: str = ""


def detect_format(rows: Sequence[Any]) -> DetectedFormat:
    """The form of `rows`, the first ones of a data set.

    Raises:
        ValueError: no row, rows that are no objects, or columns that fit no form; with what is expected.
    """
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        raise ValueError("there is no row that is an object with columns" if rows else "there is no row")
    columns = _Columns(objects)
    found = (
        _preference(columns)
        or _preference_by_label(columns)
        or _conversation(columns)
        or _verified(columns)
        or _one_turn(columns)
    )
    if found is None:
        raise ValueError(
            f"the columns {', '.join(map(repr, columns.names))} fit no known form. Expected are: {_EXPECTED}. Say how "
            f"they are read: a format ({', '.join(sorted(FORMAT_FIELDS.keys() - {'text'}))}) and, where names differ, "
            "fields such as prompt=COLUMN"
        )
    return found


def format_as_given(name: RowFormat, fields: Mapping[str, str]) -> DetectedFormat:
    """A form that the user named. Raises ValueError for one that holds no conversations."""
    kind = next((kind for kind, formats in KIND_FORMATS.items() if name in formats), None)
    if kind is None:
        allowed = ", ".join(name for formats in KIND_FORMATS.values() for name in formats)
        raise ValueError(f"format {name!r} has no user turns; allowed are {allowed}")
    return DetectedFormat(kind, name, dict(fields), f"format {name}, as given")  # type: ignore[arg-type]


class _Columns:
    """The columns of some rows, found by name (upper or lower case) and by the kind of their values."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.names = list(dict.fromkeys(str(name) for row in rows for name in row))
        self._by_lower = {name.lower(): name for name in reversed(self.names)}

    def first(self, names: Sequence[str], holds: Callable[[Any], bool]) -> str | None:
        """The first of `names` that is a column whose values (those that are not null) are mostly `holds`."""
        return next(
            (column for name in names if (column := self._by_lower.get(name)) and self._mostly(column, holds)), None
        )

    def fullest(self, names: Sequence[str], holds: Callable[[Any], bool]) -> str | None:
        """Of the columns that `first` would take, the one that is empty least often; the earlier where they tie."""
        fitting = [column for name in names if (column := self.first((name,), holds))]
        return min(fitting, key=lambda column: sum(not row.get(column) for row in self.rows), default=None)

    def _mostly(self, column: str, holds: Callable[[Any], bool]) -> bool:
        values = [row[column] for row in self.rows if row.get(column) is not None]
        return bool(values) and 2 * sum(map(holds, values)) > len(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and "role" in turn and "content" in turn for turn in value
    )  # fmt: skip


def _is_text_or_chat(value: Any) -> bool:
    return _is_text(value) or _is_chat(value)


def _ends_with_assistant(value: Any) -> bool:
    return _is_chat(value) and value[-1]["role"] == "assistant"


def _starts_with_user(value: Any) -> bool:
    return _is_chat(value) and value[0]["role"] in ("system", "user")


def _fields(**columns: str) -> dict[str, str]:
    return {name: column for name, column in columns.items() if name != column}


def _preference(columns: _Columns) -> DetectedFormat | None:
    chosen = columns.first(("chosen",), _is_text_or_chat)
    rejected = columns.first(("rejected",), _is_text_or_chat)
    if chosen is None or rejected is None:
        return None
    fields = _fields(chosen=chosen, rejected=rejected)
    prompt = columns.first(("prompt", "question", "instruction", "input"), _is_text_or_chat)
    if prompt is not None:
        return DetectedFormat(
            "preference", "preference", fields | _fields(prompt=prompt), _say(prompt, chosen, rejected)
        )
    if columns.first((chosen.lower(),), _starts_with_user) is None:
        raise ValueError(
            f"the columns {chosen!r} and {rejected!r} are answers, but no column holds their prompt (columns: "
            f"{', '.join(map(repr, columns.names))}); name it with a field, prompt=COLUMN"
        )
    return DetectedFormat("preference", "preference", fields, _say(chosen, rejected))


def _preference_by_label(columns: _Columns) -> DetectedFormat | None:
    prompt = columns.first(("input", "prompt", "instruction"), _is_text)
    outputs = [columns.first((name,), _is_text) for name in ("output_1", "output_2")]
    if prompt is None or None in outputs or "label" not in columns.names:
        return None
    return DetectedFormat(
        "preference", "preference_by_label", _fields(input=prompt), _say(prompt, "output_1", "output_2", "label")
    )


def _conversation(columns: _Columns) -> DetectedFormat | None:
    column = columns.first(_CHAT_COLUMNS, _ends_with_assistant)
    return None if column is None else DetectedFormat("sft", "messages", _fields(messages=column), _say(column))


def _verified(columns: _Columns) -> DetectedFormat | None:
    """Rows of RLVR, read as a prompt and its ground truth: `rlvr` drops rows whose verifier is not known here."""
    truth = columns.first(("ground_truth",), _is_text)
    prompt = columns.first(("messages", *_USER_COLUMNS), _is_text_or_chat)
    if truth is None or prompt is None:
        return None
    fields = _fields(prompt=prompt, completion=truth)
    return DetectedFormat("sft", "prompt_completion", fields, _say(prompt, truth) + " (rows of RLVR)")


def _one_turn(columns: _Columns) -> DetectedFormat | None:
    user = columns.first(_USER_COLUMNS, _is_text_or_chat)
    if user is None:
        return None
    answer = columns.fullest(_ANSWER_COLUMNS, _is_text_or_chat)
    if answer is None or user.lower() == "text":
        if columns.first((user.lower(),), _is_text) is None:
            raise ValueError(f"the column {user!r} holds conversations that do not end with the assistant's turn")
        # A row needs an answer to be one; nothing but the user's turns is looked at.
        fields = _fields(prompt=user, completion=user)
        return DetectedFormat("sft", "prompt_completion", fields, f"{_say(user)} as the user's turn; no answers")
    if user.lower() == "instruction" and columns.first((user.lower(),), _is_text):
        more = columns.first(("input",), _is_text)
        fields = _fields(instruction=user, output=answer, **({"input": more} if more else {}))
        return DetectedFormat("sft", "instruction", fields, _say(user, *([more] if more else []), answer))
    if user.lower() in ("question", "problem", "query") and columns.first((user.lower(),), _is_text):
        return DetectedFormat("sft", "question_answer", _fields(question=user, answer=answer), _say(user, answer))
    return DetectedFormat("sft", "prompt_completion", _fields(prompt=user, completion=answer), _say(user, answer))


def _say(*columns: str) -> str:
    return f"columns {', '.join(columns)}" if len(columns) > 1 else f"column {columns[0]}"
