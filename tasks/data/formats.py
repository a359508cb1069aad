"""Rows of every supported form -> normalised rows. Pure: no files, no network, and the input is never changed.

Forms and their fields are in docs/data.md. A row that cannot be trusted raises `MalformedRow` with a short reason, the
same for all rows with that fault, so that reasons can be counted.
"""

from __future__ import annotations

import json
import math
from typing import Any

from smoltulu.schemas.data import DatasetKind, DataSource
from smoltulu.tasks.data.files import WrittenFloat
from smoltulu.tasks.verifiers import canonical_name, fault_of_truth

Message = dict[str, str]

ROLES = ("system", "user", "assistant")

#: Fields of each form; `fields` of a source maps these names to columns.
FORMAT_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "question_answer": ("question", "answer"),
    "preference": ("prompt", "chosen", "rejected"),
    "preference_by_label": ("input", "output_1", "output_2", "label"),
    "rlvr": ("messages", "prompt", "question", "verifier", "ground_truth"),
    "text": ("text",),
}

#: Forms that give rows of each kind.
KIND_FORMATS: dict[str, tuple[str, ...]] = {
    "sft": ("messages", "prompt_completion", "instruction", "question_answer"),
    "preference": ("preference", "preference_by_label"),
    "rlvr": ("rlvr",),
}


class MalformedRow(Exception):
    """A row that is dropped and counted; the text is the reason."""


def check_source(source: DataSource, kind: DatasetKind) -> None:
    """ValueError, before any row is read, for a form that gives no rows of this kind, or for fields that it lacks."""
    if source.format not in KIND_FORMATS[kind]:
        raise ValueError(
            f"data source {source.label!r}: format {source.format!r} gives no {kind} rows; allowed are "
            f"{', '.join(KIND_FORMATS[kind])}"
        )
    unknown = sorted(set(source.fields) - set(FORMAT_FIELDS[source.format]))
    if unknown:
        raise ValueError(
            f"data source {source.label!r}: format {source.format!r} has no field {', '.join(unknown)}; `fields` maps "
            f"our names ({', '.join(FORMAT_FIELDS[source.format])}) to the columns of the data"
        )
    if kind != "rlvr" and (source.verifier is not None or source.verifiers is not None):
        raise ValueError(
            f"data source {source.label!r}: it gives {kind} rows, which no verifier grades; remove `verifier` and "
            "`verifiers`, or give the source to data.rlvr"
        )
    for name in (*([source.verifier] if source.verifier is not None else []), *(source.verifiers or {}).values()):
        try:
            canonical_name(name)
        except ValueError as error:
            raise ValueError(f"data source {source.label!r}: {error}") from error
    if len({name.lower() for name in source.verifiers or {}}) < len(source.verifiers or {}):
        raise ValueError(f"data source {source.label!r}: `verifiers` names one twice; case does not count")


def adapt(row: Any, source: DataSource) -> dict[str, Any]:
    """One row in the normalised form of its kind (schemas.data.DatasetOutputs), without an id. Raises MalformedRow."""
    if not isinstance(row, dict):
        raise MalformedRow("row is not an object")
    return _ADAPTERS[source.format](row, source)


