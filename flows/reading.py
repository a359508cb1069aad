"""Text that a user gives, YAML or JSON, as plain values: no key twice, nothing without bounds.

A recipe is untrusted text. libyaml's loader dies of deep nesting, a few aliases stand for gigabytes, and of a key that
is given twice both parsers keep the last in silence. All of that is found before any value is made, and said with its
line. `within_bounds` asks the same of values that came otherwise, e.g. from Prefect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from smoltulu.schemas.common import MAX_NAME

MAX_BYTES = 256 << 10  # the longest recipe that ships has 9 kB
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_TEXT = 20_000
_MAX_DIGITS = 64
_MAX_SHOWN = 120
_NUM_DOUBLES_SHOWN = 10

#: libyaml's, ten times as fast, where PyYAML was built with it.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Unreadable(ValueError):
    """A text that is no such document, or beyond the bounds; the message has a line where there is one."""


def shortened(value: object, longest: int = _MAX_SHOWN) -> str:
    """`repr` of a value, cut."""
    if isinstance(value, str):
        return repr(value) if len(value) <= longest else f"{value[:longest]!r}... ({len(value):,} characters)"
    if isinstance(value, (dict, list, tuple, set)) and len(value) > longest:
        return f"a {type(value).__name__} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def read_file(path: Path) -> Any:
    """The YAML of a file. Raises Unreadable, OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    _check_size(len(data))
    try:
        return read_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 ({error.reason} at byte {error.start:,})") from None


def read_yaml(text: str) -> Any:
    """One YAML document as plain values. Raises Unreadable."""
    _check_size(len(text))
    try:
        _check_nesting(text)
        loader = _YAML(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except Unreadable:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Unreadable(where + _cut(" ".join(filter(None, (error.context, error.problem))))) from None
    except yaml.YAMLError as error:
        raise Unreadable(_cut(" ".join(str(error).split()))) from None
    except Exception as error:
        # A value that does not fit the tag that it carries or looks like (2020-99-99, !!int x) fails in many ways.
        raise Unreadable(f"a value in it cannot be read ({type(error).__name__}: {_cut(str(error))})") from None
    within_bounds(values)
    return values


def read_json(text: str) -> Any:
    """One JSON document as plain values. Raises Unreadable, whose cause is a JSONDecodeError where it is no JSON."""
    _check_size(len(text))
    try:
        values = json.loads(text, object_pairs_hook=_without_doubles, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels") from None
    within_bounds(values)
    return values


def within_bounds(values: Any) -> None:
    """Raises Unreadable for values that are nested too deep, too many or too long, whoever made them."""
    count = 0
    pending = [(values, 1)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise Unreadable(f"it has more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            for name in value:
                _check_name(name)
            pending += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple)):
            pending += [(item, depth + 1) for item in value]
        elif isinstance(value, (set, bytes)):
            raise Unreadable(f"a {type(value).__name__} is no value of a recipe; write a list, or a text")
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
            raise Unreadable(f"a number has more than {_MAX_DIGITS} digits")


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise Unreadable(f"it is longer than {MAX_BYTES:,} bytes")


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise Unreadable(f"a text has {len(text):,} characters, at most {MAX_TEXT:,}: {shortened(text, 40)}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Unreadable(f"a text holds half a character (a lone surrogate): {text[:40]!a}")


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise Unreadable(f"{shortened(name)} is no name of a field; put it in quotes")
    _check_text(name)
    if len(name) > MAX_NAME:
        raise Unreadable(f"a field's name has {len(name):,} characters, at most {MAX_NAME}: {shortened(name, 40)}")


def _check_nesting(text: str) -> None:
    """By the parser's events, which come one by one: no recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_YAML):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(f"{_line(event)}: it is nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_nodes(root: yaml.Node) -> None:
    """What the document stands for once aliases are followed; keys that are given twice; numbers without end."""
    # Post-order without recursion: levels and values below each node, None while it is open.
    found: dict[int, tuple[int, int] | None] = {}
    doubles: list[str] = []
    pending = [root]
    while pending:
        node = pending[-1]
        children = list(_children(node))
        if id(node) not in found:
            found[id(node)] = None
            if any(found.get(id(child), 0) is None for child in children):
                raise Unreadable(f"{_line(node)}: an alias stands for what it is part of")
            if new := [child for child in children if id(child) not in found]:
                pending += new
                continue
        pending.pop()
        if found[id(node)] is not None:
            continue
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            doubles += _doubles(node)
        below = [inner for child in children if (inner := found[id(child)]) is not None]
        assert len(below) == len(children), node.start_mark
        depth = 1 + max((levels for levels, _ in below), default=0)
        count = 1 + sum(num for _, num in below)
        if depth > MAX_DEPTH:
            raise Unreadable(f"{_line(node)}: it is nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise Unreadable(f"{_line(node)}: it has more than {MAX_VALUES:,} values, aliases followed")
        found[id(node)] = depth, count
    if doubles:
        more = f"; and {len(doubles) - _NUM_DOUBLES_SHOWN} more" if len(doubles) > _NUM_DOUBLES_SHOWN else ""
        raise Unreadable("; ".join(doubles[:_NUM_DOUBLES_SHOWN]) + more)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
        raise Unreadable(f"{_line(node)}: a number has {len(node.value):,} digits, at most {_MAX_DIGITS}")


def _doubles(node: yaml.MappingNode) -> list[str]:
    """A sentence for every key of a mapping that stands in it a second time."""
    first: dict[tuple[str, str], yaml.Node] = {}
    doubles = []
    for key, _ in node.value:
        kind = key.tag.rpartition(":")[2]
        if kind not in ("str", "merge"):
            raise Unreadable(f"{_line(key)}: the name of a field is a text, this one is a {kind}; put it in quotes")
        before = first.setdefault((key.tag, key.value), key)
        if before is not key:
            name = key.value if len(key.value) <= _MAX_SHOWN else shortened(key.value)
            doubles.append(f"{_line(key)}: `{name}` is given twice, first in {_line(before)}; keep one of them")
    return doubles


def _line(part: yaml.Node | yaml.Event) -> str:
    assert part.start_mark is not None
    return f"line {part.start_mark.line + 1}"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        _check_name(name)
        if name in values:
            raise Unreadable(f"`{name}` is given twice; keep one of them")
        values[name] = value
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise Unreadable(f"a number has {len(digits):,} digits, at most {_MAX_DIGITS}")
    return int(digits)


def _cut(text: str, longest: int = 300) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
