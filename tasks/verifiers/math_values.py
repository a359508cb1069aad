r"""The structure of an answer: a number, words, an expression; a list, set, tuple, interval, union, matrix of these.

`math_compare.py` compares two of them; only two expressions that are spelled differently need a worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from smoltulu.tasks.verifiers.math_numbers import rational
from smoltulu.tasks.verifiers.math_text import (
    OR,
    braces_close,
    canonical_expression,
    plain,
    without_ends,
)
from smoltulu.tasks.verifiers.math_units import POWER, unit_name, with_scale, without_unit
from smoltulu.tasks.verifiers.truths import BadTruth

_MAX_DEPTH = 20
_MAX_PARTS = 200

_OPEN, _CLOSE = ("(", "[", "\\{", "{", "\\langle"), (")", "]", "\\}", "}", "\\rangle")
_PIECE = re.compile(r"\\(?:left|right)?[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
# Three digits after a comma, and what may stand before it: one to three digits, or more that were joined before.
_GROUP, _HEAD = re.compile(r"[0-9]{3}(?![0-9])"), re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:\0[0-9]{3})*\Z")
_GROUPED = re.compile(r"(?:[a-zA-Z] *= *)?-?[1-9][0-9]{0,2}(?:,[0-9]{3}){1,20}")
_NAME = re.compile(
    r"(?:\\?[a-zA-Z]+|\\text\s*\{[^{}]*\})(?:_(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]+\}))?'*(?:\s*\([a-z](?:,\s*[a-z])*\))?"
)
_POINT = re.compile(rf"\(\s*(?:{_NAME.pattern})(?:\s*,\s*(?:{_NAME.pattern}))+\s*\)")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[clr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?(?:\\text\s*\{)?\s*([0-9]+)\s*\}*")
_RELATION = re.compile(r"(<|>|(?:\\le|\\ge)(?![a-zA-Z]))")
# Longer ones are words anyway; other two or three letters are a product of variables.
_SHORT_WORDS = re.compile(
    r"(?i:no|on|yes|off|odd|one|two|six|ten|all|any|nor|up|out|red|sun|mon|tue|wed|thu|fri|sat)|[A-Z][a-z]{2,}"
)
_TIME = re.compile(r"(?i)(?:\\text *\{ *)?([0-9]{1,2}:[0-9]{2}) *(?:\\text *\{ *)?([ap])\.? *m\.? *\}?")
_ONLY_TEXT = re.compile(r"(?:\\text\s*\{([^{}]*)\}\s*)+")


@dataclass(frozen=True)
class Leaf:
    """One part of an answer. `text` is canonical; of a number it is its value.

    number, based (`12_8`) and words are equal if and only if their texts are; an expression may have other spellings.
    """

    kind: Literal["number", "based", "words", "expression", "equation"]
    text: str
    unit: str = ""
    value: Fraction | None = None


@dataclass(frozen=True)
class Group:
    """Parts in brackets: `kind` names the brackets, a matrix with its shape, a list or set without order, a union."""

    kind: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Named:
    """`x = 5`, `x \\in [1, 2]`, `x < 3`: what the name stands for."""

    name: str
    node: Node


Node = Leaf | Group | Named


def read(answer: str) -> Node:
    """The structure of an answer as it was written.

    Raises:
        BadTruth: no answer, or braces that do not close, or too much of it; whosesoever answer it is.
    """
    text = plain(answer)
    if not text:
        raise BadTruth("there is no answer")
    if not braces_close(text):
        raise BadTruth("the braces do not close")
    return _node(text, 0)


def as_list(answer: str) -> Node | None:
    """The list that `100,200` may be where the other side is one; None for an answer that is no number with commas."""
    text = plain(answer)
    return read(text.replace(",", ", ")) if _GROUPED.fullmatch(text) else None


def _node(text: str, depth: int) -> Node:
    if depth > _MAX_DEPTH:
        raise BadTruth("brackets are nested too deeply")
    text = _unwrapped(text.strip())
    if depth == 0:
        text = _without_unit_of_all(text)
    parts = _list_parts(text, in_brackets=False)
    if len(parts) > _MAX_PARTS:
        raise BadTruth(f"there are more than {_MAX_PARTS} parts")
    if len(parts) > 1:
        is_either = all(part.rstrip().endswith(OR) for part in parts[:-1])
        return _list([part for part in map(_without_or, parts) if part], depth, is_either)
    text = _without_or(parts[0])
    return (
        _named(text, depth) or _union(text, depth) or _bracketed(text, depth) or _plus_minus(text, depth) or _leaf(text)
    )


def _unwrapped(text: str) -> str:
    r"""Without braces and `\text`-like commands around all of it, as long as there are any."""
    while text.startswith("{") and _closes(text) == len(text) and len(text) > 1:
        text = without_ends(text[1:-1])
    if (match := re.fullmatch(r"\\text\s*\{(\(?[^{}a-zA-Z]*[0-9][^{}a-zA-Z]*\)?)\}", text)) is not None:
        text = match.group(1).strip()  # \text{5}, not words
    return text


def _without_or(part: str) -> str:
    return part.strip().removesuffix(OR).rstrip()


def _list(parts: list[str], depth: int, is_either: bool) -> Node:
    """`x = 1, x = 2` is a list of values with one name; so is `x = 1, 2`. `x < 1 or x > 2` is a union of intervals."""
    nodes = [_node(part, depth + 1) for part in parts]
    if not nodes:
        raise BadTruth("there is no answer")
    names = {node.name for node in nodes if isinstance(node, Named)}
    if len(names) == 1 and isinstance(nodes[0], Named):
        values = tuple(node.node if isinstance(node, Named) else node for node in nodes)
        is_union = is_either and len(parts) > 1 and all(_is_interval(node) for node in nodes)
        return Named(nodes[0].name, Group("union" if is_union else "list", values))
    return nodes[0] if len(nodes) == 1 else Group("list", tuple(nodes))


def _is_interval(node: Node) -> bool:
    """Of a named part, as `x < 1` is."""
    return isinstance(node, Named) and isinstance(node.node, Group) and node.node.kind in ("()", "(]", "[)", "[]")


def _named(text: str, depth: int) -> Node | None:
    r"""`x = 5`, `x \in …`, `1 < x < 2`, and equations; None for what is no relation."""
    member = _split(text, ("\\in",))
    if len(member) == 2 and _NAME.fullmatch(member[0].strip()):
        return Named(_name(member[0]), _node(member[1], depth + 1))
    sides = [side.strip() for side in _split(text, ("=",))]
    if len(sides) > 1:
        if len(sides) == 2 and not sides[0]:  # =3
            return _node(sides[1], depth + 1)
        return _equation(text, sides, depth) if all(sides) else None
    return _inequality(text, depth)


def _equation(text: str, sides: list[str], depth: int) -> Node:
    name = _name(sides[0]) if _NAME.fullmatch(sides[0]) and rational(sides[0]) is None else None
    values = sides[1:] if name is not None else sides
    if name is None and len(sides) == 2 and _POINT.fullmatch(sides[0]) and not _POINT.fullmatch(sides[1]):
        return Named(_name(sides[0]), _node(sides[1], depth + 1))  # (x, y) = (1, 2)
    nodes = [_node(side, depth + 1) for side in values]
    whole = Leaf("equation", canonical_expression(text))
    if name is not None and (len(nodes) == 1 or (len(nodes) == 2 and _name(values[0]) == name)):
        return Named(name, nodes[-1])
    # A chain, as x = 2 + 3 = 5, has the value of its last part if all are equal; else it is an equation, or false.
    if all(isinstance(node, Leaf) and node.kind == "number" for node in nodes):
        if len({node.text for node in nodes if isinstance(node, Leaf)}) > 1:
            return Leaf("words", canonical_expression(text))
        return Named(name, nodes[-1]) if name is not None else nodes[-1]
    return whole


def _inequality(text: str, depth: int) -> Node | None:
    r"""`a < x \le b` and `x > a` are intervals."""
    pieces = _RELATION.split(text)
    if len(pieces) not in (3, 5) or not all(piece.strip() for piece in pieces):
        return None
    sides, relations = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    if len(sides) == 2:
        if not _NAME.fullmatch(sides[0]):  # a < x: turned round
            sides, relations = sides[::-1], [_TURNED[relations[0]]]
        infinity = Leaf("expression", "\\infty") if relations[0] in (">", "\\ge") else Leaf("expression", "-\\infty")
        if not _NAME.fullmatch(sides[0]):
            return None
        bound = _node(sides[1], depth + 1)
        closed = "\\" in relations[0]
        parts: tuple[Node, ...] = (bound, infinity)
        ends = ("[" if closed else "(") + ")"
        if relations[0] in ("<", "\\le"):
            parts, ends = (infinity, bound), "(" + ("]" if closed else ")")
        return Named(_name(sides[0]), Group(ends, parts))
    if {relations[0][-1], relations[1][-1]} & {"<"} and {relations[0], relations[1]} & {">", "\\ge"}:
        return None
    if relations[0] in (">", "\\ge"):
        sides, relations = sides[::-1], [_TURNED[relations[1]], _TURNED[relations[0]]]
    if not set(relations) <= {"<", "\\le"} or not _NAME.fullmatch(sides[1]):
        return None
    ends = ("[" if relations[0] == "\\le" else "(") + ("]" if relations[1] == "\\le" else ")")
    return Named(_name(sides[1]), Group(ends, (_node(sides[0], depth + 1), _node(sides[2], depth + 1))))


_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def _name(text: str) -> str:
    return re.sub(r"\s+|\\text|[{}]", "", text)


def _union(text: str, depth: int) -> Node | None:
    parts = _split(text, ("\\cup",))
    return Group("union", tuple(_node(part, depth + 1) for part in parts)) if len(parts) > 1 else None


def _bracketed(text: str, depth: int) -> Node | None:
    if (matrix := _MATRIX.fullmatch(text)) is not None and "\\begin" not in matrix.group(2):
        return _matrix("determinant" if matrix.group(1)[0] == "v" else "matrix", matrix.group(2), depth)
    opening = next((mark for mark in _OPEN if mark != "{" and text.startswith(mark)), None)
    closing = next((mark for mark in _CLOSE if mark != "}" and text.endswith(mark)), None)
    if opening is None or closing is None or _closes(text) != len(text):
        return None
    inner = text[len(opening) : -len(closing)].strip()
    if not inner:
        return Group(_brackets(opening, closing), ())
    parts = list(map(_without_or, _list_parts(inner, in_brackets=True)))
    if len(parts) == 1 and opening == "(" and closing == ")":
        return _node(inner, depth + 1)
    nodes = tuple(_node(part, depth + 1) for part in parts if part.strip())
    return Group(_brackets(opening, closing), nodes)


def _brackets(opening: str, closing: str) -> str:
    return "set" if (opening, closing) == ("\\{", "\\}") else opening.removeprefix("\\") + closing.removeprefix("\\")


def _matrix(kind: str, body: str, depth: int) -> Node:
    rows = [row for row in body.split("\\\\") if row.strip()]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows]
    if not cells or len({len(row) for row in cells}) != 1 or not all(all(row) for row in cells):
        return Leaf("words", canonical_expression(body))
    if len(cells) * len(cells[0]) > _MAX_PARTS:
        raise BadTruth(f"there are more than {_MAX_PARTS} parts")
    parts = tuple(_node(cell, depth + 1) for row in cells for cell in row)
    return Group(f"{kind} {len(cells)}x{len(cells[0])}", parts)


def _plus_minus(text: str, depth: int) -> Node | None:
    r"""`1 \pm \sqrt2` is two values; with several signs all are plus, or all minus."""
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return None
    signs = ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"})
    both = []
    for sign in signs:
        one = text
        for mark, meaning in sign.items():
            one = re.sub(re.escape(mark) + r"(?![a-zA-Z])", meaning, one)
        both.append(one)
    return Group("list", tuple(_node(one.strip().removeprefix("+"), depth + 1) for one in both))


def _leaf(text: str) -> Leaf:
    if (time := _TIME.fullmatch(text)) is not None:
        return Leaf("words", time.group(1), f"{time.group(2).lower()}m")
    if (words := _words(text)) is not None:
        return Leaf("words", words)
    if _SHORT_WORDS.fullmatch(text):
        return Leaf("words", text.lower())
    if (letter := re.fullmatch(r"\\text\s*\{\s*\(?([a-zA-Z])[).]*\s*\}", text)) is not None:
        text = letter.group(1)
    if (based := _BASED.fullmatch(text)) is not None:
        return Leaf("based", f"{based.group(1).upper().lstrip('0') or '0'}_{based.group(2)}")
    measured = without_unit(with_scale(text))
    if measured is None:  # 3\text{ or more}
        return Leaf("words", canonical_expression(text))
    text, unit = measured
    if text == "\\emptyset":
        return Leaf("words", "\\emptyset")
    canonical = canonical_expression(text)
    if ":" in canonical:  # a ratio or a time of day: no value that others could have
        return Leaf("words", canonical, unit)
    value = rational(canonical)
    if value is not None:
        return Leaf("number", str(value), unit, value)
    return Leaf("expression", canonical, unit)


def _words(text: str) -> str | None:
    r"""Words, in small letters: `\text{Evelyn}`, `Evelyn`, `(B)`; None for anything with a value.

    One letter alone may be a variable: it stays as it is.
    """
    if (match := _ONLY_TEXT.fullmatch(text)) is not None:
        text = " ".join(re.findall(r"\{([^{}]*)\}", match.group()))
    elif not re.fullmatch(r"[a-zA-Z]{4,}(?:[ '-][a-zA-Z]+)*", text):
        return None
    text = " ".join(re.sub(r"[().,]", " ", text).split())
    return text.lower() if len(text) > 1 else None


def _without_unit_of_all(text: str) -> str:
    r"""Without the unit of a tuple, matrix or word: `(9, 11)\text{ cm}`. Of one value it is kept, to be compared."""
    if (match := re.fullmatch(r"(.*[)\]}|])\s*(?:\\text\s*\{([^{}]*)\}|%|\\degree)" + POWER, text, re.DOTALL)) is None:
        return text
    rest, words = match.group(1).strip(), match.group(2)
    is_one_value = not _ONLY_TEXT.fullmatch(rest) and not _BASED.fullmatch(rest) and not rest.endswith("]")
    if is_one_value and _closes(rest) != len(rest) and "\\end{" not in rest and "\\cup" not in rest:
        return text
    return rest if words is None or unit_name(words) is not None else text


def _list_parts(text: str, in_brackets: bool) -> list[str]:
    """Parts of a list. Commas that group thousands part nothing: `1,234` is one number, `1,23` and `(1,234)` are two.

    Either all commas without a space group thousands, or none does; in brackets only beside commas with a space.
    """
    parts = _split(text, (",", ";"))
    if in_brackets and not any(part.startswith(" ") for part in parts[1:]):
        return parts
    joined = [parts[0]]
    for part in parts[1:]:
        if part.startswith(" ") or not part:
            joined.append(part)
        elif _GROUP.match(part) and _HEAD.search(joined[-1]):
            joined[-1] += "\0" + part
        else:
            return parts
    return [part.replace("\0", "") for part in joined]


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    r"""Parts between separators outside of all brackets. Brackets of any kind close each other: intervals mix them.

    What stands between `\begin` and `\end` is within brackets, too.
    """
    parts: list[str] = []
    current: list[str] = []
    depth = 0
    for piece in _pieces(text):
        if piece in _OPEN or piece == "\\begin":
            depth += 1
        elif piece in _CLOSE or piece == "\\end":
            depth -= 1
        if depth == 0 and piece in separators:
            parts.append("".join(current))
            current = []
        else:
            current.append(piece)
    return [*parts, "".join(current)]


def _closes(text: str) -> int:
    """Where the bracket that opens the text closes: the position after it, or 0."""
    depth, place = 0, 0
    for piece in _pieces(text):
        place += len(piece)
        depth += (piece in _OPEN) - (piece in _CLOSE)
        if depth == 0:
            return place
    return 0