def _messages(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    return {"messages": _conversation(_get(row, source, "messages"), "messages", last="assistant")}


def _prompt_completion(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    prompt, completion = _get(row, source, "prompt"), _get(row, source, "completion")
    turns = _as_turns(prompt, "prompt", "user") + _as_turns(completion, "completion", "assistant")
    return {"messages": _conversation(turns, "messages", last="assistant")}


def _instruction(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    instruction = _text_of(row, source, "instruction")
    # The input is optional in this form: absent, null and empty mean the same.
    given = row.get(source.fields.get("input", "input"))
    if given is not None and not isinstance(given, str):
        raise MalformedRow(f"field 'input' is {_kind(given)}, not text")
    if given and given.strip():
        instruction = f"{instruction}\n\n{_text(given, 'input')}"
    return _one_turn(instruction, _text_of(row, source, "output"))


def _question_answer(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    return _one_turn(_text_of(row, source, "question"), _text_of(row, source, "answer"))


def _preference(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    chosen, rejected = _get(row, source, "chosen"), _get(row, source, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise MalformedRow("chosen and rejected are of different types")
    if _is_conversation(chosen) and _is_conversation(rejected):
        # Full conversations carry their prompt; a string beside them (Tulu 3 preference mixture) only repeats a part.
        return _implicit_pair(chosen, rejected)
    prompt = _conversation(_as_turns(_get(row, source, "prompt"), "prompt", "user"), "prompt", last="user")
    pair = {}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        whole = _conversation(prompt + _as_turns(value, name, "assistant"), name, last="assistant")
        pair[name] = whole[len(prompt) :]
    return _pair(prompt, pair["chosen"], pair["rejected"])


def _preference_by_label(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    prompt = [{"role": "user", "content": _text_of(row, source, "input")}]
    outputs = [[{"role": "assistant", "content": _text_of(row, source, name)}] for name in ("output_1", "output_2")]
    label = _get(row, source, "label")
    # A csv file gives text, and True == 1 in Python.
    if isinstance(label, bool) or label not in (1, 2, "1", "2"):
        raise MalformedRow("label is neither 1 nor 2")
    if int(label) == 2:
        outputs.reverse()
    return _pair(prompt, outputs[0], outputs[1])


def _rlvr(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    names = ("messages", "prompt", "question")
    # A mapped field is the user's word; without one, the first that the row has.
    name = next(
        (name for name in names if name in source.fields),
        next((name for name in names if row.get(name) is not None), None),
    )
    if name is None:
        raise MalformedRow("no messages, prompt or question")
    prompt = _conversation(_as_turns(_get(row, source, name), name, "user"), name, last="user")

    verifier = _verifier(row.get(source.fields.get("verifier", "verifier")), source)
    truth = row.get(source.fields.get("ground_truth", "ground_truth"))
    if truth is None or truth == "":
        raise MalformedRow("no ground truth")
    truth = _text(_truth_as_text(truth), "ground_truth")
    if (fault := fault_of_truth(verifier, truth)) is not None:
        raise MalformedRow(f"ground truth that {verifier} cannot grade: {fault}")
    return {"prompt": prompt, "verifier": verifier, "ground_truth": truth}


def _verifier(named: Any, source: DataSource) -> str:
    """The verifier of a row in its one spelling: what the row names, by way of `verifiers`; else the source's."""
    if named is None or named == "":
        if source.verifier is None:
            raise MalformedRow("no verifier")
        return canonical_name(source.verifier)
    name = _text(named, "verifier").strip().lower()
    name = {theirs.lower(): ours for theirs, ours in (source.verifiers or {}).items()}.get(name, name)
    try:
        return canonical_name(name)
    except ValueError as error:
        raise MalformedRow(f"unknown verifier {name[:40]!r}") from error


def _truth_as_text(truth: Any) -> str:
    """A number as it is written; a list as JSON of texts, of which any is right; an object as JSON."""
    if isinstance(truth, str):
        return truth
    try:
        if isinstance(truth, list):  # [18, 19] as text would be an interval
            if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in truth):
                raise MalformedRow("a list of right answers holds what is neither text nor a number")
            truth = [item if isinstance(item, str) else _as_json(item) for item in truth]
        return _as_json(truth)
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedRow(f"field 'ground_truth' is {_kind(truth)} without a JSON form") from error


def _as_json(value: Any) -> str:
    """A number as it was written, anything else as JSON. Raises what `json.dumps` raises."""
    if isinstance(value, WrittenFloat) and math.isfinite(value):
        return value.text
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _plain_text(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    return {"text": _text_of(row, source, "text")}


_ADAPTERS = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "preference": _preference,
    "preference_by_label": _preference_by_label,
    "rlvr": _rlvr,
    "text": _plain_text,
}


def _get(row: dict[str, Any], source: DataSource, name: str) -> Any:
    column = source.fields.get(name, name)
    value = row.get(column)
    if value is None:
        state = "is null" if column in row else "is missing"
        raise MalformedRow(
            f"field {name!r} {state}" if column == name else f"field {name!r} (column {column!r}) {state}"
        )
    return value


def _text_of(row: dict[str, Any], source: DataSource, name: str) -> str:
    return _text(_get(row, source, name), name)


def _kind(value: Any) -> str:
    known = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return known.get(type(value), f"a {type(value).__name__}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"field {name!r} is {_kind(value)}, not text")
    if not value.strip():
        raise MalformedRow(f"field {name!r} is empty")
    return _clean(value, name)


def _clean(value: str, name: str) -> str:
    if "\0" in value:
        raise MalformedRow(f"NUL character in {name}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise MalformedRow(f"lone surrogate in {name}")
    return value


def _one_turn(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _as_turns(value: Any, name: str, role: str) -> list[Any]:
    """Text becomes one turn of `role`; a list is taken as turns."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, name)}]
    if not isinstance(value, list):
        raise MalformedRow(f"field {name!r} is {_kind(value)}, neither text nor a list of messages")
    return list(value)


def _is_conversation(value: Any) -> bool:
    """A list that starts before the assistant speaks, so with its own prompt."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and isinstance(value[0], dict)
        and value[0].get("role") in ("system", "user")
    )


def _conversation(turns: Any, name: str, last: str) -> list[Message]:
    """Checked turns with only `role` and `content`: system at most once and first, then user and assistant in turn.

    An empty system turn is dropped, because chat data writes "no system prompt" that way; an empty user or assistant
    turn is a fault.
    """
    if not isinstance(turns, list):
        raise MalformedRow(f"field {name!r} is {_kind(turns)}, not a list of messages")
    if not turns:
        raise MalformedRow(f"no turns in {name}")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise MalformedRow(f"a turn of {name} is not an object with role and content")
        role, content = turn["role"], turn["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise MalformedRow(f"unknown role in {name} (known: {', '.join(ROLES)})")
        if not isinstance(content, str):
            raise MalformedRow(f"content of a turn of {name} is not text")
        if not content.strip():
            if role == "system":
                continue
            raise MalformedRow(f"empty {role} turn in {name}")
        messages.append({"role": role, "content": _clean(content, name)})
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not spoken:
        raise MalformedRow(f"no user turn in {name}")
    for index, message in enumerate(spoken):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise MalformedRow(f"roles out of order in {name}")
    if spoken[-1]["role"] != last:
        raise MalformedRow(f"{name} does not end with the {last}'s turn")
    return messages


def _implicit_pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Two whole conversations: the prompt is what they share, up to the last user turn of it."""
    first = _conversation(chosen, "chosen", last="assistant")
    second = _conversation(rejected, "rejected", last="assistant")
    if first == second:
        raise MalformedRow("chosen equals rejected")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    while shared and first[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise MalformedRow("chosen and rejected share no prompt")
    return _pair(first[:shared], first[shared:], second[shared:])


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> dict[str, Any]:
    if chosen == rejected:
        raise MalformedRow("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
