"""How often a nightly verdict is wrong, and what it sees: quarters of nights with models that are all equally good.

    python benchmarks/nightly_simulation.py                       # 10,000 quarters of 90 nights and 7 tasks
    python benchmarks/nightly_simulation.py --quarters 1000

A model here answers an item that is settled as every other does, and an unsettled one by a coin. Two models then
differ in half of the unsettled items: with 24 % of them, in 12 % of all. Every night has another model, drawn anew. The
baseline is one such model, or of five the one with the best average. (Printed too: for each task the best of five,
which is no model that anyone could pin, and for which no level is promised.)

The verdicts are those of `tasks/comparison/night.py`: `verdicts` below does for arrays of counts what it does for one
night, and tests/benchmarks/test_nightly_simulation.py holds the two equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import bdtr

from smoltulu.tasks.comparison.night import LOSS_LEVEL, MIN_EFFECT, NIGHTS_PER_QUARTER, WATCH_LEVEL

#: Items of the suite's tasks (ARC: easy and challenge; IFEval: prompts).
TASKS = {
    "HellaSwag": 10_042, "ARC": 3_548, "PIQA": 1_838, "MMLU-Pro": 12_032, "BBH": 6_511, "GSM8K": 1_319, "IFEval": 541,
}  # fmt: skip
#: Share of items that two equally good models answer differently.
DISCORDANT = 0.12
#: Losses whose power is printed: task, loss in points.
LOSSES = (
    ("HellaSwag", 2), ("ARC", 3), ("BBH", 2), ("GSM8K", 5), ("GSM8K", 3), ("PIQA", 3), ("IFEval", 8), ("IFEval", 5),
)  # fmt: skip
NUM_CANDIDATES = 5  # of which the best becomes the baseline

Array = np.ndarray[Any, Any]


def mcnemar(lost: Array, gained: Array) -> Array:
    """Two-sided exact p-values (McNemar) of counts."""
    changed = lost + gained
    return np.where(changed > 0, np.minimum(1.0, 2 * bdtr(np.minimum(lost, gained), np.maximum(changed, 1), 0.5)), 1.0)


def holm(p_values: Array) -> Array:
    """Adjusted over the last axis."""
    num = p_values.shape[-1]
    order = np.argsort(p_values, axis=-1, kind="stable")
    ordered = np.take_along_axis(p_values, order, -1) * np.arange(num, 0, -1)
    ordered = np.maximum.accumulate(np.minimum(ordered, 1.0), axis=-1)
    adjusted = np.empty_like(ordered)
    np.put_along_axis(adjusted, order, ordered, -1)
    return adjusted


def verdicts(lost: Array, gained: Array, num_items: Array) -> tuple[Array, Array]:
    """Whether each test is a `loss`, and whether it is a drop at the watch level. Tests of a night: the last axis."""
    adjusted = holm(mcnemar(lost, gained))
    difference = (gained - lost) / num_items
    is_drop = (adjusted < WATCH_LEVEL) & (difference < 0)
    return is_drop & (adjusted < LOSS_LEVEL) & (-difference >= MIN_EFFECT), is_drop


class Quarters:
    """Many quarters at once: what each night's model lost and gained, against a baseline and against the night before.

    Counted by class of unsettled items: right or wrong in the baseline, right or wrong last night. Shapes
    [quarters, tasks].
    """

    def __init__(
        self, rng: np.random.Generator, num_quarters: int, best_of: int = 1, of_each_task: bool = False
    ) -> None:
        """`of_each_task`: the best of each task becomes its baseline, which no one model is."""
        self.rng = rng
        self.num_items = np.array(list(TASKS.values()))
        unsettled = np.round(self.num_items * 2 * DISCORDANT).astype(int)
        drawn = rng.binomial(unsettled, 0.5, (num_quarters, best_of, len(TASKS)))
        best = (drawn / self.num_items).mean(-1).argmax(-1)
        right = drawn.max(1) if of_each_task else drawn[np.arange(num_quarters), best]  # by the baseline
        self.of_baseline = {True: right, False: unsettled - right}
        # The night before the first has a model of its own.
        self.last = {(b, True): rng.binomial(count, 0.5) for b, count in self.of_baseline.items()}
        self.last |= {(b, False): self.of_baseline[b] - self.last[b, True] for b in (True, False)}

    def night(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """(lost, gained) against the baseline, and against the night before."""
        now = {of: self.rng.binomial(count, 0.5) for of, count in self.last.items()}
        right = {b: now[b, True] + now[b, False] for b in (True, False)}
        baseline = (self.of_baseline[True] - right[True], right[False])
        lost = sum(self.last[b, True] - now[b, True] for b in (True, False))
        gained = sum(now[b, False] for b in (True, False))
        self.last = {
            (b, is_right): right[b] if is_right else self.of_baseline[b] - right[b] for b, is_right in self.last
        }
        return baseline, (np.asarray(lost), np.asarray(gained))


def false_alarms(
    num_quarters: int,
    best_of: int = 1,
    *,
    of_each_task: bool = False,
    both: bool = False,
    num_nights: int = NIGHTS_PER_QUARTER,
    seed: int = 0,
) -> dict[str, float]:
    """Share of quarters with at least one false alarm, by rule. `both`: the night before is a reference too."""
    quarters = Quarters(np.random.default_rng(seed), num_quarters, best_of, of_each_task)
    num_items = np.tile(quarters.num_items, 2 if both else 1)
    raised = {rule: np.zeros(num_quarters, bool) for rule in ("loss", "watch", "watch, two nights in a row")}
    before = np.zeros((num_quarters, len(num_items)), bool)
    for _ in range(num_nights):
        pairs = quarters.night()[: 2 if both else 1]
        lost, gained = (np.concatenate(side, axis=-1) for side in zip(*pairs, strict=True))
        is_loss, is_drop = verdicts(lost, gained, num_items)
        raised["loss"] |= is_loss.any(-1)
        raised["watch"] |= is_drop.any(-1)
        raised["watch, two nights in a row"] |= (is_drop & before).any(-1)
        before = is_drop
    return {rule: float(happened.mean()) for rule, happened in raised.items()}


def power(task: str, loss: float, num_nights: int, both: bool = False, seed: int = 0) -> float:
    """Share of single nights in which a loss (share of 1) of one task is told as `loss`, the other tasks unchanged.

    12 % of the items differ, of which so many more are lost than gained as make up the loss. `both`: the last model
    was as good as the baseline, and is a reference too.
    """
    rng = np.random.default_rng(seed)
    num_items = np.array(list(TASKS.values()))
    place = list(TASKS).index(task)
    shares = np.where(np.arange(len(TASKS)) == place, 0.5 + loss / (2 * DISCORDANT), 0.5)
    sides = []
    for _ in range(2 if both else 1):
        changed = rng.binomial(num_items, DISCORDANT, (num_nights, len(TASKS)))
        lost = rng.binomial(changed, shares)
        sides.append((lost, changed - lost))
    lost, gained = (np.concatenate(side, axis=-1) for side in zip(*sides, strict=True))
    is_loss, _ = verdicts(lost, gained, np.tile(num_items, len(sides)))
    places = [place + number * len(TASKS) for number in range(len(sides))]
    return float(is_loss[:, places].any(-1).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; status 1 where `loss` is raised falsely in more than 5 % of quarters."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quarters", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    print(f"{given.quarters:,} quarters of {NIGHTS_PER_QUARTER} nights, {len(TASKS)} tasks, no model better or worse")
    print("| baseline | references | false loss | false watch | watch two nights in a row |\n|---|---|---:|---:|---:|")
    worst, best = 0.0, f"best of {NUM_CANDIDATES}"
    for name, best_of, of_each_task in (
        ("random", 1, False), (best, NUM_CANDIDATES, False), (f"{best}, each task", NUM_CANDIDATES, True),
    ):  # fmt: skip
        for both, references in ((False, "baseline"), (True, "baseline and last model")):
            shares = false_alarms(given.quarters, best_of, of_each_task=of_each_task, both=both, seed=given.seed)
            worst = worst if of_each_task else max(worst, shares["loss"])
            print(f"| {name} | {references} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    print(f"\npower in one night, {DISCORDANT:.0%} of the items differ, level {LOSS_LEVEL:.6f}, Holm over the night")
    print("| task | items | points lost | against the baseline | against it and the last model |")
    print("|---|---:|---:|---:|---:|")
    for task, points in LOSSES:
        seen = [power(task, points / 100, 2 * given.quarters, both, given.seed) for both in (False, True)]
        print(f"| {task} | {TASKS[task]:,} | {points} | {seen[0]:.2f} | {seen[1]:.2f} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    return int(worst > 0.05)


if __name__ == "__main__":
    raise SystemExit(main())
