r"""Two expressions that are spelled differently: read by math-verify's parser, compared by value. Runs in workers only.

math-verify's own comparison rounds to six digits (`0.333333` = 1/3), drops units, takes `5=12` for 12 and `A` for `a`;
so only its parser is used. Values are compared to 30 digits, with numbers put in for the variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from zlib import crc32

from smoltulu.tasks.verifiers.math import expected_answers
from smoltulu.tasks.verifiers.math_compare import compare
from smoltulu.tasks.verifiers.math_values import Group, Leaf, Node, read
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

_DIGITS = 50
_TOLERANCE = 1e-30
# Where so much is equal, the difference is looked at with this many digits.
_MORE_DIGITS = 1_000
_MAX_CHARACTERS, _MAX_DEPTH = 300, 20
_NUM_POINTS = 3
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_DROPPED = re.compile(r"'|\\prime|\\ldots|\\phantom|[0-9.] [0-9.]|\.[0-9]*\.|:|\?")
_TOWER = re.compile(r"(?:\^(?:\{[^{}]*\}|\\[a-zA-Z]+|[0-9]+|[a-zA-Z]))+")
_QUOTIENT = re.compile(
    r"(?<![0-9.^_/])([0-9]+(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?(?:\^(?:[0-9]+|\{[0-9]+\}))?)(?![0-9.^!/])"
)
# A line AB, a triangle ABC: the order of the letters counts.
_NAME = re.compile(r"(?<![a-zA-Z\\])[A-Z]{2,}(?![a-zA-Z_])")

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
    return all(_close(a, b) for a, b in pairs) and _difference_vanishes(one, other)


def _proportional(ours: Values, theirs: Values) -> bool:
    """Whether two equations, each with all of it on one side, differ by a factor only."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]
    return len(ratios) >= 2 and ratios[0] != 0 and all(_close(ratio, ratios[0]) for ratio in ratios)


def _close(a: Any, b: Any) -> bool:
    """Relative; a value of 0 may be a sum that cancels, and leaves a trace."""
    return bool(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) or (0 in (a, b) and abs(a - b) <= _TOLERANCE))


def _difference_vanishes(one: Any, other: Any) -> bool:
    """`2^{2005}` and `2^{2005}+\\sqrt2` have the same first 600 digits; rational numbers are compared exactly."""
    import sympy

    numbers = {symbol: _number(str(symbol), 0) for symbol in one.free_symbols | other.free_symbols}
    one, other = one.subs(numbers), other.subs(numbers)
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    difference, size = (one - other).evalf(5, maxn=_MORE_DIGITS), max(abs(one.evalf(5)), abs(other.evalf(5)))
    # What cancels leaves a trace of the last digits; between 0 and such a trace nothing is relative.
    trace = sympy.Rational(1, 10 ** (_MORE_DIGITS * 9 // 10))
    return bool(abs(difference) <= trace * size or abs(difference) <= trace)


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
    """What math-verify's parser reads; None where that is no expression.

    Decimals become fractions, so that nothing is rounded. Letters keep their case. What the parser would drop without
    a word (primes, dots, spaces between digits) makes a text that is no expression.
    """
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if len(text) > _MAX_CHARACTERS or _depth(text) > _MAX_DEPTH or _DROPPED.search(text):
        return None
    try:
        found = latex2sympy(
            _exact(text), normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
    except MemoryError:
        raise
    except Exception:  # it raises whatever it comes to
        return None
    if not isinstance(found, sympy.Basic):
        return None
    # It takes the imaginary unit for a variable where it is alone.
    return found.subs({symbol: sympy.I for symbol in found.free_symbols if str(symbol) == "i"}).doit()


def _depth(text: str) -> int:
    """How deeply brackets nest, with the longest tower of powers without brackets (`2^3^4` has two)."""
    deepest = depth = 0
    for mark in text:
        depth += (mark in "{([") - (mark in "})]")
        deepest = max(deepest, depth)
    return deepest + max((tower.count("^") for tower in _TOWER.findall(text)), default=0)


def _exact(text: str) -> str:
    """Decimals as fractions, `1/2` as one fraction (in `1/2x` it is a factor of x), names of lines as one symbol."""
    text = _QUOTIENT.sub(r"\\frac{\1}{\2}", text)
    text = _DECIMAL.sub(
        lambda match: f"{{\\frac{{{int(match.group(1) + match.group(2))}}}{{{10 ** len(match.group(2))}}}}}", text
    )
    return _NAME.sub(lambda match: f"Q_{{{''.join(str(ord(letter)) for letter in match.group())}}}", text)
