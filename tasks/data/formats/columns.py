"""One row while a form reads it: which columns it read, and what the others mean.

Nothing is left out in silence. A column that no field reads is counted; one that would change what the row means (a
label that says "bad answer", an image, earlier turns) makes the row malformed, with its name, until the source's
`ignore` says that it is to be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.formats.values import EmptyAnswer, MalformedRow, is_empty, text_of

#: Other names of a field that a row may have without being asked: the first that is not empty is read.
ALIASES: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt", "system_message", "system_instruction"),
    "tools": ("tools", "functions"),
    "reasoning_content": ("reasoning_content",),
    "history": ("history",),
    "score_chosen": ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "rating_chosen", "reward_chosen",
                     "chosen_reward", "chosen-score"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected-rating", "rejected_rating", "rating_rejected",
                       "reward_rejected", "rejected_reward", "rejected-score"),
    "margin": ("margin", "score_margin", "score_diff"),
}  # fmt: skip


def _never(value: Any) -> bool:
    return False


def _is_yes(value: Any) -> bool:
    return value is True or (_is_number(value) and value == 1) or _word(value) in ("true", "1", "1.0", "yes")


def _is_not_no(value: Any) -> bool:
    """Anything but a plain no: false, 0, a number below, or a text that says so."""
    return not (value is False or (_is_number(value) and value <= 0) or _word(value) in ("false", "0", "0.0", "no"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _word(value: Any) -> str:
    return value.strip().lower() if isinstance(value, str) else ""


#: Columns (and keys of turns) that change what a row means -> whether a value of theirs changes nothing after all.
CHANGES_MEANING: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "documents"), _never),
    **dict.fromkeys(("image_url", "image_urls", "image_path", "image_paths", "pixel_values"), _never),
    **dict.fromkeys(("chat_history", "conversation_history", "dialogue_history", "previous_turns"), _never),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_choice"), _never),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "history", "chat_template_kwargs"), _never),
    **dict.fromkeys(("system", "system_prompt", "system_message", "system_instruction"), _never),
    **dict.fromkeys(("mask", "masked", "loss_mask", "train_mask", "train_detail"), _never),
    **dict.fromkeys(("weight", "loss_weight", "sample_weight", "loss_scale"), _is_yes),
    **dict.fromkeys(("train", "trainable", "loss"), _is_yes),
    **dict.fromkeys(("label", "score", "rating", "reward", "is_good", "is_correct", "is_desirable"), _is_not_no),
    **dict.fromkeys(("kto_tag", "desirable", "is_chosen", "is_preferred", "thumbs_up"), _is_not_no),
}
#: The same for keys that only turns have.
TURN_CHANGES_MEANING = dict.fromkeys(("channel", "recipient", "attachments", "files", "prefix"), _never)
#: What a pair, or a prompt with a truth, may say about itself without another meaning for its training.
OF_PAIRS = ("score", "rating", "reward", "reasoning", "thinking")
OF_TRUTHS = (*OF_PAIRS, "label", "is_correct")
#: Columns that belong to the prompt of a row whose turns are single texts.
PROMPT_PARTS = ("context", "input", "passage", "choices", "options", "paragraph", "document")

_MAX_NAME = 80


def _without_marks(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


_ONE_SPELLING = {_without_marks(name): name for name in (*CHANGES_MEANING, *TURN_CHANGES_MEANING)}


@lru_cache(1024)
def meaning_of(name: Any) -> str:
    """A name as the lists here have it, however it is spelt: systemInstruction, System-Instruction."""
    return _ONE_SPELLING.get(_without_marks(name), name.lower()) if isinstance(name, str) else ""


class Row:
    """The columns of one row, by the names of our fields. Attributes: unread, noticed (both names, each once)."""

    __slots__ = ("_read", "ignored", "noticed", "source", "texts", "unread", "values")

    def __init__(self, values: dict[str, Any], source: DataSource) -> None:
        self.source = source
        self._read: set[str] = set()
        self.unread: set[str] = set()
        self.noticed: set[str] = set()
        self.ignored: set[str] = set()
        self.texts: dict[str, int] = {}  # of the form all_text
        self.values = self.wanted(values) if source.ignore else values

    def wanted(self, values: dict[str, Any]) -> dict[str, Any]:
        """What of a row, or of a turn, the source does not ignore; the rest is counted where it is not empty."""
        ignored = self.source.ignore
        self.ignored.update(name for name in ignored if not is_empty(values.get(name)))
        return {name: value for name, value in values.items() if name not in ignored}

    def column(self, name: str) -> str:
        """The column that holds a field; taken as read."""
        column = self.source.fields.get(name, name)
        self._read.add(column)
        return column

    def get(self, name: str) -> Any:
        """The value of a field, None where the row has none."""
        return self.values.get(self.column(name))

    def need(self, name: str, empty: type[MalformedRow] = MalformedRow) -> Any:
        """The value of a field. MalformedRow where it is missing, and `empty` where it is null."""
        column = self.column(name)
        value = self.values.get(column)
        if value is None:
            state = "is null" if column in self.values else "is missing"
            raise (empty if column in self.values else MalformedRow)(
                f"field {name!r} {state}" if column == name else f"field {name!r} (column {column!r}) {state}"
            )
        return value

    def text(self, name: str) -> str:
        """A field that is a text and not empty."""
        return text_of(self.need(name), name)

    def answer(self, name: str) -> Any:
        """An answer of a pair: text or turns. EmptyAnswer where it is null or blank."""
        value = self.need(name, EmptyAnswer)
        if is_empty(value):
            raise EmptyAnswer(f"field {name!r} is empty")
        return value

    def optional(self, name: str) -> Any:
        """A field that rows may have under one of its usual names; None where it is not given or empty.

        MalformedRow where two of the names have a value, of which one would be lost.
        """
        if name in self.source.fields:
            value = self.get(name)
            return None if is_empty(value) else value
        given = [alias for alias in ALIASES[name] if alias in self.values and not is_empty(self.values[alias])]
        if not given:
            return None
        if len(given) > 1:
            raise MalformedRow(f"columns {given[0]!r} and {given[1]!r} both say {name}")
        self._read.add(given[0])
        return self.values[given[0]]

    def finish(self, one_text: bool = False, harmless: tuple[str, ...] = (), refuses: bool = True) -> None:
        """Look at the columns that no field read. MalformedRow for one that changes what the row means.

        one_text   the prompt is a single text, so that a column such as `context` belongs to it
        harmless   names that change nothing in this form
        refuses    False: nothing is trained on the row, so that columns are only counted
        """
        for column, value in self.values.items():
            if value is None or column in self._read or is_empty(value):
                continue
            lowered = meaning_of(column) if refuses else ""
            if lowered in CHANGES_MEANING and lowered not in harmless:
                refuse(column, value, "column", CHANGES_MEANING[lowered])
            if one_text and lowered in PROMPT_PARTS:
                raise MalformedRow(
                    f"column {column!r} belongs to the prompt and is not read here; name it in `fields` (format "
                    f"instruction takes it as input), or leave it out with ignore: [{column}]"
                )
            self.unread.add(counted_name(column))

    def finish_turn(self, left: dict[str, Any], where: str) -> None:
        """Look at the keys of a turn, or of a part of one, that are left. MalformedRow as `finish`."""
        for key, value in left.items():
            if value is None or is_empty(value):
                continue
            lowered = meaning_of(key)
            changes_nothing = TURN_CHANGES_MEANING.get(lowered, CHANGES_MEANING.get(lowered))
            if changes_nothing is not None:
                refuse(key, value, f"key in {where}:", changes_nothing)
            self.unread.add(f"{where}.{counted_name(key)}")


def refuse(name: str, value: Any, what: str, changes_nothing: Callable[[Any], bool]) -> None:
    """MalformedRow for a column, or a key of a turn, whose value changes what the row means."""
    if changes_nothing(value):
        return
    says = f" is {str(value).lower()}, which" if isinstance(value, bool) or _is_number(value) else ""
    raise MalformedRow(
        f"{what} {name!r}{says} changes what the row means and is not read here; honour it with another format or "
        f"`fields`, or leave it out with ignore: [{name}]"
    )


def counted_name(name: Any) -> str:
    """The name of a column for a report: printable and short, whatever the data calls it."""
    text = ascii(name)[1:-1] if isinstance(name, str) and not name.isprintable() else str(name)
    return text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"
