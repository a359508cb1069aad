"""Verifiers against cases worked out by hand."""

from __future__ import annotations

import json

import pytest

from smoltulu.tasks.verifiers import verify


@pytest.mark.parametrize(
    ("completion", "ground_truth", "score"),
    [
        ("5+3=8\n#### 8", "8", 1.0),
        ("#### 18.00", "18", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("#### 1000", "so it is\n#### 1,000", 1.0),
        ("#### -5", "-5", 1.0),
        ("#### -5", "5", 0.0),
        ("#### 5", "-5", 0.0),
        ("#### −5", "-5", 1.0),
        ("#### $18.", "18", 1.0),
        ("#### -$3", "-3", 1.0),
        ("#### 8 apples", "8", 1.0),
        ("#### 7\n#### 8", "8", 1.0),
        ("#### 8\n#### 7", "8", 0.0),
        ("#### 7 8", "8", 0.0),  # a guess spread over two numbers
        ("#### 3-5", "5", 0.0),
        ("8", "8", 0.0),  # no mark
        ("####", "8", 0.0),
        ("", "8", 0.0),
        ("#### eight", "8", 0.0),
        ("#### 8", "no number", None),
        ("#### 8", "", None),
    ],
)
def test_gsm8k(completion: str, ground_truth: str, score: float | None) -> None:
    assert verify("gsm8k", completion, ground_truth) == score


@pytest.mark.parametrize(
    ("completion", "ground_truth", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"so \boxed{\dfrac{1}{2}}.", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{3} no, \boxed{4}", "4", 1.0),
        (r"the value is $4$ or $ 5 $", "5", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{4.0}", "4", 1.0),
        (r"\boxed{4", "4", 0.0),  # cut off
        ("4", "4", 0.0),
        ("", "4", 0.0),
        ("$$", "4", 0.0),
        (r"\boxed{4}", "", None),
        (r"\boxed{a\rightarrow b}", r"aarrow b", 0.0),
    ],
)
def test_math(completion: str, ground_truth: str, score: float | None) -> None:
    assert verify("math", completion, ground_truth) == score
    assert verify("MATH", completion, ground_truth) == score


FOX = ["red", "fox"]


@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        ({"kind": "upper_case", "mention": FOX}, "THE RED FOX RUNS.", "The RED FOX RUNS"),
        ({"kind": "upper_case", "mention": FOX}, "RED FOX", "A RED HEN"),
        ({"kind": "ends_with", "text": "amen", "mention": FOX}, "the red fox runs amen.", "amen the red fox runs"),
        ({"kind": "starts_with", "text": "Well", "mention": FOX}, "Well the red fox", "the red fox Well"),
        ({"kind": "word_count", "count": 4, "mention": FOX}, "the red fox runs", "the red fox runs now"),
        ({"kind": "items", "count": 2, "among": ["fig", "pear"]}, "- Fig\n2. pear", "- fig\n- fig"),
        ({"kind": "items", "count": 1, "among": ["fig", "pear"]}, "fig", "fig\npear"),
        ({"kind": "items", "count": 2, "among": ["fig", "pear"]}, "fig\n\npear\n", "fig\nrock"),
    ],
)
def test_constraint(constraint: dict[str, object], right: str, wrong: str) -> None:
    ground_truth = json.dumps(constraint)
    assert verify("constraint", right, ground_truth) == 1.0
    assert verify("constraint", wrong, ground_truth) == 0.0
    for empty in ("", " \n", ".", "-", "!!!"):
        assert verify("constraint", empty, ground_truth) == 0.0


@pytest.mark.parametrize("broken", ["", "{", "[]", "3", "{}", '{"kind": "rhyme"}', '{"kind": "items"}',
                                    '{"kind": "word_count", "count": "many"}', '{"kind": "ends_with", "text": 3}',
                                    '{"kind": "upper_case", "mention": 3}'])  # fmt: skip
def test_a_broken_constraint_is_ungradable(broken: str) -> None:
    assert verify("constraint", "THE RED FOX", broken) is None


@pytest.mark.parametrize("name", ["gsm8k", "math", "constraint"])
@pytest.mark.parametrize(
    "text", ["\x00", "####" * 1000, "{" * 5000, "\\boxed{" * 500, "9" * 5000, "#### ٣", "#### 1e999"]
)
def test_odd_completions_never_raise(name: str, text: str) -> None:
    truth = '{"kind": "upper_case", "mention": ["a"]}' if name == "constraint" else "8"
    assert verify(name, text, truth) == 0.0


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown verifier 'gsm9k'; known verifiers: constraint, gsm8k, math"):
        verify("gsm9k", "#### 8", "8")
    with pytest.raises(ValueError, match="IFEval"):
        verify("ifeval", "text", "{}")
