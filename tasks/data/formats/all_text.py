"""Every text of a row, whatever its form: what an audit searches.

Turns (objects with a role and content) stay apart, as the paper's rule has them. All other texts of a row are one turn
more, a blank line between two of them: a passage in one column and its question in another are found together.
`origins` says which column each piece of a turn is of, so that a hit names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smoltulu.tasks.data.formats.columns import Row, counted_name
from smoltulu.tasks.data.formats.turns import CONTENT_KEYS, ROLE_KEYS, ROLES
from smoltulu.tasks.data.formats.values import Message, once

#: The role of what is no turn.
TEXT = "text"
_BETWEEN = "\n\n"
_MAX_DEPTH = 100

Piece = tuple[str, str]  # column, text


def read_all_text(row: Row) -> dict[str, Any]:
    """{"messages", "origins"}: of each turn, pairs of a column and the place where its text begins in the turn.

    `row.texts` counts the texts of each column that is read; `row.unread` has the columns with text that `columns` of
    the source leaves out.
    """
    wanted = row.source.columns
    turns: list[tuple[str, list[Piece]]] = []
    others: list[Piece] = []
    for name, value in row.values.items():
        column = counted_name(name)
        found: list[Piece] = []
        chats: list[tuple[str, list[Piece]]] = []
        _gather(value, column, found, chats)
        num_texts = len(found) + sum(len(pieces) for _, pieces in chats)
        if not num_texts:
            continue
        if wanted is not None and name not in wanted:
            row.unread.add(column)
            continue
        row.texts[column] = row.texts.get(column, 0) + num_texts
        turns += chats
        others += found
    if others:
        turns.append((TEXT, others))
    messages: list[Message] = []
    origins = []
    for role, pieces in turns:
        places: list[tuple[str, int]] = []
        at = 0
        for column, text in pieces:
            if not places or places[-1][0] != column:
                places.append((column, at))
            at += len(text) + len(_BETWEEN)
        messages.append({"role": role, "content": _BETWEEN.join(text for _, text in pieces)})
        origins.append(places)
    return {"messages": messages, "origins": json.dumps(origins, ensure_ascii=False)}


def column_of(row: Mapping[str, Any], turn: int, place: int) -> str | None:
    """The column of a place in a turn of such a row; None for a row of another form."""
    if "origins" not in row:
        return None
    places = json.loads(row["origins"])[turn]
    return str(max((start, column) for column, start in places if start <= max(place, 0))[1])


def _gather(
    value: Any, column: str, found: list[Piece], chats: list[tuple[str, list[Piece]]] | None, depth: int = 0
) -> None:
    """Add all texts of a value to `found`, and its turns to `chats` (None: inside of a turn)."""
    if isinstance(value, str):
        if not value or value.isspace():
            return
        inner = _written_as_text(value)
        if inner is not None and depth < _MAX_DEPTH:
            _gather(inner, column, found, chats, depth + 1)
        else:
            found.append((column, _whole(value)))
    elif isinstance(value, bytes):
        try:
            _gather(value.decode(), column, found, chats, depth)
        except UnicodeDecodeError:
            return  # an image, a sound
    elif depth >= _MAX_DEPTH:
        found.append((column, _whole(json.dumps(value, ensure_ascii=False, default=str))))
    elif isinstance(value, dict):
        speaker = None if chats is None else _speaker(value)
        if speaker is not None:
            assert chats is not None
            role, said_by = speaker
            pieces: list[Piece] = []
            for key, inner in value.items():
                if key != said_by:
                    _gather(inner, column, pieces, None, depth + 1)
            if pieces:
                chats.append((role, pieces))
            return
        for key, inner in value.items():
            if isinstance(key, str) and " " in key.strip():  # a question as the key of its answer
                found.append((column, _whole(key)))
            _gather(inner, column, found, chats, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _gather(inner, column, found, chats, depth + 1)


def _speaker(value: dict[str, Any]) -> tuple[str, str | None] | None:
    """Our role of a turn, and the key that says it; None for an object that is no turn.

    A speaker that is not known is named in one word; more of them, as behind `from` of a letter, are text.
    """
    key = next((key for key in ROLE_KEYS if isinstance(value.get(key), str)), None)
    if key is None or not any(name in value for name in CONTENT_KEYS):
        return None
    said = value[key]
    role = ROLES.get(said.lower(), TEXT)
    is_name = role != TEXT or len(said.split()) < 2
    return "assistant" if role == "call" else role, key if is_name else None


def _written_as_text(text: str) -> Any:
    """The value of a text that is JSON, as a cell of a CSV file is where it holds turns; None for any other text."""
    if text[0] not in "[{" or text.rstrip()[-1] not in "]}":
        return None
    try:
        value = json.loads(text, object_pairs_hook=once)  # a key twice: the text as it is, which loses nothing
    except (ValueError, RecursionError):
        return None
    return value if _holds_text(value) else None


def _holds_text(value: Any) -> bool:
    pieces: list[Piece] = []
    _gather(value, "", pieces, None, _MAX_DEPTH - 20)
    return bool(pieces)


def _whole(text: str) -> str:
    """Half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD, as the check has it."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
