r"""Two expressions that are spelled differently: read by math-verify, compared by value. Runs in workers only.

math-verify's own comparison rounds to six digits (`0.333333` = 1/3), drops units and takes `5=12` for 12; so only its
reading is used. Values are compared to 30 digits, with numbers put in for the variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from zlib import crc32

from smoltulu.tasks.verifiers.math import expected_answers
from smoltulu.tasks.verifiers.math_values import Group, Leaf, Node, compare, read
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

_DIGITS = 50
_TOLERANCE = 1e-30
_MAX_CHARACTERS, _MAX_DEPTH = 300, 20
_NUM_POINTS = 3
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")

#: Values of an expression at the points; None where it has none there (a pole, an unknown function).
Values = tuple[Any, ...]


def prepare() -> None:
    """Import and warm up: the parser builds its tables with the first expression."""
    assert _equal(Leaf("expression", "\\frac{x}{2}"), Leaf("expression", "0.5x"))


def grade_symbolically(answer: str, ground_truth: str, truth_is_read: Callable[[], None]) -> Verdict:
    """The verdict that the text alone did not give."""
    expected = expected_answers(ground_truth)
    for _, node in expected:
        _evaluate(node)
    truth_is_read()
    given = read(answer)
    wanted = " or ".join(quoted(text) for text, _ in expected[:3])
    if any(compare(given, node, _equal) for _, node in expected):
        return right(f"{quoted(answer)} equals {wanted}, by value")
    return wrong(f"{quoted(answer)} is not {wanted}, by value")


def _evaluate(node: Node) -> None:
    """Read and evaluate a ground truth: what takes too long from then on is the answer's fault."""
    if isinstance(node, Leaf):
        if node.kind in ("number", "expression"):
            _values(node.text)
        elif node.kind == "equation":
            _differences(node.text)
    else:
        for part in node.parts if isinstance(node, Group) else (node.node,):
            _evaluate(part)


def _equal(given: Leaf, expected: Leaf) -> bool:
    if given.kind == "equation":
        return _proportional(_differences(given.text), _differences(expected.text))
    one, other = _expression(given.text), _expression(expected.text)
    if one is None or other is None:
        return False
    pairs = [pair for pair in zip(_values(given.text), _values(expected.text), strict=True) if None not in pair]
    if len(pairs) < 2:  # an infinity, an undefined function f(x): only the same tree is equal
        return bool(one == other)
    return all(_close(a, b) for a, b in pairs)


def _proportional(ours: Values, theirs: Values) -> bool:
    """Whether two equations, each with all of it on one side, differ by a factor only."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]
    return len(ratios) >= 2 and ratios[0] != 0 and all(_close(ratio, ratios[0]) for ratio in ratios)


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= _TOLERANCE * max(1, abs(a), abs(b)))


@lru_cache(maxsize=5_000)
def _differences(text: str) -> Values:
    """Left side less right side of an equation, at the points."""
    sides = [_values(side) for side in text.split("=")]
    if len(sides) != 2:
        return (None,) * _NUM_POINTS
    return tuple(None if a is None or b is None else a - b for a, b in zip(*sides, strict=True))


@lru_cache(maxsize=5_000)
def _values(text: str) -> Values:
    """mpmath numbers of 50 digits: the expression with numbers for its variables, everywhere the same for one."""
    import sympy

    expression = _expression(text)
    values: list[Any] = []
    for point in range(_NUM_POINTS):
        value = None
        if isinstance(expression, sympy.Expr):
            numbers = {symbol: _number(str(symbol), point) for symbol in expression.free_symbols}
            number = sympy.N(expression.subs(numbers), _DIGITS)
            if number.is_number and number.is_finite:
                value = number._to_mpmath(200)
        values.append(value)
    return tuple(values)


def _number(variable: str, point: int) -> Any:
    """A rational number of a variable; no two variables share one. The second point is negative."""
    import sympy

    size = sympy.Rational(crc32(f"{variable} {point}".encode()) % 999_983 + 7, 333_331)
    return -size if point == 1 else size


@lru_cache(maxsize=5_000)
def _expression(text: str) -> Any:
    """What math-verify reads; None where that is no expression. Decimals become fractions: nothing is rounded."""
    from math_verify import LatexExtractionConfig, parse

    if len(text) > _MAX_CHARACTERS or _depth(text) > _MAX_DEPTH:
        return None
    exact = _DECIMAL.sub(
        lambda match: f"{{\\frac{{{int(match.group(1) + match.group(2))}}}{{{10 ** len(match.group(2))}}}}}", text
    )
    found = parse(f"${exact}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0].doit() if found and hasattr(found[0], "doit") else None


def _depth(text: str) -> int:
    deepest = depth = 0
    for mark in text:
        depth += (mark in "{([^") - (mark in "})]")
        deepest = max(deepest, depth)
    return deepest
