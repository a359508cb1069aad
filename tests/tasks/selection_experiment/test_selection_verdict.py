"""Intervals over seeds and items, and the verdict on selectors: by hand, by planted effects, and on nothing at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.sweep import SelectionRoles, SweptTask
from smoltulu.tasks.selection_experiment.compare import Spread, compare, spread_of
from smoltulu.tasks.selection_experiment.page import draw_experiment, headline
from smoltulu.tasks.selection_experiment.verdict import (
    ArmScores,
    beside,
    groups_of_runs,
    judge,
    pairs_of_runs,
    table,
    units,
)
from smoltulu.tasks.selection_experiment.words import row_text, verdict_text

ROLES = SelectionRoles(selectors=("selected", "rds"), full="full")
FEWEST = {"selected": 3, "rds": 3, "random": 5, "longest": 3, "full": 3}


def task(name: str, task_class: str = "reasoning", metric: str = "acc,none") -> SweptTask:
    return SweptTask.model_validate({"task": name, "metric": metric, "task_class": task_class})


SUMS, SORTS, COPIES = task("sums"), task("sorts"), task("copies", "pattern")
CLASSES = {"reasoning": (SUMS, SORTS), "pattern": (COPIES,)}


def arm(
    draws: np.random.Generator, num_seeds: int, effect: dict[str, float] | None = None, num_items: int = 40
) -> ArmScores:
    """Items differ most, then seeds, then each answer alone; `effect` on a class."""
    made: dict[SweptTask, Any] = {}
    levels = np.random.default_rng(7).normal(0, 1, (3, num_items))  # of the items, the same in every arm
    for number, one in enumerate((SUMS, SORTS, COPIES)):
        seeds = draws.normal(0, 0.1, (num_seeds, 1))
        alone = draws.normal(0, 0.3, (num_seeds, num_items))
        made[one] = levels[number] + seeds + alone + (effect or {}).get(one.task_class, 0.0)
    return ArmScores(made)


# ---------------------------------------------------------------------------------------------------------- intervals


def test_an_arm_of_one_draw_by_hand() -> None:
    """Runs of random 1, 2, 3 have variance 1: of one more draw 1, of their mean 1/3. The arm's own runs are all 5."""
    found = compare([np.full((4, 1), 5.0)], [np.array([[1.0], [2.0], [3.0]])], is_one_draw=True)
    assert found.difference == 3.0 and found.stderr == pytest.approx(math.sqrt(4 / 3)) and found.num_df == 2
    wild = compare([np.array([[0.0], [10.0]])], [np.array([[1.0], [2.0], [3.0]])], is_one_draw=True)
    assert wild.stderr == pytest.approx(math.sqrt(50 / 2 + 1 / 3)), "an arm that spreads more has its own variance"


@pytest.mark.parametrize("draws_spread", [0.0, 0.5, 1.0, 4.0])
def test_a_selector_that_knows_nothing_is_one_draw_of_random(draws_spread: float) -> None:
    """Its rows are the same in every run; a rule that forgets it finds a difference in 15 % and more."""
    draws, num_found = np.random.default_rng(3), 0
    for _ in range(400):
        of_draw = draws.normal(0, draws_spread, (1, 1)), draws.normal(0, draws_spread, (5, 1))
        ours, theirs = (rows + draws.normal(0, 1, (len(rows) if len(rows) > 1 else 3, 1)) for rows in of_draw)
        num_found += compare([ours], [theirs], is_one_draw=True).p_value < 0.05
    assert num_found <= 400 * 0.05 + 2 * math.sqrt(400 * 0.05 * 0.95)


def test_an_interval_by_hand() -> None:
    """Runs 2, 3, 4 (means of their items) against 0, 0.5, 1: variances 1/3 and 0.25/3; items differ by 2 and 3."""
    ours = np.array([[2.0, 2.0], [2.5, 3.5], [3.5, 4.5]])
    theirs = np.array([[0.5, -0.5], [0.5, 0.5], [1.0, 1.0]])
    found = compare([ours], [theirs])
    assert found.difference == pytest.approx(3.0 - 0.5)
    paired = np.array([8 / 3 - 2 / 3, 10 / 3 - 1 / 3])  # 2 and 3: variance 0.5, of the mean of two 0.25
    assert paired == pytest.approx([2, 3])
    variance = 1 / 3 + 0.25 / 3 + 0.25
    assert found.stderr == pytest.approx(math.sqrt(variance))
    num_df = variance**2 / ((1 / 3) ** 2 / 2 + (0.25 / 3) ** 2 / 2 + 0.25**2 / 1)
    assert found.num_df == pytest.approx(num_df)
    from scipy.stats import t

    half = t.ppf(0.975, num_df) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert found.p_value == pytest.approx(2 * t.sf(2.5 / math.sqrt(variance), num_df))


