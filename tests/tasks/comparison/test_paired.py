"""Paired tests: by hand, against scipy, and their size by simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.comparison.paired import (
    clustered_test,
    exact_mcnemar,
    holm,
    paired_test,
    sign_flips,
    smallest_visible,
)


@pytest.mark.parametrize(("num_lost", "num_gained", "p_value"), [
    # Two of two lost are no certain drop: heads twice.
    (2, 0, 0.5), (4, 0, 0.125), (7, 0, 2 / 128), (0, 7, 2 / 128), (0, 0, 1.0), (3, 3, 1.0),
    # 2 (C(10,0) + C(10,1)) / 1024
    (9, 1, 22 / 1024),
])  # fmt: skip
def test_mcnemar_by_hand(num_lost: int, num_gained: int, p_value: float) -> None:
    assert exact_mcnemar(num_lost, num_gained) == pytest.approx(p_value, rel=1e-12)


def test_four_of_forty_lost_are_no_drop() -> None:
    before = {str(i): 1.0 for i in range(40)}
    made = paired_test(before, before | {str(i): 0.0 for i in range(4)})
    assert (made.num_lost, made.num_gained, made.num_items, made.num_clusters) == (4, 0, 40, 40)
    assert made.difference == pytest.approx(-0.1) and made.p_value == pytest.approx(0.125)
    # Four ones among forty: variance 40/39 * 0.1 * 0.9.
    assert made.stderr == pytest.approx((0.09 / 39) ** 0.5)
    assert paired_test(before, before).p_value == 1.0
    # Seven over seven tasks: 0.016 is none at 0.05 / 7, where the normal approximation says 0.004.
    seven = paired_test(before, before | {str(i): 0.0 for i in range(7)})
    assert seven.p_value == pytest.approx(0.015625) and seven.p_value > 0.05 / 7


def test_shares_are_tested_by_all_signs() -> None:
    """Differences 0.5, 0.25, -0.25: of the eight sums, +-1, +-0.5, +-0.5, 0, 0, six are as far from 0 as 0.5."""
    before = {"a": 0.0, "b": 0.25, "c": 0.5, "d": 0.75}
    made = paired_test(before, {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.75})
    assert made.p_value == 6 / 8 and made.difference == pytest.approx(0.125)
    assert (made.num_lost, made.num_gained) == (1, 2)


def test_items_of_one_prompt_count_once() -> None:
    """Eight instructions of two prompts lost are two heads, not eight."""
    before = {f"{prompt}/{i}": 1.0 for prompt in "abcdefgh" for i in range(4)}
    lost = before | {f"{prompt}/{i}": 0.0 for prompt in "ab" for i in range(4)}
    clusters = {item: item[0] for item in before}
    together, apart = paired_test(before, lost, clusters), paired_test(before, lost)
    assert together.p_value == 0.5 and apart.p_value == 2 / 256
    assert together.num_clusters == 8 and together.difference == apart.difference == -0.25
    assert together.stderr > apart.stderr


@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=12))
def test_all_signs_of_ones_are_mcnemar(differences: list[float]) -> None:
    lost = differences.count(-1.0)
    assert sign_flips(differences) == pytest.approx(exact_mcnemar(lost, len(differences) - lost))


def test_many_clusters_are_tested_as_scipy_does() -> None:
    from scipy.stats import ttest_rel

    draw = random.Random(0)
    before = {str(i): draw.random() for i in range(50)}
    after = {item: value + draw.gauss(0.05, 0.2) for item, value in before.items()}
    expected = ttest_rel(list(after.values()), list(before.values()))
    made = paired_test(before, after)
    assert made.p_value == pytest.approx(expected.pvalue)
    assert made.difference / made.stderr == pytest.approx(expected.statistic)


@pytest.mark.parametrize(("num_items", "is_clustered"), [(40, False), (541, False), (120, True)])
def test_equally_good_models_rarely_differ(num_items: int, is_clustered: bool) -> None:
    """Of 400 pairs of equally good models about 5 % lie under 0.05, never more than chance allows (20 + 3 x 4.4)."""
    draw = random.Random(num_items)
    hits = 0
    for _ in range(400):
        before, after, clusters = {}, {}, {}
        for item in range(num_items):
            name, cluster = str(item), str(item // 4) if is_clustered else str(item)
            clusters[name] = cluster
            if not is_clustered or item % 4 == 0:
                flips = draw.random() < 0.3
                value = float(draw.random() < 0.5)
            before[name], after[name] = value, 1 - value if flips else value
        hits += paired_test(before, after, clusters if is_clustered else None).p_value < 0.05
    assert hits <= 33


@pytest.mark.parametrize(("before", "after", "message"), [
    ({"a": 1.0}, {"b": 1.0}, r"1 and 1 were given, 2 on one side only, e.g. \['a', 'b'\]"),
    ({}, {}, "at least one; 0 and 0 were given"),
])  # fmt: skip
def test_other_items_are_refused(before: dict[str, float], after: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_test(before, after)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_smallest_visible_loss() -> None:
    """(1.960 + 0.842) sqrt(0.12 / 1319)"""
    assert smallest_visible(1319, 0.12, 0.05) == pytest.approx(0.02672, abs=1e-5)
    # In its own unit: nats of 1,000 items that change by 0.001 each.
    assert smallest_visible(1000, 1e-6, 0.05) == pytest.approx(8.859e-5, abs=1e-8)


@pytest.mark.parametrize("change", [0.5, 1 / 3])
def test_where_all_change_alike_it_is_not_certain(change: float) -> None:
    """Twenty that all fell by the same: of 2^20 assignments of signs two are as extreme; the t-test would say 0."""
    made = paired_test({str(i): 1.0 for i in range(20)}, {str(i): 1 - change for i in range(20)})
    assert made.p_value == 2 / 2**20 and made.num_lost == 20


def test_what_is_no_number_is_refused() -> None:
    """As NaN - 1 is no difference, all assignments of signs would be less extreme: p = 0."""
    before = {str(i): 1.0 for i in range(4)}
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"needs numbers; 1 of 4 items have none, e\.g\. \['2'\]"):
            paired_test(before, before | {"2": odd})


# --- Clusters, strata, intervals ------------------------------------------------------------------------------------


def test_mcnemar_as_scipy_does() -> None:
    from scipy.stats import binomtest

    draw = random.Random(0)
    for _ in range(200):
        num_lost, num_gained = draw.randrange(60), draw.randrange(1, 60)
        expected = binomtest(num_lost, num_lost + num_gained, 0.5).pvalue
        assert exact_mcnemar(num_lost, num_gained) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_bonett_and_prices() -> None:
    """Of 40 items 4 lost and 1 gained: (2 - 5) / 42 and the root of (7 / 42 - (3 / 42)^2) / 42, times t(39) = 2.0227.

    Theirs divides the squares by n, ours by n - 1 as the standard error does: 1 / 39 of the spread more.
    """
    before = {str(i): float(i < 20) for i in range(40)}
    changed = {"0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0, "30": 1.0}
    made = paired_test(before, before | changed)
    half = 2.0227 * math.sqrt((7 / 42 - (3 / 42) ** 2) / 42)
    assert made.low == pytest.approx(-3 / 42 - half, abs=2e-3) and made.high == pytest.approx(-3 / 42 + half, abs=2e-3)
    assert made.low < made.difference < made.high


@pytest.mark.parametrize("change", [-0.5, 0.0, -1.0])
def test_an_interval_is_never_without_width(change: float) -> None:
    """A hundred items that all changed alike once had +- 0.0000; a hundred and first need not change so."""
    before = {str(i): 1.0 for i in range(100)}
    made = paired_test(before, {item: value + change for item, value in before.items()})
    assert made.stderr == 0 and made.difference == change
    assert made.low < change < made.high or made.low == pytest.approx(change, abs=0.02)
    assert 0.01 < made.high - made.low < 0.08
    # Where none changed it is as of one lost and one gained of 102.
    if not change:
        assert made.high == -made.low == pytest.approx(1.9842 * math.sqrt(2) / 102, abs=1e-4)


def test_strata_are_in_every_sample() -> None:
    """Differences 1, 1, 0, 0 and -1, -1, 0, 0: within the strata variance is 1/3 each, about the common mean 4/7."""
    before = {f"{stratum}{i}": 0.5 for stratum in "ab" for i in range(4)}
    after = before | {"a0": 1.5, "a1": 1.5, "b0": -0.5, "b1": -0.5}
    together, within = paired_test(before, after), paired_test(before, after, stratum_of={k: k[0] for k in before})
    assert together.stderr == pytest.approx(math.sqrt(4 / 7 / 8))
    assert within.stderr == pytest.approx(math.sqrt(1 / 3 / 8)) and within.p_value == together.p_value == 1.0
    with pytest.raises(ValueError, match="cluster 'x' is in two strata, 'a' and 'b'; give it one"):
        paired_test(before, after, dict.fromkeys(before, "x"), {item: item[0] for item in before})
    # Strata of one item have no spread of their own, and are taken as one.
    alone = paired_test(before, after, stratum_of={item: item for item in before})
    assert alone.stderr == together.stderr


def _right_and_wrong(draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray, float]:
    """12 % of the items change, by 0.02 more gained than lost."""
    return draw.choice([-1.0, 0.0, 1.0], num, p=[0.05, 0.88, 0.07]), np.zeros(num, int), 0.02


def _instructions(draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Prompts of one to three instructions, of which those of a prompt fall or rise together in half of the cases."""
    sizes, together = 1 + np.arange(num) % 3, draw.random(num) < 0.5
    steps = draw.choice([-1.0, 0.0, 1.0], (num, 3), p=[0.10, 0.82, 0.08])
    steps[together] = steps[together, :1]
    sums = (steps * (np.arange(3) < sizes[:, None])).sum(1)
    return sums / sizes.mean(), np.zeros(num, int), -0.02


