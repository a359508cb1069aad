"""Near misses: by hand, planted rules that take what is close, and small honest sources that must not be stopped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.verifier_audit import GroupAudit, VerifierAuditSettings
from smoltulu.tasks.verifier_audit.audit import audit_rows
from smoltulu.tasks.verifier_audit.checks import problems
from smoltulu.tasks.verifier_audit.near_misses import hedges, near_misses
from smoltulu.tasks.verifiers import Verdict, grade_all

SETTINGS = VerifierAuditSettings(num_shuffled=300, num_hacked=20)
Jobs = Sequence[tuple[str, str, str]]


def audited(verifier: str, truths: Sequence[str], grade: Any = grade_all) -> tuple[GroupAudit, list[str]]:
    prompt = [{"role": "user", "content": "Compute it."}]
    rows = [
        {"id": f"0:{i}", "prompt": prompt, "verifier": verifier, "ground_truth": truth}
        for i, truth in enumerate(truths)
    ]
    (group,), _, _ = audit_rows(rows, SETTINGS, grade)
    return group, problems([group], SETTINGS)


def test_near_misses_by_hand() -> None:
    assert [text for _, text in near_misses("-12.5").items()] == [
        "-11.5", "-13.5", "12.5", "-125", "-1.25", "-112.5", "-12.51", "-21.5",
    ]  # fmt: skip
    assert list(near_misses("1,007").values()) == ["1008", "1006", "-1007", "10070", "100.7", "11007", "10071", "0107"]
    # Of nothing, its own opposite and multiples are no other value.
    assert near_misses("0") == {
        "near miss: one more": "1", "near miss: one less": "-1", "near miss: a digit before": "10",
        "near miss: a digit after": "1",
    } | {"near miss: a digit after": "01"}  # fmt: skip
    assert near_misses("x+1") == near_misses("1/2") == near_misses("1" * 500) == hedges("yes", with_latex=True) == {}
    assert list(hedges("3", with_latex=True).values()) == ["3 or 4", r"3\text{ or }4", r"3\text{ or 4}"]


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
def test_near_misses_are_numbers_of_another_value(gold: Any) -> None:
    found = near_misses(str(gold))
    assert len(found) >= 4 and all(Fraction(text) != Fraction(gold) for text in found.values())
    assert Fraction(found["near miss: one more"]) == Fraction(gold) + 1


def close(jobs: Jobs) -> list[Verdict]:
    """Right within a tenth of the truth."""
    numbers = [re.findall(r"-?\d+", text) for _, text, _ in jobs]
    return [
        Verdict("right" if found and abs(int(found[-1]) - int(truth)) <= 0.1 * abs(int(truth)) else "wrong", "close")
        for found, (_, _, truth) in zip(numbers, jobs, strict=True)
    ]


def suffix(jobs: Jobs) -> list[Verdict]:
    """Signs do not count, and whatever ends with the truth is right."""
    return [
        Verdict("right" if text.replace("-", "").rstrip(".").endswith(truth) else "wrong", "ends with it")
        for _, text, truth in jobs
    ]


def anywhere(jobs: Jobs) -> list[Verdict]:
    return [Verdict("right" if truth in text else "wrong", "says it") for _, text, truth in jobs]


def never_wrong(jobs: Jobs) -> list[Verdict]:
    honest = zip(grade_all(jobs), jobs, strict=True)
    return [
        verdict if verdict.outcome == "right" or not text else Verdict("could_not_grade", "x")
        for verdict, (_, text, _) in honest
    ]


@pytest.mark.parametrize(
    ("planted", "truths", "problem"),
    [
        (close, [str(int(10 * 1.5**i)) for i in range(30)], "near miss: one more' scores right on 20 of 20"),
        (suffix, [str(i * 37 + 1000) for i in range(30)], "near miss: the other sign' scores right on 20 of 20"),
        (suffix, [str(i * 37 + 1000) for i in range(30)], "near miss: a digit before' scores right on 20 of 20"),
        (anywhere, [str(i * 37 + 1000) for i in range(30)], "near miss: the answer or another' scores right on 20"),
        (anywhere, [str(i * 37 + 1000) for i in range(30)], "near miss: a digit after' scores right on 20 of 20"),
        (never_wrong, [str(i) for i in range(30)], "texts that are not the answer (95.44 %) are not graded"),
    ],
)
def test_planted_rules_are_stopped(planted: Any, truths: list[str], problem: str) -> None:
    assert any(problem in one for one in audited("gsm8k", truths, planted)[1])


@pytest.mark.parametrize(
    "truths",
    [
        [r"\sqrt{8}", r"2\sqrt{2}", "3", "4", "5"],
        [r"5\text{ cm}", "5", "3", "4", "7"],
        ["1,2", "2,1", "3", "4", "7"],
        ["x=5", "5", "3", "4", "7"],
    ],
    ids=str,
)
def test_other_spellings_of_one_answer_stop_nothing(truths: list[str]) -> None:
    group, found = audited("math", truths)
    assert not found and group.num_gold_right == 5


def test_other_spellings_are_listed() -> None:
    group, _ = audited("math", [r"\sqrt{8}", r"2\sqrt{2}", "3", "4", "5"])
    # 300 draws of 20 ordered pairs, of which two are equal: 30 expected, standard deviation 5.
    assert 10 < group.num_shuffled_equal == group.num_shuffled_right < 50
    assert any(one.finding == "shuffled_equal" for one in group.examples)


def test_two_different_numbers_are_never_two_spellings() -> None:
    """A loophole says right from both sides, so numbers are not asked the other way round."""

    def boxed(jobs: Jobs) -> list[Verdict]:
        return [Verdict("right" if "boxed" in text else "wrong", "boxed") for _, text, _ in jobs]

    group, found = audited("math", [str(i) for i in range(30)], boxed)
    assert group.num_shuffled_equal == 0 and any("300 of 300 gold answers of other rows" in one for one in found)


def test_a_gold_answer_among_alternatives_is_no_near_miss() -> None:
    assert not audited("gsm8k", ['["3", "4"]', '["10", "-10"]', '["5", "50"]'])[1]
