"""Detects the form of the rows of an unknown file from their columns. Pure; docs/data.md has the forms in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smoltulu.schemas.data import DatasetKind, DataSource, RowFormat
from smoltulu.tasks.data.formats import FORMS, KIND_FORMATS, SourceCounts
from smoltulu.tasks.data.formats.transcripts import dialect_of, is_transcript
from smoltulu.tasks.data.formats.turns import ROLE_KEYS, ROLES
from smoltulu.tasks.data.formats.values import is_empty
from smoltulu.tasks.data.found_columns import (
    Columns,
    are_calls,
    asks,
    ends_with_assistant,
    is_chat,
    is_label,
    is_number,
    is_scored,
    is_text,
    is_text_or_chat,
    starts_with_user,
    turns_in,
)

#: Rows that are looked at, and how many characters of text they may have together: whichever is reached first.
SAMPLE_ROWS = 10_000
SAMPLE_CHARACTERS = 16 << 20

_USER_COLUMNS = ("prompt", "instruction", "question", "problem", "query", "text")
_ANSWER_COLUMNS = ("output", "response", "completion", "answer", "solution", "target")
_MORE_COLUMNS = ("input", "context")
_CHAT_COLUMNS = ("messages", "conversation", "conversations", "dialog", "dialogue", "contents")
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "input", "query")
_TRANSCRIPT_COLUMNS = ("text", "transcript", "chat", "conversation", "chosen")

#: Required field of a form -> columns that it is looked for under.
_FOUND_AS: dict[str, tuple[str, ...]] = {
    "messages": _CHAT_COLUMNS,
    "prompt": _PROMPT_COLUMNS,
    "question": _USER_COLUMNS,
    "instruction": _USER_COLUMNS,
    "completion": _ANSWER_COLUMNS,
    "answer": _ANSWER_COLUMNS,
    "output": _ANSWER_COLUMNS,
    "input": ("input", "prompt", "instruction"),
}
#: Forms that a user may name for rows of conversations.
_NAMED = {name for kind in ("sft", "preference", "rlvr") for name in KIND_FORMATS[kind]}
_EXPECTED = (
    "messages (turns with role and content, or from and value); chosen and rejected; input, output_1, output_2 and "
    "label; prompt, response_1, response_2 and preference_strength; prompt and completions with scores; prompt, "
    f"completion and label; one of {', '.join(_USER_COLUMNS)} for what the user says, with or without one of "
    f"{', '.join(_ANSWER_COLUMNS)}"
)


@dataclass(frozen=True)
class DetectedFormat:
    """How rows are read, and a sentence about it for the user."""

    kind: DatasetKind
    format: RowFormat
    fields: Mapping[str, str] = field(default_factory=dict)  # our field name -> column, where they differ
    said: str = ""


def sample_rows(rows: Iterable[Any]) -> list[Any]:
    """The first rows, as many as detection looks at: bounded by their number and by their text, at least one."""
    sample, left = [], SAMPLE_CHARACTERS
    for row in rows:
        sample.append(row)
        left -= _num_characters(row)
        if left <= 0 or len(sample) == SAMPLE_ROWS:
            break
    return sample


def _num_characters(value: Any) -> int:
    """Characters of text in a value, with a few for each value that is none."""
    waiting, number = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            number += len(one)
        elif isinstance(one, dict):
            waiting += one.values()
            number += sum(map(len, filter(lambda key: isinstance(key, str), one)))
        elif isinstance(one, list):
            waiting += one
        else:
            number += 8
    return number


def detect_format(rows: Iterable[Any]) -> DetectedFormat:
    """The form of `rows`, the first ones of a data set; no more of an iterator are taken than `sample_rows` does.

    Raises:
        ValueError: no row, rows that are no objects, or columns that fit no form; with the nearest form, what it lacks,
            and what is expected.
    """
    rows = sample_rows(rows)
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        raise no_objects(rows)
    columns = Columns(objects)
    found = (
        _preference(columns)
        or _by_label(columns)
        or _by_strength(columns)
        or _by_score(columns)
        or _kto(columns)
        or _conversation(columns)
        or _function_calls(columns)
        or _verified(columns)
        or _transcript(columns)
        or _one_turn(columns)
    )
    if found is None:
        raise ValueError(
            f"the columns {', '.join(map(repr, columns.names[:40]))} fit no known form. {_nearest(columns)}Expected "
            f"are: {_EXPECTED}. Say how they are read: a format ({', '.join(sorted(_NAMED))}) "
            "and, where names differ, fields such as prompt=COLUMN"
        )
    return found


def no_objects(rows: list[Any]) -> ValueError:
    """What is said of first rows that are no objects: why, and the first of them."""
    if not rows:
        return ValueError("there is no row")
    counts = SourceCounts(DataSource(path="rows", format="all_text"))
    assert not list(counts.normalised(rows))
    report = counts.report()
    reasons = "; ".join(f"{reason}: {number}" for reason, number in report.reasons.items())
    return ValueError(
        f"there is no row that is an object with columns. Reasons: {reasons}. First examples:\n  "
        + "\n  ".join(report.examples)
    )


def format_as_given(name: RowFormat, fields: Mapping[str, str]) -> DetectedFormat:
    """A form that the user named. Raises ValueError for one that holds no conversations, or for fields it lacks."""
    kind = next((kind for kind, formats in KIND_FORMATS.items() if name in formats), None)
    if kind is None:
        allowed = ", ".join(name for formats in KIND_FORMATS.values() for name in formats)
        raise ValueError(f"format {name!r} has no user turns; allowed are {allowed}")
    if unknown := sorted(set(fields) - set(FORMS[name].names)):
        raise ValueError(
            f"format {name!r} has no field {', '.join(unknown)}; its fields are {', '.join(FORMS[name].names)}"
        )
    return DetectedFormat(kind, name, dict(fields), f"format {name}, as given")  # type: ignore[arg-type]


def _fields(**columns: str) -> dict[str, str]:
    return {name: column for name, column in columns.items() if name != column}


def _preference(columns: Columns) -> DetectedFormat | None:
    chosen = columns.first(("chosen",), is_text_or_chat)
    rejected = columns.first(("rejected",), is_text_or_chat)
    if chosen is None or rejected is None:
        return None
    fields = _fields(chosen=chosen, rejected=rejected)
    prompt = columns.first(_PROMPT_COLUMNS, is_text_or_chat) or columns.first(_CHAT_COLUMNS, asks)
    if prompt is not None:
        said = _say(*columns.system(), prompt, chosen, rejected)
        return DetectedFormat("preference", "preference", fields | _fields(prompt=prompt), said)
    if columns.first((chosen.lower(),), starts_with_user) is None:
        dialect = next(filter(None, map(dialect_of, columns.values(chosen))), None)
        raise ValueError(
            f"the columns {chosen!r} and {rejected!r} hold transcripts in one string ({dialect}); split them into "
            "messages with role and content"
            if dialect
            else f"the columns {chosen!r} and {rejected!r} are answers, but no column holds their prompt (columns: "
            f"{', '.join(map(repr, columns.names))}); name it with a field, prompt=COLUMN"
        )
    dialect = dialect_of(columns.values(chosen)[0])
    said = _say(*columns.system(), chosen, rejected) + (f", transcripts ({dialect})" if dialect else "")
    return DetectedFormat("preference", "preference", fields, said)


def _by_label(columns: Columns) -> DetectedFormat | None:
    prompt = columns.first(("input", "prompt", "instruction"), is_text)
    outputs = [columns.first((name,), is_text) for name in ("output_1", "output_2")]
    if prompt is None or None in outputs or "label" not in columns.names:
        return None
    return DetectedFormat(
        "preference", "preference_by_label", _fields(input=prompt), _say(prompt, "output_1", "output_2", "label")
    )


def _by_strength(columns: Columns) -> DetectedFormat | None:
    prompt = columns.first(_PROMPT_COLUMNS, is_text_or_chat)
    names = ("response_1", "response_2")
    strength = columns.first(("preference_strength",), is_number)
    first, second = (columns.first((name,), is_text_or_chat) for name in names)
    if prompt is None or strength is None or first is None or second is None:
        return None
    fields = _fields(prompt=prompt, response_1=first, response_2=second, preference_strength=strength)
    said = _say(*columns.system(), prompt, first, second, strength)
    return DetectedFormat("preference", "preference_by_strength", fields, said)


def _by_score(columns: Columns) -> DetectedFormat | None:
    prompt, completions = columns.first(_PROMPT_COLUMNS, is_text_or_chat), columns.first(("completions",), is_scored)
    if prompt is None or completions is None:
        return None
    fields = _fields(prompt=prompt, completions=completions)
    said = _say(prompt, completions) + " (the best against the worst)"
    return DetectedFormat("preference", "preference_by_score", fields, said)


def _kto(columns: Columns) -> DetectedFormat | None:
    prompt = columns.first(("prompt", "question", "instruction"), is_text_or_chat)
    completion = columns.first(("completion", "response", "output", "answer"), is_text_or_chat)
    label = columns.first(("label",), is_label)
    if prompt is None or completion is None or label is None:
        return None
    fields = _fields(prompt=prompt, completion=completion, label=label)
    said = _say(prompt, completion, label) + " (pairs of a good and a bad answer to a prompt)"
    return DetectedFormat("preference", "kto", fields, said)


def _conversation(columns: Columns) -> DetectedFormat | None:
    column = columns.first(_CHAT_COLUMNS, ends_with_assistant)
    if column is None:
        return None
    return DetectedFormat("sft", "messages", _fields(messages=column), _say(*columns.system(), column))


def _function_calls(columns: Columns) -> DetectedFormat | None:
    query, calls = columns.first(_PROMPT_COLUMNS, is_text), columns.first(("answers",), are_calls)
    if query is None or calls is None:
        return None
    said = _say(*columns.system(), query, calls) + " (calls of functions)"
    return DetectedFormat("sft", "function_calls", _fields(query=query, answers=calls), said)


def _verified(columns: Columns) -> DetectedFormat | None:
    """Rows of RLVR, read as a prompt and its ground truth: `rlvr` drops rows whose verifier is not known here."""
    truth = columns.first(("ground_truth",), is_text)
    prompt = columns.first(("messages", *_USER_COLUMNS), is_text_or_chat)
    if truth is None or prompt is None:
        return None
    fields = _fields(prompt=prompt, completion=truth)
    return DetectedFormat("sft", "prompt_completion", fields, _say(prompt, truth) + " (rows of RLVR)")


def _transcript(columns: Columns) -> DetectedFormat | None:
    column = columns.first(_TRANSCRIPT_COLUMNS, is_transcript)
    if column is not None:
        dialect = next(filter(None, map(dialect_of, columns.values(column))))
        said = f"{_say(column)}, transcripts ({dialect})"
        return DetectedFormat("sft", "transcript", _fields(text=column), said)
    chat = columns.first(("chat", "transcript"), lambda value: dialect_of(value) is not None)
    if chat is not None:
        dialect = next(filter(None, map(dialect_of, columns.values(chat))))
        raise ValueError(
            f"the column {chat!r} holds transcripts in one string ({dialect}); split them into messages with role and "
            "content"
        )
    return None


def _one_turn(columns: Columns) -> DetectedFormat | None:
    user = columns.first(_USER_COLUMNS, is_text_or_chat)
    if user is None:
        return None
    system = columns.system()
    answer = columns.fullest(_ANSWER_COLUMNS, is_text_or_chat)
    if answer is not None and answer.lower() == "answer":
        # Mathematics: what a model should write is the solution, and the answer its last line.
        answer = columns.first(("solution", "output"), lambda value: is_text(value) and not is_empty(value)) or answer
    if answer is None or user.lower() == "text":
        if columns.first((user.lower(),), is_text) is None:
            raise ValueError(f"the column {user!r} holds conversations that do not end with the assistant's turn")
        # A row needs an answer to be one; nothing but the user's turns is looked at.
        fields = _fields(prompt=user, completion=user)
        return DetectedFormat("sft", "prompt_completion", fields, f"{_say(user)} as the user's turn; no answers")
    holds_text = columns.first((user.lower(),), is_text) is not None
    more = columns.fullest(_MORE_COLUMNS, is_text)
    if holds_text and (user.lower() == "instruction" or more is not None):
        fields = _fields(instruction=user, output=answer, **({"input": more} if more else {}))
        return DetectedFormat("sft", "instruction", fields, _say(*system, user, *([more] if more else []), answer))
    if holds_text and user.lower() in ("question", "problem", "query"):
        fields = _fields(question=user, answer=answer)
        return DetectedFormat("sft", "question_answer", fields, _say(*system, user, answer))
    fields = _fields(prompt=user, completion=answer)
    return DetectedFormat("sft", "prompt_completion", fields, _say(*system, user, answer))


def _nearest(columns: Columns) -> str:
    """The form of which most fields are there, and what it lacks."""
    chat = columns.named(_CHAT_COLUMNS)
    if chat is not None:
        return f"The column {chat!r} is no list of turns that ends with the assistant's{_odd_turns(columns, chat)}. "
    lacking = {}
    for name, form in FORMS.items():
        required = [one for one in form.fields if one != "input" or name != "instruction"]
        missing = [one for one in required if columns.named(_FOUND_AS.get(one, (one,))) is None]
        if form.kind is not None and form.kind != "rlvr" and len(missing) < len(required):
            lacking[name] = (len(missing) / len(required), missing)
    if not lacking:
        return ""
    name = min(lacking, key=lambda one: lacking[one][0])
    missing = lacking[name][1]
    what = f"it lacks {', '.join(missing)}" if missing else "but its columns do not hold what it needs"
    return f"The nearest is {name}: {what}. "


def _odd_turns(columns: Columns, column: str) -> str:
    """Roles of a column that are known nowhere."""
    turns = [turn for value in columns.values(column) if is_chat(value) for turn in turns_in(value)]
    said = {str(next(turn[key] for key in ROLE_KEYS if key in turn)) for turn in turns}
    unknown = sorted(role[:40] for role in said if role.lower() not in ROLES)
    if unknown:
        return f" (unknown roles: {', '.join(map(repr, unknown[:5]))})"
    return " (prompts alone are read with a ground_truth, or as format rlvr)" if turns else ""


def _say(*columns: str) -> str:
    return f"columns {', '.join(columns)}" if len(columns) > 1 else f"column {columns[0]}"
