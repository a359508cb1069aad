"""Verifiers by name, and the plain ones, against cases worked out by hand."""

from __future__ import annotations

import json

import pytest

from smoltulu.tasks.verifiers import VERSIONS, canonical_name, fault_of_truth, grade, grade_all, verify


@pytest.mark.parametrize(
    ("completion", "ground_truth", "score"),
    [
        ("She has 16 + 2 pens. So the answer is 18.", "18", 1.0),
        ("5+3=8", "8", 1.0),
        ("8", "8", 1.0),
        ("So the answer is 18.00", "18", 1.0),
        ("it is 18", "18.0", 1.0),
        ("it costs $1,000.", "1000", 1.0),
        ("it costs 1000 dollars", "so it is\n#### 1,000", 1.0),
        ("it is -5", "-5", 1.0),
        ("it is -5", "5", 0.0),
        ("it is 5", "-5", 0.0),
        ("it is −5", "-5", 1.0),
        ("it loses -$3", "-3", 1.0),
        ("it loses $-3", "-3", 1.0),
        ("16-2", "2", 1.0),  # a minus between two numbers is no sign
        ("of the 20 %, 18 %", "18", 1.0),
        ("18 (not 20)", "18", 0.0),  # Tulu's rule: the last number
        ("1/2", "2", 1.0),
        ("first 18, then 20", "18", 0.0),
        ("1,2", "12", 0.0),
        ("1,2", "2", 1.0),
        (r"\boxed{1{,}000}", "1000", 1.0),
        ("007.50", "7.5", 1.0),
        ("-0", "0", 1.0),
        (".5", "0.5", 1.0),
        ("٣", "3", 0.0),
        ("eight", "8", 0.0),
        ("", "8", 0.0),
        # a marked answer is the one meant, whatever follows
        ("#### 42\nThis took 3 steps.", "42", 1.0),
        ("#### 42\nThis took 3 steps.", "3", 0.0),
        ("#### 7\n#### 8", "8", 1.0),
        ("####\nThe answer is 8", "8", 1.0),
        ("#### Step 1: add. The answer is 18", "18", 1.0),  # a heading
        ("#### 5 kg", "5", 1.0),
        ("#### - 5", "-5", 1.0),
        ("#### - 5", "5", 0.0),
        # ... and no part of it is
        *(
            (f"#### {more}", part, 0.0)
            for more, part in (
                ("18-20", "20"),
                ("1/2", "2"),
                ("3:30", "30"),
                ("1,5", "5"),
                ("5e3", "5"),
                ("5 million", "5"),
                ("5½", "5"),
                ("5 1/2", "5"),
                ("5k", "5"),
                ("1_000", "1"),
                ("1 000", "1"),
                ("1 000", "0"),
                ("5 * 2", "5"),
                ("5 - 3", "5"),
                ("2 + 3 = 5", "2"),
                ("5 dozen", "5"),
                ("3 or 4", "3"),
                ("3, or $4", "3"),
            )
        ),
        # any of several
        ("8", '["8", "9"]', 1.0),
        ("9", '["8", "9"]', 1.0),
        ("7", '["8", "9"]', 0.0),
        ("8", "no number", None),
        ("8", "8 or 9", None),
        ("8", "", None),
        ("8", "[]", None),
        ("8", '["8", ""]', None),
        ("8", '["8", "many"]', None),
    ],
)
def test_gsm8k_is_the_last_number(completion: str, ground_truth: str, score: float | None) -> None:
    assert verify("gsm8k", completion, ground_truth) == score