def _subsets(draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ten subsets that count alike, some large and some small, each with a change of its own."""
    strata = np.minimum(np.arange(num) * 20 // num, 9)
    sizes, changes = np.bincount(strata), np.linspace(-0.08, 0.08, 10)
    values = draw.random(num)
    steps = (values < (0.2 + changes[strata]) / 2).astype(float) - (values > 1 - (0.2 - changes[strata]) / 2)
    return steps * num / 10 / sizes[strata], strata, 0.0


def _shares(draw: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Shares of four samples, before and after; most prompts are always right or never."""
    rates = draw.beta(0.5, 0.5, num)
    after, before = draw.binomial(4, rates), draw.binomial(4, rates)
    return (after - before) / 4, np.zeros(num, int), 0.0


KINDS = (_right_and_wrong, _instructions, _subsets, _shares)


@pytest.mark.parametrize("num_items", [40, 541, 10042])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover(kind: Callable[..., Any], num_items: int) -> None:
    """95 % of them hold the true change: of 1,000 all but 50, and no more than chance allows (4 x 6.9)."""
    draw = np.random.default_rng(num_items)
    missed = 0
    for _ in range(1000):
        differences, strata, truth = kind(draw, num_items)
        is_counted = kind is _right_and_wrong
        _, low, high, _ = clustered_test(differences, strata, is_counted=is_counted, reach=1.0)
        missed += not low <= truth <= high
    assert missed <= 77
    assert missed >= 22 or num_items == 40  # nor are they too wide


@pytest.mark.parametrize("num_items", [40, 541, 10042])
@pytest.mark.parametrize("kind", KINDS)
def test_equally_good_models_differ_in_5_percent(kind: Callable[..., Any], num_items: int) -> None:
    """Under no change (each difference with a random sign) 50 of 1,000 lie under 0.05; under 0.001 it is one."""
    draw = np.random.default_rng(num_items + 1)
    p_values = []
    for _ in range(1000):
        differences, strata, _ = kind(draw, num_items)
        signs = draw.choice([-1.0, 1.0], num_items)
        is_counted = kind is _right_and_wrong
        p_values.append(clustered_test(differences * signs, strata, is_counted=is_counted, reach=1.0)[3])
    assert sum(p < 0.05 for p in p_values) <= 77 and sum(p < 0.001 for p in p_values) <= 5
    # Exact tests of few changes say less; of many they spend what they may.
    assert sum(p < 0.05 for p in p_values) >= 22 or num_items == 40
