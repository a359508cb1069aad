"""The columns of some rows of an unknown form, and what kind of values they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smoltulu.tasks.data.formats import MalformedRow
from smoltulu.tasks.data.formats.columns import ALIASES
from smoltulu.tasks.data.formats.sft import listed
from smoltulu.tasks.data.formats.transcripts import is_transcript
from smoltulu.tasks.data.formats.turns import CONTENT_KEYS, ROLE_KEYS, first_role
from smoltulu.tasks.data.formats.values import is_empty, parsed_json


class Columns:
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

    def named(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is a column, whatever it holds."""
        return next((column for name in names if (column := self._by_lower.get(name))), None)

    def values(self, column: str) -> list[Any]:
        """Values of a column that are not null."""
        return [row[column] for row in self.rows if row.get(column) is not None]

    def _mostly(self, column: str, holds: Callable[[Any], bool]) -> bool:
        values = self.values(column)
        return bool(values) and 2 * sum(map(holds, values)) > len(values)

    def system(self) -> list[str]:
        """The columns with a system prompt or tools, which every form reads where a row has them."""
        names = (*ALIASES["system"], *ALIASES["tools"])
        return [column for name in names if (column := self.first((name,), lambda value: not is_empty(value)))]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def turns_in(value: Any) -> Any:
    """A list of turns, also where it stands in a text as JSON."""
    try:
        return listed(value, "")
    except MalformedRow:
        return value


def is_chat(value: Any) -> bool:
    found = turns_in(value)
    return isinstance(found, list) and bool(found) and all(
        isinstance(turn, dict)
        and any(key in turn for key in ROLE_KEYS)
        and any(key in turn for key in (*CONTENT_KEYS, "tool_calls"))
        for turn in found
    )  # fmt: skip


def is_text_or_chat(value: Any) -> bool:
    return is_text(value) or is_chat([value] if isinstance(value, dict) else value)


def asks(value: Any) -> bool:
    return last_role(value) in ("user", "tool")


def last_role(value: Any) -> str | None:
    return first_role(turns_in(value)[-1:]) if is_chat(value) else None


def ends_with_assistant(value: Any) -> bool:
    return last_role(value) in ("assistant", "call")


def starts_with_user(value: Any) -> bool:
    return is_transcript(value) or (is_chat(value) and first_role(turns_in(value)) in ("system", "developer", "user"))


def is_label(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def is_scored(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def are_calls(value: Any) -> bool:
    try:
        calls = parsed_json(value, "") if isinstance(value, str) else value
    except MalformedRow:
        return False
    return is_scored(calls) and all("name" in call and "arguments" in call for call in calls)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
