"""Values of a row: what is text, what is empty, and how a fault is said."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


class MalformedRow(Exception):
    """A row that is dropped and counted; the text is the reason."""


class DroppedRow(Exception):
    """A row without a fault that a setting of its source leaves out; the text is the reason."""


class EmptyAnswer(MalformedRow):
    """A pair without one of its answers: null, or empty."""


class Tie(MalformedRow):
    """A pair in which neither answer is the better one."""


def kind_of(value: Any) -> str:
    """What JSON calls the value."""
    known = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    if isinstance(value, float):
        return "a number"
    return known.get(type(value), f"a {type(value).__name__}")


def is_empty(value: Any) -> bool:
    """Null, a blank text, or a list or object of nothing else: Parquet and CSV write "not given" in these ways."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if not isinstance(value, (list, dict)):
        return False
    waiting = [value]  # not recursive: rows may be nested as deep as JSON can be read
    while waiting:
        one = waiting.pop()
        if isinstance(one, (list, dict)):
            waiting += one if isinstance(one, list) else one.values()
        elif one is not None and not (isinstance(one, str) and (not one or one.isspace())):
            return False
    return True


def text_of(value: Any, name: str) -> str:
    """A text that is not empty, as it is."""
    if not isinstance(value, str):
        raise MalformedRow(f"field {name!r} is {kind_of(value)}, not text")
    if not value or value.isspace():
        raise MalformedRow(f"field {name!r} is empty")
    return clean(value, name)


def clean(value: str, name: str) -> str:
    """The text as it is. MalformedRow for characters that no tokenizer or file takes."""
    if "\0" in value:
        raise MalformedRow(f"NUL character in {name}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MalformedRow(f"lone surrogate in {name}") from None
    return value


def clean_json(value: Any, name: str) -> Any:
    """A copy of a JSON value in which every text is clean. MalformedRow for what JSON cannot hold, such as NaN."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise MalformedRow(f"{name} is {kind_of(value)} without a JSON form") from None
    if "\\u0000" in text and _holds_nul(value):
        raise MalformedRow(f"NUL character in {name}")
    return json.loads(clean(text, name))


def _holds_nul(value: Any) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if "\0" in one:
                return True
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
    return False


def parsed_json(text: str, name: str) -> Any:
    """What a JSON text holds. MalformedRow where it is none, or names a key twice, of which one would be lost."""
    clean(text, name)
    try:
        return clean_json(json.loads(text, object_pairs_hook=once), name)
    except (ValueError, RecursionError):
        raise MalformedRow(f"{name} is text that is not JSON") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError where it names a key twice, of which one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key twice")
    return made