@pytest.mark.parametrize(
    ("completion", "ground_truth", "score"),
    [
        ("5+3=8\n#### 8", "8", 1.0),
        ("#### 18.00", "18", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("#### −5", "-5", 1.0),
        ("#### -$3", "-3", 1.0),
        ("#### $18.", "18", 1.0),
        ("#### 8 apples", "8", 1.0),
        ("#### 42\nThis took 3 steps.", "42", 1.0),
        ("#### 42 (of 50)", "42", 1.0),
        ("#### 8\n#### 7", "8", 0.0),
        ("#### 7 8", "8", 0.0),
        ("#### 3-5", "5", 0.0),
        ("#### 3-5", "3", 0.0),
        ("#### 1/2", "1", 0.0),
        ("#### 1,2", "1", 0.0),
        ("#### is 8", "8", 0.0),
        ("####\n", "8", 0.0),
        ("####", "8", 0.0),
        ("8", "8", 0.0),  # no mark
        ("", "8", 0.0),
        ("#### 8", "no number", None),
    ],
)
def test_gsm8k_strict_wants_the_mark(completion: str, ground_truth: str, score: float | None) -> None:
    assert verify("gsm8k_strict", completion, ground_truth) == score


def test_a_guess_spread_over_all_numbers_is_no_answer() -> None:
    spread = " ".join(map(str, range(1, 101)))
    assert verify("gsm8k", spread, "18") == 0.0
    assert verify("gsm8k_strict", f"#### {spread}", "18") == 0.0
    assert verify("math", rf"\boxed{{{spread}}}", "18") == 0.0
    assert verify("math", rf"\boxed{{{spread.replace(' ', ',')}}}", "18") == 0.0
    assert verify("math", " ".join(rf"\boxed{{{number}}}" for number in range(1, 101)), "18") == 0.0


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


@pytest.mark.parametrize(
    ("mention", "right", "wrong"),
    [
        ("red fox", "The Red\nfox ran, amen", "The fox ran red, amen"),
        ("red fox", "A red  fox, amen", "A red foxtrot, amen"),
        ("don't", "We don't, amen", "We do not, amen"),
        ("C++", "We like c++, amen", "We like C, amen"),
        ("Straße", "DIE STRASSE amen", "DER WEG amen"),
    ],
)
def test_a_constraint_mentions_whole_phrases(mention: str, right: str, wrong: str) -> None:
    truth = json.dumps({"kind": "ends_with", "text": "amen", "mention": [mention]})
    assert (verify("constraint", right, truth), verify("constraint", wrong, truth)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "broken",
    [
        "", "{", "[]", "3", "{}", '{"kind": "rhyme"}', '{"kind": "items"}', '{"kind": 3}', '{"kind": "ends_with"}',
        '{"kind": "word_count", "count": "many"}', '{"kind": "word_count", "count": Infinity}',
        '{"kind": "word_count", "count": NaN}', '{"kind": "word_count", "count": 1e999}',
        '{"kind": "word_count", "count": 2.5}', '{"kind": "word_count", "count": true}',
        '{"kind": "word_count", "count": -1}', '{"kind": "word_count", "count": 4, "among": []}',
        '{"kind": "word_count", "count": ' + "9" * 6_000 + "}", '{"kind": "ends_with", "text": 3}',
        '{"kind": "upper_case", "mention": 3}', '{"kind": "upper_case", "mention": [[]]}', "[" * 100_000,
        '{"kind": ' * 3_000, "x" * 30_000,
    ],
)  # fmt: skip
def test_a_broken_constraint_could_not_be_graded(broken: str) -> None:
    assert verify("constraint", "THE RED FOX", broken) is None
    assert verify("ifeval", "THE RED FOX", broken) is None
    assert fault_of_truth("constraint", broken)


def test_counts_of_tables_are_whole_numbers() -> None:
    assert verify("constraint", "one two three", '{"kind": "word_count", "count": 3.0}') == 1.0


@pytest.mark.parametrize(
    ("completion", "ground_truth", "score"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("a\r\nb", "a\nb", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("Rome", '["Paris", "Rome"]', 1.0),
        ("[1,2]", "[1,2]", 1.0),
        ("Paris", " ", None),
    ],
)
def test_exact_match(completion: str, ground_truth: str, score: float | None) -> None:
    assert verify("exact_match", completion, ground_truth) == score


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ("number", "it is 8", "eight"),
        ("hash", "5+3=8\n#### 8", "#### 8\nand so on"),
        ("hash", "#### -$3", "####"),
        ("boxed", r"so \boxed{8}.", r"\boxed{8} or \boxed{9}"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\boxed{}"),
        ("think_answer", "<think>a</think> <answer>b</answer>", "<think> </think><answer>b</answer>"),
        ("think_answer", "<think>a</think><answer>b</answer>", "<answer>b</answer><think>a</think>"),
        ("think_answer", "<think>a</think><answer>b</answer>", "x<think>a</think><answer>b</answer>"),
        ("json", '{"a": 1}', "8"),
        ("So the answer is {}.", "So the answer is 8.", "So the answer is ."),
        ("Q: {} A: {}", "Q: a A: b", "Q: A: b"),
        ("{} because {}", "a because b", "because b"),
    ],
)
def test_format(form: str, right: str, wrong: str) -> None:
    assert verify("format", right, form) == 1.0
    assert verify("format", wrong, form) == 0.0
    assert verify("format", "", form) == 0.0


def test_a_form_that_nobody_knows_is_named_with_the_nearest() -> None:
    fault = fault_of_truth("format", "boxd")
    assert fault is not None and "unknown form 'boxd' (did you mean 'boxed'?); known are number, hash" in fault


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", r"unknown verifier 'gsm9k' \(did you mean 'gsm8k'\?\); known are gsm8k, gsm8k_strict, math, ifeval"),
        ("", "unknown verifier ''; known are"),
        ("gsm8k@papr", r"has no version 'papr' \(did you mean 'paper'\?\); there is gsm8k@fixed, gsm8k@paper"),
        ("constraint@paper", "'constraint' has no version 'paper'; there is constraint@fixed"),
        ("gsm8k@", "has no version ''"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_and_the_known(name: str, message: str) -> None:
    for call in (lambda: grade(name, "8", "8"), lambda: verify(name, "8", "8"), lambda: fault_of_truth(name, "8")):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_name_has_one_spelling() -> None:
    assert [canonical_name(name) for name in ("GSM8K", "math@fixed", "MATH@Paper", " ifeval ")] == [
        "gsm8k", "math", "math@paper", "ifeval",
    ]  # fmt: skip
    assert verify("MATH@FIXED", r"\boxed{4}", "4") == 1.0
    for name, versions in VERSIONS.items():
        assert canonical_name(f"{name}@{versions[0]}") == name


def test_verdicts_say_why() -> None:
    verdicts = grade_all([("gsm8k", "so 18", "18"), ("gsm8k", "so 12", "13"), ("gsm8k", "so 12", "x")])
    assert [(verdict.outcome, verdict.reason) for verdict in verdicts] == [
        ("right", "last number 18 equals 18"),
        ("wrong", "last number 12 is not 13"),
        ("could_not_grade", "the ground truth holds no number, or several"),
    ]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, None]
    long = grade("math", "\\boxed{" + "x\x1b" * 200 + "}", "2").reason
    assert len(long) < 200 and long.isprintable()
