"""The tests of one row, by hand."""

from __future__ import annotations

import math
import random

import pytest

from smoltulu.tasks.tables.significance import Figure, direction, row_tests, unpaired_p
from tests.tasks.tables.scores import right, score


def ours(num_right: int, **changes: str) -> Figure:
    made = right(num_right)
    return Figure(made.score.value, made.score.stderr, made, changes.get("group"))


def test_unpaired_by_hand() -> None:
    # z = 2 / sqrt(1 + 1) = 1.41421; 2 Phi(-z) = 0.157299
    assert unpaired_p(Figure(50, 1), Figure(52, 1)) == pytest.approx(0.157299, abs=1e-6)
    assert unpaired_p(Figure(50, 1), Figure(50, 1)) == 1
    assert unpaired_p(Figure(50), Figure(52, 1)) is None and unpaired_p(Figure(50, 1), Figure(52)) is None
    assert unpaired_p(Figure(0, 0), Figure(1, 0)) is None


def test_best_must_beat_every_other_after_holm() -> None:
    """10, 20 and 30 of 40: 20 items gained has p = 2 / 2^20, 10 have 2 / 2^10 = 0.00195, twice; Holm: 0.0039."""
    row = [ours(10), ours(30), ours(20)]
    assert row_tests(row, level=0.05).best == 1
    assert row_tests(row, level=0.0040).best == 1 and row_tests(row, level=0.0039).best is None
    assert row_tests(row, level=0.05, better=-1).best == 0
    assert row_tests(row, level=0.05, better=0).best is None
    assert row_tests(row, level=0.05).num_tests == 3


def test_not_significant_and_equal_scores_are_not_bold() -> None:
    # 4 of 40 gained: p = 0.125; beside one that is far below, the best still beats only one of two.
    assert row_tests([ours(20), ours(24)], level=0.05).best is None
    assert row_tests([ours(1), ours(20), ours(24)], level=0.05).best is None
    assert row_tests([ours(20), ours(20)], level=0.05).best is None
    assert row_tests([ours(20)], level=0.05).best is None and row_tests([], level=0.05).best is None


def test_the_number_of_tests_counts() -> None:
    """6 gained of 40: p = 0.03125. Alone it is significant; beside a published figure it is one of three tests."""
    row, published = [ours(20), ours(26)], [Figure(0.5, 0.2)]
    assert row_tests(row, published, level=0.05).best == 1  # nothing of ours stands beside it
    tests = row_tests(row, published, level=0.05, stands_beside=[True, True])
    assert tests.best is None and tests.num_tests == 3


def test_what_cannot_be_compared_is_named_and_hides_nothing() -> None:
    base = Figure(0.9, 0.01)  # without items, and higher than all
    tests = row_tests([base, ours(10), ours(30)], level=0.05)
    assert tests.best is None  # 30 of 40 beats 10 of 40, but is not the best of the row
    assert tests.untested == {(0, 1): "no items were kept", (0, 2): "no items were kept"}
    tests = row_tests([Figure(0.1, 0.01), ours(10), ours(30)], level=0.05)
    assert tests.best == 2
    tests = row_tests([ours(10, group="float32"), ours(30, group="bfloat16")], level=0.05)
    assert tests.best is None and tests.untested == {(0, 1): "measured in another precision: float32 -> bfloat16"}
    assert row_tests([None, ours(10), None, ours(30)], level=0.05).best == 3


def test_above_and_below_published() -> None:
    measured = [Figure(50, 1), Figure(60, 1), None]
    published = [Figure(55, 1), Figure(55, None), None]
    tests = row_tests(measured, published, level=0.05, stands_beside=[True, True, True])
    assert tests.below == ((0,), (), ()) and tests.above == ((), (0,), ())
    tests = row_tests(measured, published, level=0.05, stands_beside=[True, False, False])
    assert tests.above == ((), (), ())


def test_direction() -> None:
    assert direction(score()) == 1 and direction(score(metric="bits_per_byte,none")) == -1
    assert direction(score(metric="mean_margin")) == 0
    assert direction(score(metric="distance,none", details={"higher_is_better": False})) == -1
    assert direction(score(metric="ter,none", details={"higher_is_better": True})) == 1


def test_false_claims_of_a_row() -> None:
    """Four equally good models on 200 items, and two published figures that are right: a claim in at most 5 %."""
    draw = random.Random(0)
    num_rows, claims = 150, 0
    for _ in range(num_rows):
        difficulty = [draw.random() for _ in range(200)]
        measured = []
        for _ in range(4):
            values = [float(draw.random() < share) for share in difficulty]
            mean = math.fsum(values) / 200
            made = right(0, 200)
            items = {
                name: type(item)(value, "p") for (name, item), value in zip(made.items.items(), values, strict=True)
            }
            made = type(made)(made.score.model_copy(update={"value": mean}), items)
            measured.append(Figure(mean, math.sqrt(mean * (1 - mean) / 199), made))
        published = [Figure(draw.gauss(0.5, 0.0354), 0.0354) for _ in range(2)]
        tests = row_tests(measured, published, level=0.05, stands_beside=[True] * 4)
        claims += tests.best is not None or any(tests.above) or any(tests.below)
    assert claims / num_rows <= 0.05
