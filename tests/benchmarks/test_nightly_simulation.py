"""The proof that a nightly `loss` is rarely false, small; the whole one is benchmarks/nightly_simulation.py."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import nightly_simulation as simulation
from smoltulu.tasks.comparison.evaluations import Comparison
from smoltulu.tasks.comparison.night import judge
from smoltulu.tasks.comparison.paired import exact_mcnemar, holm, paired_test

_QUARTERS = 1000


def test_verdicts_of_arrays_are_those_of_a_night_item_by_item() -> None:
    rng = np.random.default_rng(0)
    num_items = np.array([200, 400, 60])
    lost = rng.binomial(num_items // 5, 0.7, (40, 3))
    gained = rng.binomial(num_items // 5, 0.25, (40, 3))
    lost[0], gained[0] = 0, 0  # nothing changed
    is_loss, is_drop = simulation.verdicts(lost, gained, num_items)
    words = set()
    for night in range(40):
        comparisons = []
        for task in range(3):
            before = {str(item): float(item < lost[night, task]) for item in range(num_items[task])}
            after = {
                str(item): float(lost[night, task] <= item < lost[night, task] + gained[night, task])
                for item in range(num_items[task])
            }
            comparisons.append(("baseline", Comparison("sft", str(task), "acc", 0, 0, paired_test(before, after))))
        told = judge(comparisons)
        assert [one.verdict == "loss" for one in told] == is_loss[night].tolist()
        assert [one.verdict in ("loss", "watch") for one in told] == is_drop[night].tolist()
        words |= {one.verdict for one in told}
    assert words >= {"loss", "watch", "within noise", "same"}


def test_p_values_of_arrays_are_exact() -> None:
    counts = [(0, 0), (2, 0), (4, 0), (7, 0), (0, 7), (20, 20), (31, 12)]
    lost, gained = np.array(counts).T
    made = simulation.mcnemar(lost, gained)
    assert made == pytest.approx([exact_mcnemar(*pair) for pair in counts], rel=1e-12)
    assert made[1:4] == pytest.approx([0.5, 0.125, 0.015625])
    assert simulation.holm(made[None])[0] == pytest.approx(holm(made.tolist()), rel=1e-12)


@pytest.mark.parametrize("best_of", [1, 5])
@pytest.mark.parametrize("both", [False, True])
def test_equally_good_models_raise_a_loss_in_at_most_five_percent_of_quarters(best_of: int, both: bool) -> None:
    shares = simulation.false_alarms(_QUARTERS, best_of, both=both)
    assert shares["loss"] <= 0.05
    assert shares["watch"] > 0.4  # what Holm at 5 % every night would have raised


@pytest.mark.parametrize(
    ("task", "points", "least", "most"),
    [("HellaSwag", 2, 0.95, 0.99), ("ARC", 3, 0.86, 0.93), ("GSM8K", 5, 0.87, 0.94), ("IFEval", 8, 0.92, 0.98),
     ("GSM8K", 3, 0.14, 0.24)],
)  # fmt: skip
def test_what_one_night_sees(task: str, points: int, least: float, most: float) -> None:
    seen = simulation.power(task, points / 100, 4000)
    assert least <= seen <= most
    assert simulation.power(task, points / 100, 4000, both=True) >= seen


def test_models_of_the_simulation_differ_in_the_share_of_items_that_it_says() -> None:
    quarters = simulation.Quarters(np.random.default_rng(1), 200)
    for _ in range(3):
        for lost, gained in quarters.night():
            shares = ((lost + gained) / quarters.num_items).mean(0)
            assert shares == pytest.approx([simulation.DISCORDANT] * len(simulation.TASKS), abs=0.006)
            assert ((gained - lost) / quarters.num_items).mean(0) == pytest.approx([0] * 7, abs=0.004)
