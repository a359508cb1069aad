"""Paired tests: by hand, against scipy, and their size by simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.comparison.paired import exact_mcnemar, holm, paired_test, sign_flips, smallest_visible


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
