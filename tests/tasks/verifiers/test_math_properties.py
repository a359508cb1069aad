r"""MATH, `fixed`, by property: spellings of drawn values are equal exactly if the values are."""

from __future__ import annotations

import random
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tasks.verifiers.test_math import quick

# Properties: values are drawn, and spelled in every way that is known; the spellings decide nothing.

rationals = st.fractions(min_value=-10_000, max_value=10_000, max_denominator=400)


def spellings(value: Fraction) -> list[str]:
    sign, size = ("-" if value < 0 else ""), abs(value)
    above, below = size.numerator, size.denominator
    found = [f"{sign}\\frac{{{above}}}{{{below}}}", f"{sign}\\dfrac{{{above}}}{{{below}}}", f"{sign}{above}/{below}",
             f"\\frac{{{sign}{above}}}{{{below}}}", f"{sign}\\tfrac{{{3 * above}}}{{{3 * below}}}"]  # fmt: skip
    if above < 10 and below < 10:
        found.append(f"{sign}\\frac{above}{below}")
    if below == 1:
        found += [f"{sign}{above}", f"{sign}{above:,}", f"{sign}{above}.0", f"{sign}{above}.", f"{sign}0{above}"]
    decimals = next((n for n in range(7) if 10**n % below == 0), None)
    if decimals:
        digits = str(above * 10**decimals // below).zfill(decimals + 1)
        found += [
            f"{sign}{digits[:-decimals]}.{digits[-decimals:]}",
            f"{sign}{digits[:-decimals]}.{digits[-decimals:]}00",
        ]
        if size < 1:
            found.append(f"{sign}.{digits[-decimals:]}")
    if above > below > 1:
        found.append(f"{sign}{above // below}\\frac{{{above % below}}}{{{below}}}")
    return found


def dress(text: str, rng: random.Random) -> str:
    """What never changes a value."""
    return rng.choice([
        text, f"${text}$", f" {text} ", f"{{{text}}}", f"\\displaystyle {text}", f"{text}.", f"x = {text}",
        f"{text}\\text{{ cm}}", f"{text}\\,\\mathrm{{cm}}", f"{text}\\!", f"\\,{text}", f"= {text}",
    ])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(rationals, rationals, st.randoms(use_true_random=False))
def test_numbers_are_equal_exactly_if_their_values_are(a: Fraction, b: Fraction, rng: random.Random) -> None:
    assert quick(dress(rng.choice(spellings(a)), rng), rng.choice(spellings(a))) is True
    assert quick(dress(rng.choice(spellings(a)), rng), rng.choice(spellings(b))) is (a == b)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(rationals, min_size=1, max_size=4),
    st.lists(rationals, min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_lists_are_equal_exactly_if_they_hold_the_same(
    a: list[Fraction], b: list[Fraction], rng: random.Random
) -> None:
    def spelled(values: list[Fraction], brackets: tuple[str, str]) -> str:
        # A space after the comma: `1,234` would be one number.
        return brackets[0] + ", ".join(rng.choice(spellings(value)) for value in values) + brackets[1]

    shuffled = rng.sample(a, len(a))
    plain, as_set, in_order, closed = ("", ""), (r"\{", r"\}"), ("(", ")"), ("[", "]")
    assert quick(spelled(shuffled, plain), spelled(a, plain)) is True
    assert quick(spelled(a, plain), spelled(b, plain)) is (sorted(a) == sorted(b))
    if len(a) > 1:
        assert quick(spelled(shuffled, as_set), spelled(a, plain)) is True
        assert quick(spelled(a, in_order), spelled(a, in_order)) is True
        assert quick(spelled(shuffled, in_order), spelled(a, in_order)) is (shuffled == a)
        assert quick(spelled(a, in_order), spelled(a, closed)) is False
        assert quick(spelled(a, plain), spelled(a[:1], plain)) is False


@settings(max_examples=200, deadline=None)
@given(
    rationals,
    rationals,
    st.sampled_from(["()", "[]", "(]", "[)"]),
    st.sampled_from(["()", "[]", "(]", "[)"]),
    st.randoms(use_true_random=False),
)
def test_intervals_are_equal_exactly_if_ends_and_brackets_are(
    a: Fraction, b: Fraction, one: str, other: str, rng: random.Random
) -> None:
    def interval(brackets: str) -> str:
        left, right = rng.choice(spellings(a)), rng.choice(spellings(b))
        relations = ["<" if mark in "()" else rng.choice([r"\le", r"\leq", "≤"]) for mark in brackets]
        return rng.choice([
            f"{brackets[0]}{left}, {right}{brackets[1]}",
            f"\\left{brackets[0]}{left},\\, {right}\\right{brackets[1]}",
            f"x \\in {brackets[0]}{left}, {right}{brackets[1]}",
            f"{left} {relations[0]} x {relations[1]} {right}",
        ])  # fmt: skip

    assert quick(interval(one), interval(one)) is True
    assert quick(interval(one), interval(other)) is (one == other)


_UNITS = {
    "cm": ["\\text{ cm}", "\\mathrm{cm}", " cm", "\\text{ centimeters}"],
    "kg": ["\\text{ kg}", " kg", "\\,\\text{kilograms}"],
    "cm^2": ["\\text{ cm}^2", "\\text{ square cm}"],
    "degree": ["^\\circ", "^{\\circ}", "\\text{ degrees}"],
}


@settings(max_examples=200, deadline=None)
@given(
    rationals,
    rationals,
    st.sampled_from(sorted(_UNITS)),
    st.sampled_from(sorted(_UNITS)),
    st.randoms(use_true_random=False),
)
def test_a_unit_counts_where_both_have_one(a: Fraction, b: Fraction, one: str, other: str, rng: random.Random) -> None:
    first = rng.choice(spellings(a)).rstrip(".") + rng.choice(_UNITS[one])
    second = rng.choice(spellings(b)).rstrip(".") + rng.choice(_UNITS[other])
    assert quick(first, rng.choice(spellings(a))) is True
    assert quick(first, rng.choice(spellings(b))) is (a == b)
    assert quick(first, second) is (a == b and one == other)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(-12, 12), st.integers(-12, 12))
def test_a_power_of_ten_is_read_however_it_is_typed(whole: int, rest: int, power: int, other: int) -> None:
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = f"{whole}.{rest:02}"
    truth = str(Fraction(digits) * Fraction(10) ** other)
    for answer in (
        f"{digits}e{power}", f"{digits}E{power}", f"{digits}×10^{power}", f"{digits}*10**{power}",
        f"{digits} · 10{raised}", f"{digits}\\cdot 10^{{{power}}}",
    ):  # fmt: skip
        assert quick(answer, truth) is (power == other)


_CHANGING = ["or {n}", ", {n}", "and {n}", "or {n} or 7", "or more", "or less", "halves", "thirds", "quarters",
             "squared", "cubed", "factorial", "percent or {n}", "times {n}", "(mod {n})", "at least", "not", "(or {n})",
             "hundredths", "and a half", "to {n}", "plus one", "or cm"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(_CHANGING), st.sampled_from(["text", "mbox"]))
def test_words_that_make_another_value_are_never_dropped(a: int, b: int, words: str, command: str) -> None:
    """A hedge is not paid for the value before it, nor for the one after it."""
    answer = f"{a}\\{command}{{ {words.format(n=b)}}}"
    assert quick(answer, str(a)) is not True
    assert quick(answer, str(b)) is not True
    assert quick(answer, answer) is True