def test_tasks_of_a_class_count_alike_however_many_items_they_have() -> None:
    few, many = np.array([[1.0], [1.0]]), np.zeros((2, 100))
    assert compare([few, many], [np.zeros((2, 1)), many]).difference == 0.5


def test_the_spread_of_runs_may_come_from_elsewhere() -> None:
    one = compare([np.array([[1.0, 1.0]])], [np.array([[0.0, 0.0]])], Spread(0.5, 20))
    assert one.stderr == pytest.approx(1.0) and one.num_df == pytest.approx(20) and not one.p_value < 0.05
    assert spread_of([np.array([[0.0], [2.0]]), np.array([[0.0], [2.0]])]) == Spread(2.0, 1)


@settings(max_examples=40)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 9), st.integers(0, 99), st.floats(-5, 5))
def test_properties_of_an_interval(ours: int, theirs: int, num_items: int, seed: int, shift: float) -> None:
    """Exchanged sides turn it around; a level of the items, or of both arms, changes nothing."""
    draws = np.random.default_rng(seed)
    one, other = draws.normal(size=(ours, num_items)), draws.normal(size=(theirs, num_items))
    found, turned = compare([one], [other]), compare([other], [one])
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert turned.p_value == pytest.approx(found.p_value)
    levels = draws.normal(size=num_items) + shift
    moved = compare([one + levels], [other + levels])
    assert (moved.difference, moved.stderr) == pytest.approx((found.difference, found.stderr), abs=1e-9)
    assert found.low < found.difference < found.high


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ([np.zeros((2, 3))], [np.zeros((2, 4))], "the same items"),
        ([], [], "the same items"),
        ([np.zeros((2, 0))], [np.zeros((2, 0))], "the same items"),
        ([np.full((2, 3), np.nan)], [np.zeros((2, 3))], "no number"),
        ([np.zeros((1, 3))], [np.zeros((2, 3))], "give at least two"),
    ],
)
def test_what_cannot_be_compared(ours: Any, theirs: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        compare(ours, theirs)


# ------------------------------------------------------------------------------------------------------------ verdict


def test_a_selector_has_a_word_for_each_class_and_must_beat_both_controls() -> None:
    draws = np.random.default_rng(1)
    arms = {
        "selected": arm(draws, 5, {"reasoning": 1.0, "pattern": 1.0}),
        "rds": arm(draws, 5),
        "random": arm(draws, 5),
        "longest": arm(draws, 3, {"pattern": 1.0}),  # longest rows are as good for patterns
    }
    judged = {(one.selector, one.task_class): one for one in judge({"": arms}, ROLES, CLASSES, FEWEST)}
    assert {at: one.word for at, one in judged.items()} == {
        ("selected", "reasoning"): "beats random and longest",
        ("selected", "pattern"): "does not",
        ("rds", "reasoning"): "does not",
        ("rds", "pattern"): "does not",
    }
    assert [one.is_better for one in judged["selected", "pattern"].against] == [True, False]
    assert [one.is_worse for one in judged["rds", "pattern"].against] == [False, True]
    text = verdict_text(judged["selected", "pattern"])
    assert (
        text.startswith("selected, pattern: does not (against random: better, by ") and "longest: no different" in text
    )
    told = headline(list(judged.values()))
    assert told == "reasoning: selected beats random and longest; pattern: no selector beats random and longest."


def test_all_tests_of_an_experiment_are_adjusted_together() -> None:
    """Eight at one setting: the smallest p-value counts eight times, and with a second setting sixteen times."""
    draws = np.random.default_rng(2)
    arms = {name: arm(draws, 5) for name in ("selected", "rds", "random", "longest")}
    for names, number in (([""], 8), (["one", "two"], 16)):
        judged = judge(dict.fromkeys(names, arms), ROLES, CLASSES, FEWEST)
        tests = [against for one in judged for against in one.against]
        assert len(tests) == number
        smallest = min(tests, key=lambda one: one.test.p_value)
        assert smallest.adjusted == pytest.approx(min(1.0, number * smallest.test.p_value))


def test_no_verdict_without_seeds_or_controls_or_at_unequal_tokens() -> None:
    draws = np.random.default_rng(3)
    whole = {
        name: arm(draws, 5, {"pattern": 9.0 * (name == "selected")})
        for name in ("selected", "rds", "random", "longest")
    }
    for name, seeds, told in (
        ("random", 4, "arm random has scores of 4 seeds, 5 are needed"),
        ("selected", 2, "arm selected has scores of 2 seeds, 3 are needed"),
        ("longest", 0, "arm longest has scores of 0 seeds, 3 are needed"),
    ):
        fewer = whole | {name: arm(draws, seeds)} if seeds else {one: whole[one] for one in whole if one != name}
        judged = judge({"": fewer}, ROLES, CLASSES, FEWEST)
        lacking = [one for one in judged if name != "selected" or one.selector == "selected"]
        assert {one.word for one in lacking} == {"no verdict"} and told in lacking[0].reason
    diverged = whole | {"random": ArmScores(whole["random"].tasks, 1)}
    assert "1 of the runs of arm random diverged" in judge({"": diverged}, ROLES, CLASSES, FEWEST)[0].reason
    judged = judge({"": whole}, ROLES, CLASSES, FEWEST, {"": "not at equal tokens: arm rds kept 3"})
    assert {one.word for one in judged} == {"no verdict"} and "not at equal tokens" in verdict_text(judged[0])
    assert headline(judged) == "reasoning: no verdict; pattern: no verdict."


def test_arms_stand_beside_random_on_every_class_and_every_task() -> None:
    draws = np.random.default_rng(4)
    arms = {"selected": arm(draws, 3, {"pattern": 0.5}), "random": arm(draws, 5), "longest": arm(draws, 1)}
    rows = table(arms, ROLES, CLASSES)
    assert [(row.task_class, row.task, row.arm) for row in rows[:3]] == [
        ("reasoning", None, "selected"),
        ("reasoning", None, "random"),
        ("reasoning", None, "longest"),
    ]
    assert len(rows) == 3 * (3 + 2) and [row.against is None for row in rows[:3]] == [False, True, True]
    assert rows[0].mean == pytest.approx(np.mean([arms["selected"].tasks[one].mean() for one in (SUMS, SORTS)]))
    copied = next(row for row in rows if row.arm == "selected" and row.task == COPIES)
    assert copied.against is not None and copied.against.low > 0
    assert row_text(copied, [COPIES]).startswith("selected, copies: acc ")
    lower = SweptTask(task="copies", metric="bits_per_byte,none", task_class="pattern", lower_is_better=True)
    assert f"{-copied.mean:.3f} ± " in row_text(copied, [lower])
    others = {"full": arms["random"], "full at 4.0 epochs": arms["random"], "selected": arms["selected"]}
    pairs = beside(arms, others, ROLES, CLASSES)
    assert [(one.selector, one.other) for one in pairs[:2]] == [
        ("selected", "full"),
        ("selected", "full at 4.0 epochs"),
    ]
    (figure,) = draw_experiment([("", rows)], ROLES, CLASSES)
    assert len(figure.panels) == 2 and 'id="runs-longest"' in figure.panels[0] and figure.pdf.startswith(b"%PDF")


def test_one_score_of_a_task_decides_and_it_is_the_first() -> None:
    second = task("sums", "reasoning", "exact_match,none")
    assert units([SUMS, second, COPIES, SORTS]) == {"reasoning": (SUMS, SORTS), "pattern": (COPIES,)}


# ---------------------------------------------------------------------------------------- the rule, where nothing is


def test_random_rows_do_not_beat_random_rows_in_more_than_a_twentieth_of_pairs() -> None:
    """In the mean over worlds: the seeds of one world make its pairs hang together."""
    shares = [pairs_of_runs(arm(np.random.default_rng(seed), 21), CLASSES) for seed in range(25)]
    assert {one.num_pairs for one in shares} == {21 * 20 / 2}
    assert np.mean([one.share for one in shares]) <= 0.05


@pytest.mark.parametrize("num_seeds", [(3, 5), (5, 5)])
def test_nor_do_groups_of_seeds_as_the_verdict_compares_them(num_seeds: tuple[int, int]) -> None:
    shares = [
        groups_of_runs(arm(np.random.default_rng(100 + seed), 21), CLASSES, num_seeds, 3, seed).share
        for seed in range(250)
    ]
    assert np.mean(shares) <= 0.05


@pytest.mark.parametrize("wilder", [1.0, 3.0])
def test_the_rule_holds_where_the_control_is_drawn_anew_and_so_spreads_more(wilder: float) -> None:
    draws = np.random.default_rng(5)
    found = 0
    for _ in range(300):
        ours, theirs = draws.normal(0, 1, (3, 1)), draws.normal(0, wilder, (5, 1))
        alone = draws.normal(0, 0.5, (8, 20))
        found += compare([ours + alone[:3]], [theirs + alone[3:]]).p_value < 0.05
    assert found / 300 <= 0.07  # 0.05 and two standard errors


def test_a_real_difference_is_seen() -> None:
    draws = np.random.default_rng(6)
    found = sum(
        compare([arm(draws, 5, {"pattern": 0.4}).tasks[COPIES]], [arm(draws, 5).tasks[COPIES]]).p_value < 0.05
        for _ in range(100)
    )
    assert found >= 90
