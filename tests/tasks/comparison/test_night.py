"""What a night's comparisons mean, and what it says: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.schemas.evaluation import Score
from smoltulu.tasks.comparison.evaluations import Comparison, Item, Measured
from smoltulu.tasks.comparison.night import (
    LOSS_LEVEL,
    MIN_EFFECT,
    Judged,
    Night,
    Repeated,
    judge,
    repeated,
    table,
    verdict_of,
)
from smoltulu.tasks.comparison.paired import PairedTest, paired_test


def comparison(task: str, num_lost: int = 0, num_gained: int = 0, num_items: int = 40, reason: str = "") -> Comparison:
    """Of items that are all right before but those that are gained."""
    before = {str(i): float(i >= num_gained) for i in range(num_items)}
    after = {str(i): float(i < num_items - num_lost) for i in range(num_items)}
    test = None if reason else paired_test(before, after)
    return Comparison("sft", task, "acc,none", 1.0, 1 - num_lost / num_items, test, reason)


def night(*comparisons: Comparison, **fields: Any) -> Night:
    judged = judge([("baseline", one) for one in comparisons])
    return Night(**{"num_evaluations": 2, "new": ("sft",), "judged": judged, **fields})


def test_the_level_of_a_loss_is_the_quarters_share_of_a_night() -> None:
    assert pytest.approx(0.000569767, rel=1e-5) == LOSS_LEVEL
    assert pytest.approx(0.05) == 1 - (1 - LOSS_LEVEL) ** 90


@pytest.mark.parametrize(("num_lost", "num_gained", "verdict"), [
    (0, 0, "same"),
    (2, 0, "within noise"),  # p .5, which a normal approximation calls certain
    (4, 0, "within noise"),  # p .125
    (6, 0, "watch"),  # p .03125
    (11, 0, "watch"),  # p 2 / 2^11 = .00098
    (12, 0, "loss"),  # p 2 / 2^12 = .00049
    (0, 6, "gain"),
])  # fmt: skip
def test_the_levels(num_lost: int, num_gained: int, verdict: str) -> None:
    [one] = judge([("last", comparison("a", num_lost, num_gained))])
    assert one.verdict == verdict


def test_seven_of_forty_over_seven_tasks_is_nothing() -> None:
    """p .0156, and Holm's level is .05 / 7: the normal approximation's .004 would have been under it."""
    told = judge([("baseline", comparison("a", 7)), *(("baseline", comparison(str(i))) for i in range(6))])
    assert told[0].adjusted == pytest.approx(7 * 2 / 2**7) and told[0].verdict == "within noise"


def test_all_tests_of_a_night_are_one_family_whatever_they_are_against() -> None:
    """12 of 40 alone are a loss (p .00049); beside a second reference it needs half of that."""
    alone, twice = comparison("a", 12), comparison("a", 1)
    told = judge([("baseline", alone), ("last", twice)])
    assert told[0].adjusted == pytest.approx(2 * 2 / 2**12) and told[0].verdict == "watch"


def test_a_change_below_the_minimum_effect_is_no_loss_however_sure() -> None:
    def sure(difference: float) -> str:
        ends = {"low": difference - 2e-4, "high": difference + 2e-4}
        test = PairedTest(100_000, 100_000, difference, 1e-4, p_value=1e-12, num_lost=900, num_gained=0, **ends)
        return verdict_of(Comparison("sft", "a", "acc", 0.5, 0.5 + difference, test), 1e-12)

    assert (sure(-MIN_EFFECT), sure(-MIN_EFFECT * 0.99), sure(0.5)) == ("loss", "watch", "gain")


@pytest.mark.parametrize(("made", "went_well", "said"), [
    (night(comparison("a"), comparison("b", 4)), True, "2 evaluations, new: sft; no real drop in 2 scores"),
    (night(comparison("a"), comparison("b", 20)), False,
     "LOSS: sft b 1.0000 -> 0.5000 against the baseline (20 lost, 0 gained of 40; p 3.8e-06)"),
    (night(comparison("a"), comparison("b", 8)), True, "watch: sft b 1.0000 -> 0.8000 against the baseline"),
    # Where nothing was compared it never says that nothing dropped.
    (night(comparison("bbh", reason="other documents: 1 of 4 are gone, 0 are new")), True,
     "nothing was compared; 1 not comparable: sft bbh against the baseline (other documents: 1 of 4 are gone, 0 are "
     "new)"),
    (night(), True, "2 evaluations, new: sft; nothing to compare with yet"),
    (night(comparison("a"), failed={"dpo": "no room"}), False, "1 FAILED: dpo: no room; no real drop in 1 scores"),
    (night(*(comparison(str(i), reason="gone") for i in range(5))), True, "the baseline (gone) and 2 more"),
    (night(new=()), True, "nothing new: 2 evaluations, all told before"),
    (night(new=(), num_missed=1), True, "the night before this one did not run; nothing new"),
    (night(new=(), num_missed=3), True, "3 nights before this one did not run; nothing new"),
    (night(new=(), standing=["loss of sft b, told on 2026-11-20"]), True, "still standing: loss of sft b, told on"),
    # A harness that changed is no regression.
    (night(new=(), repeated=[Repeated("sft", "a", 40, 3, changes=("torch 2.12 -> 2.13",))]), True,
     "HARNESS CHANGED: sft a: the same weights gave other samples for 3 of 40 items (torch 2.12 -> 2.13); that is no "
     "regression"),
    (night(new=(), repeated=[Repeated("sft", "a", 40)]), True, "sft a measured again: 40 identical samples"),
    (night(new=(), repeated=[Repeated("sft", "a", reason="no items were kept")]), True, "compared: no items"),
])  # fmt: skip
def test_what_a_night_says(made: Night, went_well: bool, said: str) -> None:
    assert made.went_well == went_well and said in made.message()
    if not any(one.comparison.test for one in made.judged):
        assert "no real drop" not in made.message()


def test_the_table_of_a_night() -> None:
    told = judge([
        ("baseline", comparison("a")), ("last", comparison("b", 20)), ("last", comparison("c", reason="other prompts")),
    ])  # fmt: skip
    same, loss, lost = table(told)
    assert same["verdict"] == "same" and (same["lost, gained"], same["items"]) == ("0, 0", "40")
    assert loss["verdict"] == "loss" and loss["p (Holm)"] == f"{2 * 2 / 2**20:.3g}" and loss["against"] == "last"
    assert lost["verdict"] == "not comparable: other prompts" and lost["p (paired)"] == "-"
    assert isinstance(told[0], Judged)


def measured(**items: dict[str, Any]) -> Measured:
    score = Score(task="a", metric="acc", value=1.0, num_samples=2, harness="h", task_version="1", template_digest="t")
    return Measured(score, {name: Item(1.0, "p", row=row) for name, row in items.items()})


def test_the_same_weights_give_the_same_samples_or_the_harness_changed() -> None:
    row = {"task": "a", "entry": 3, "completion": "4", "logliks": [-1.5, -2.0]}
    before = measured(x=row, y=row)
    assert repeated("sft", "a", before, measured(x=row | {"entry": 0}, y=row), ["torch"]) == Repeated("sft", "a", 2)
    # Still right, but not what was written: another answer, another log-likelihood, an item that is gone.
    for changed in (row | {"completion": "4 "}, row | {"logliks": [-1.5, -2.000001]}):
        made = repeated("sft", "a", before, measured(x=changed, y=row), ["torch 2.12 -> 2.13"])
        assert made.is_identical is False and (made.num_items, made.num_different) == (2, 1)
        assert made.changes == ("torch 2.12 -> 2.13",)
    assert repeated("sft", "a", before, measured(x=row)).num_different == 1
    assert repeated("sft", "a", before, None).is_identical is None
    other = Measured(before.score.model_copy(update={"task_version": "2"}), before.items)
    assert repeated("sft", "a", before, other).changes == ("task_version 1 -> 2",)
