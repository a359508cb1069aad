"""Tests of paired scores: the same items measured twice. Pure.

Miller, "Adding error bars to evals" (arXiv 2411.00640): pair by item, count items that hang together as one cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

#: Clusters with a difference up to which every assignment of signs is counted: 2^16 sums.
_MAX_ENUMERATED = 16


@dataclass(frozen=True)
class PairedTest:
    """What two measurements of the same items differ by.

    difference   mean of after - before, over items
    stderr       of it, over clusters; 0 where none differs
    p_value      two-sided, that both are equally good
    num_lost     items whose score fell; num_gained: rose
    """

    num_items: int
    num_clusters: int
    difference: float
    stderr: float
    p_value: float
    num_lost: int
    num_gained: int


def exact_mcnemar(num_lost: int, num_gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the items that changed, as many are lost as gained by chance."""
    from scipy.stats import binomtest

    num_changed = num_lost + num_gained
    return float(binomtest(num_lost, num_changed, 0.5).pvalue) if num_changed else 1.0


def sign_flips(sums: Sequence[float]) -> float:
    """Two-sided p-value of the exact permutation test: each difference could as well have had the other sign.

    Counts 2^len(sums) assignments.
    """
    assert len(sums) <= _MAX_ENUMERATED
    nonzero = [value for value in sums if value]
    observed = abs(math.fsum(nonzero))
    hits = sum(
        abs(math.fsum(sign * value for sign, value in zip(signs, nonzero, strict=True))) >= observed * (1 - 1e-12)
        for signs in product((1, -1), repeat=len(nonzero))
    )
    return float(hits / 2 ** len(nonzero))


def paired_test(
    before: Mapping[str, float], after: Mapping[str, float], cluster_of: Mapping[str, str] | None = None
) -> PairedTest:
    """Test whether scores of the same items changed.

    Exact where every item is right or wrong and none hang together (McNemar), or where few clusters changed (all
    signs); else the t-test over clusters, whose sums are then many.

    Args:
        before, after: item -> score.
        cluster_of: item -> what it shares its luck with, e.g. the prompt of several instructions; none: each is alone.

    Raises:
        ValueError: other items on one side, none, or a score that is no number.
    """
    if before.keys() != after.keys() or not before:
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(
            f"a paired test needs the same items on both sides, at least one; {len(before):,} and {len(after):,} were "
            f"given, {len(odd):,} on one side only" + (f", e.g. {odd[:3]}" if odd else "")
        )
    odd = [item for item in before if not (math.isfinite(before[item]) and math.isfinite(after[item]))]
    if odd:
        raise ValueError(
            f"a paired test needs numbers; {len(odd):,} of {len(before):,} items have none, e.g. {odd[:3]}"
        )
    differences = {item: after[item] - before[item] for item in before}
    sums: dict[str, float] = {}
    for item, difference in differences.items():
        cluster = item if cluster_of is None else cluster_of[item]
        sums[cluster] = sums.get(cluster, 0.0) + difference
    num_lost = sum(value < 0 for value in differences.values())
    num_gained = sum(value > 0 for value in differences.values())
    num_items, mean = len(differences), math.fsum(differences.values()) / len(differences)
    stderr = _stderr(list(sums.values()), num_items)
    changed = [value for value in sums.values() if value]
    if len(sums) == num_items and {abs(value) for value in changed} <= {1.0}:
        p_value = exact_mcnemar(num_lost, num_gained)
    elif len(changed) <= _MAX_ENUMERATED:
        p_value = sign_flips(changed)
    else:
        # No more than what all signs would say: where all fell alike, the t-test calls any number of them certain.
        p_value = max(_t_test(list(sums.values())), 2.0 ** (1 - len(changed)))
    return PairedTest(num_items, len(sums), mean, stderr, p_value, num_lost, num_gained)


def _stderr(sums: Sequence[float], num_items: int) -> float:
    """Of the mean over items: the spread of the sums of clusters about what their share of the mean would be."""
    num_clusters = len(sums)
    if num_clusters < 2:
        return 0.0
    center = math.fsum(sums) / num_clusters
    variance = math.fsum((value - center) ** 2 for value in sums) / (num_clusters - 1)
    return math.sqrt(num_clusters * variance) / num_items


def _t_test(sums: Sequence[float]) -> float:
    from scipy.stats import ttest_1samp

    center = math.fsum(sums) / len(sums)
    if max(abs(value - center) for value in sums) <= 1e-12 * abs(center):
        return 0.0  # all the same: no spread to divide by
    return float(ttest_1samp(sums, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): those under a level are significant at it, all together.

    The k-th smallest is multiplied by the number of those that are not smaller, and is never under one before it.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def smallest_visible(num_items: int, squared_change: float, level: float, power: float = 0.8) -> float:
    """The loss that a test at `level` sees with `power`, where items change anyway (normal).

    squared_change  mean of the squared difference of an item: of right and wrong, the share that changed
    """
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    return z * math.sqrt(squared_change / num_items)
