"""Exact value of an expression that is nothing but rational numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from math import isqrt

_TOKEN = re.compile(
    r"(?P<repeating>[0-9]*\.[0-9]*\\overline\{[0-9]+\})|(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<command>\\(?:frac|sqrt|cdot|times|div)(?![a-zA-Z]))|(?P<mark>[-+*/^(){} ])"
)
_MAX_DIGITS = 200
_MAX_BITS = 4_000
_MAX_DEPTH = 30


class _NotRational(Exception):
    pass


def rational(text: str) -> Fraction | None:
    r"""The value of a canonical expression of numbers, + - * / ^, `\frac` and roots that come out; None for others.

    `3\frac{1}{2}` and `3 1/2` are mixed numbers. Bounded: long numbers and high powers are left to a worker.
    """
    if re.fullmatch(r"-?[0-9]{1,200}", text):
        return Fraction(int(text))
    if not any(mark.isdigit() for mark in text) or len(text) > 4 * _MAX_DIGITS:
        return None
    tokens = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or len(match.group()) > _MAX_DIGITS:
            return None
        tokens.append((str(match.lastgroup), match.group()))
        place = match.end()
    parser = _Parser(tokens)
    try:
        value = parser.sum(0)
        return value if parser.place == len(tokens) else None
    except (_NotRational, ZeroDivisionError):
        return None


class _Parser:
    """Recursive descent. Implicit products are products; a whole number before a fraction of whole numbers is mixed."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.place = 0

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise _NotRational
        self.place += 1
        return token

    def sum(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise _NotRational
        value = Fraction(0)
        sign = 1
        if self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
        value = sign * self.product(depth)
        while self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            value = _small(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.power(depth)
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                value *= self.signed(depth)
            elif token in ("/", "\\div"):
                self.take()
                value /= self.signed(depth)
            elif token in ("(", "\\sqrt") or (token == "\\frac"):
                value *= self.power(depth)
            else:
                return value
            value = _small(value)

    def signed(self, depth: int) -> Fraction:
        if self.peek() == "-":
            self.take()
            return -self.power(depth)
        return self.power(depth)

    def power(self, depth: int) -> Fraction:
        value = self.atom(depth)
        if self.peek() == "^":
            self.take()
            exponent = self.atom(depth)
            if exponent.denominator != 1 or abs(exponent) > _MAX_BITS:
                raise _NotRational
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits * abs(exponent) > _MAX_BITS:
                raise _NotRational
            value = value ** int(exponent)
        return value

    def atom(self, depth: int) -> Fraction:
        kind, token = self.kind(), self.take()
        if kind == "number":
            return self.mixed(Fraction(token), depth) if token.isdigit() else Fraction(token.rstrip("."))
        if kind == "repeating":
            return _repeating(token)
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            self.take(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            return self.group(depth) / self.group(depth)
        if token == "\\sqrt":
            return _root(self.group(depth))
        raise _NotRational

    def group(self, depth: int) -> Fraction:
        self.take("{")
        value = self.sum(depth + 1)
        self.take("}")
        return value

    def mixed(self, whole: Fraction, depth: int) -> Fraction:
        r"""`3\frac{1}{2}`, `3 1/2`: the fraction is added if it is one of whole numbers, less than 1."""
        rest = [token for _, token in self.tokens[self.place : self.place + 7]]
        if rest[:2] == ["\\frac", "{"] and len(rest) == 7 and rest[3:5] == ["}", "{"] and rest[6] == "}":
            above, below, length = rest[2], rest[5], 7
        elif rest[:1] == [" "] and len(rest) >= 4 and rest[2] == "/":
            above, below, length = rest[1], rest[3], 4
        else:
            return whole
        if not (above.isdigit() and below.isdigit()):
            return whole
        if int(above) >= int(below):
            raise _NotRational  # 3\frac{5}{2}: nobody knows
        self.place += length
        return whole + Fraction(int(above), int(below))


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _NotRational
    return value


def _repeating(token: str) -> Fraction:
    r"""`0.1\overline{6}`."""
    head, _, tail = token.partition("\\overline{")
    whole, _, fixed = head.partition(".")
    digits = tail[:-1]
    scale = 10 ** len(fixed)
    return (int(whole + fixed or "0") + Fraction(int(digits), 10 ** len(digits) - 1)) / scale


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _NotRational
    above, below = isqrt(value.numerator), isqrt(value.denominator)
    if above**2 != value.numerator or below**2 != value.denominator:
        raise _NotRational
    return Fraction(above, below)
