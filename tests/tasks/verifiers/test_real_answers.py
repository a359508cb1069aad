"""Real solutions: MATH's 5,000 against their own answers and each other's, GSM8K's in the form of Tulu's prompts."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from smoltulu.tasks.verifiers import Graders
from smoltulu.tasks.verifiers.answers import last_boxed
from smoltulu.tasks.verifiers.rules import grade_quickly
from tests import ROOT

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or ROOT.parent / "shared" / "data")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data absent: {DATA} (set SMOLTULU_REAL_DATA)")


def rows(name: str) -> Iterator[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


@pytest.fixture(scope="module")
def solutions() -> list[str]:
    return [row["solution"] for row in rows("eval/math_test.jsonl.gz")]


@pytest.fixture(scope="module")
def golds(solutions: list[str]) -> list[str]:
    found = [last_boxed(solution) for solution in solutions]
    assert None not in found
    return [gold for gold in found if gold is not None]


def test_every_solution_of_math_verifies_against_its_own_answer(solutions: list[str], golds: list[str]) -> None:
    """And against itself as a ground truth. math-verify alone: 4,992 of 5,000."""
    assert len(golds) == 5_000
    for solution, gold in zip(solutions, golds, strict=True):
        for truth in (gold, solution, json.dumps([gold, "12345"])):
            verdict = grade_quickly("math", solution, truth)
            assert verdict is not None and verdict.outcome == "right", (gold, verdict)


def test_shuffled_answers_coincide_as_often_as_chance_has_it(golds: list[str]) -> None:
    """Computed from the answers: how often two drawn at random are the same text."""
    shuffled = Random(0).sample(golds, len(golds))
    chance = sum(number * (number - 1) for number in Counter(golds).values()) / (len(golds) * (len(golds) - 1))
    pairs = list(zip(golds, shuffled, strict=True))
    verdicts = [grade_quickly("math", f"\\boxed{{{given}}}", truth) for given, truth in pairs]
    num_right = sum(verdict is not None and verdict.outcome == "right" for verdict in verdicts)
    assert 0.005 < chance < 0.015
    # Binomial: four standard deviations are 0.53 %.
    assert abs(num_right / len(golds) - chance) < 0.0055


@pytest.mark.parametrize(
    ("spelling", "at_least"),
    [
        (lambda gold: re.sub(r"\\[dt]?frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold), 1.0),
        (lambda gold: re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold), 1.0),
        (lambda gold: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold), 1.0),
        (lambda gold: gold.replace("\\frac", "\\dfrac"), 1.0),
        (lambda gold: gold.replace("(", "\\left(").replace(")", "\\right)"), 1.0),
        (lambda gold: f"${gold}$", 1.0),
        (lambda gold: f"x = {gold}", 0.99),  # some begin with another name
        (lambda gold: rf"{gold}\text{{ cm}}", 0.95),  # some have another unit
    ],
)
def test_other_spellings_of_real_answers_are_right(golds: list[str], spelling, at_least: float) -> None:  # type: ignore[no-untyped-def]
    pairs = [(spelling(gold), gold) for gold in golds if spelling(gold) != gold]
    assert len(pairs) > 100
    verdicts = [grade_quickly("math", f"\\boxed{{{given}}}", gold) for given, gold in pairs]
    assert sum(verdict is not None and verdict.outcome == "right" for verdict in verdicts) >= at_least * len(pairs)


def test_changed_answers_are_wrong(golds: list[str]) -> None:
    """Another digit, twice the answer, an interval around it: never the same value."""
    with Graders() as graders:
        pairs = [
            (re.sub(r"[1-9]", lambda digit: str(int(digit.group()) % 9 + 1), gold, count=1), gold) for gold in golds
        ]
        pairs = [(given, gold) for given, gold in pairs if given != gold][::5]
        pairs += [(f"{gold}, {gold}", gold) for gold in golds[::5]] + [(f"[{gold}]", gold) for gold in golds[::5]]
        verdicts = graders.grade_all(("math", f"\\boxed{{{given}}}", gold) for given, gold in pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.outcome != "wrong"] == []


def test_gsm8k_pays_the_answers_that_tulus_prompts_teach() -> None:
    answers = [row["answer"] for row in rows("train/gsm8k_train.jsonl.gz")]
    assert len(answers) == 7_473
    num_paper = 0
    for answer in answers:
        number = answer.rpartition("####")[2].strip()
        taught = answer.rpartition("####")[0] + f"So the answer is {number}."
        for name, completion, truth, score in (
            ("gsm8k", taught, number, 1.0),
            ("gsm8k", answer, answer, 1.0),
            ("gsm8k_strict", answer, number, 1.0),
            ("gsm8k_strict", taught, number, 0.0),
        ):
            verdict = grade_quickly(name, completion, truth)
            assert verdict is not None and verdict.score == score, (name, completion, verdict)
        paper = grade_quickly("gsm8k@paper", taught, number)
        num_paper += paper is not None and paper.outcome == "right"
    # The rest have a comma or a sign in the ground truth, which the original never pays.
    assert num_paper == sum(
        re.fullmatch(r"\d+(\.\d+)?|-?\d*\.\d+", row.rpartition("####")[2].strip()) is not None for row in answers
    )
