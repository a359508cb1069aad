"""Tests of paired scores: the same items measured twice. Pure.

Miller, "Adding error bars to evals" (arXiv 2411.00640): pair by item, count items that hang together as one cluster.
Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"
(J. Educ. Behav. Stat. 37, 2012): the interval, with one item more that is lost and one that is gained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Clusters with a difference up to which every assignment of signs is counted: 2^20 sums, 16 MB.
_MAX_ENUMERATED = 20
#: Of the sums of signs: those that differ by rounding alone count as equal.
_ROUNDING = 1e-12
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedTest:
    """What two measurements of the same items differ by.

    difference   mean of after - before, over items
    stderr       of it, over clusters (within strata); 0 where none differs, or all by the same
    low, high    95 % interval of it: never of no width
    p_value      two-sided, that both are equally good
    num_lost     items whose score fell; num_gained: rose
    """

    num_items: int
    num_clusters: int
    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    num_lost: int
    num_gained: int


def exact_mcnemar(num_lost: int, num_gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the items that changed, as many are lost as gained by chance."""
    from scipy.special import bdtr  # scipy.stats takes two seconds to import

    num_changed = num_lost + num_gained
    return min(1.0, 2 * float(bdtr(min(num_lost, num_gained), num_changed, 0.5))) if num_changed else 1.0


def sign_flips(sums: Sequence[float]) -> float:
    """Two-sided p-value of the exact permutation test: each difference could as well have had the other sign.

    Counts 2^len(sums) assignments.
    """
    import numpy as np

    assert len(sums) <= _MAX_ENUMERATED
    flipped = np.zeros(1)
    for value in sums:
        flipped = np.concatenate([flipped + value, flipped - value])
    observed = abs(math.fsum(sums)) - _ROUNDING * math.fsum(map(abs, sums))
    return float(np.mean(np.abs(flipped) >= observed))


def paired_test(
    before: Mapping[str, float],
    after: Mapping[str, float],
    cluster_of: Mapping[str, str] | None = None,
    stratum_of: Mapping[str, str] | None = None,
) -> PairedTest:
    """Test whether scores of the same items changed.

    A cluster is drawn as a whole (a prompt with its instructions): another sample would have other clusters. A stratum
    is there in every sample (a subset of BBH): another sample would have other items of the same strata.

    Args:
        before, after: item -> score.
        cluster_of: item -> what it shares its luck with; none: each is alone.
        stratum_of: item -> its stratum; none: all are in one.

    Raises:
        ValueError: other items on one side, none, or a score that is no number; a cluster that is in two strata.
    """
    import numpy as np

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
    strata: dict[str, str] = {}
    for item, difference in differences.items():
        cluster = item if cluster_of is None else cluster_of[item]
        sums[cluster] = sums.get(cluster, 0.0) + difference
        stratum = "" if stratum_of is None else stratum_of[item]
        if strata.setdefault(cluster, stratum) != stratum:
            raise ValueError(f"cluster {cluster!r} is in two strata, {strata[cluster]!r} and {stratum!r}; give it one")
    num_lost = sum(value < 0 for value in differences.values())
    num_gained = sum(value > 0 for value in differences.values())
    values = [*before.values(), *after.values()]
    # Where nothing changed, an item could have changed by this.
    reach = 1.0 if min(values) >= 0 and max(values) <= 1 else max(values) - min(values)
    test = clustered_test(
        # So that their mean is that of the items.
        np.array(list(sums.values())) * (len(sums) / len(differences)),
        np.unique(list(strata.values()), return_inverse=True)[1],
        is_counted=len(sums) == len(differences),
        reach=reach,
    )
    mean = math.fsum(differences.values()) / len(differences)
    return PairedTest(len(differences), len(sums), mean, *test, num_lost, num_gained)


def clustered_test(
    differences: np.ndarray, strata: np.ndarray, *, is_counted: bool, reach: float
) -> tuple[float, float, float, float]:
    """Standard error of the mean difference, its 95 % interval, and the p-value that it is 0.

    The p-value is exact where every cluster is one item that is lost, gained or neither (McNemar), or where few changed
    (all signs); else it is the t-test's.

    Args:
        differences: (clusters) after - before.
        strata: (clusters) number of the stratum, from 0.
        is_counted: each cluster is one item.
        reach: what an item could have changed by, where none did.
    """
    import numpy as np
    from scipy.special import stdtr, stdtrit

    num, mean = len(differences), float(differences.mean())
    stderr, degrees = _stderr(differences, strata)
    changed = differences[differences != 0]
    # As if one cluster more had fallen, and one risen, as far as the furthest: of lost and gained items Bonett and
    # Price's, and where all changed alike, or none, it has a width.
    furthest = float(np.abs(changed).max()) if len(changed) else reach
    center = num * mean / (num + 2)
    squares = (stderr * num) ** 2 + 2 * furthest**2 + 2 * num * mean**2 / (num + 2)
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * math.sqrt(squares) / (num + 2)
    if is_counted and np.all(np.abs(changed) == 1):
        p_value = exact_mcnemar(int((changed < 0).sum()), int((changed > 0).sum()))
    elif len(changed) <= _MAX_ENUMERATED:
        p_value = sign_flips(changed.tolist())
    else:
        # Where all fell by nearly the same, a t-test calls any number certain: no less than all signs would say.
        t_test = 2 * float(stdtr(degrees, -abs(mean) / stderr)) if stderr > _ROUNDING * abs(mean) else 0.0
        p_value = max(t_test, 2.0 ** (1 - len(changed)))
    return stderr, center - half, center + half, p_value


def _stderr(differences: np.ndarray, strata: np.ndarray) -> tuple[float, int]:
    """Of the mean, by the spread within strata; and its degrees of freedom. Strata of one cluster are taken as one."""
    import numpy as np

    num = len(differences)
    sizes = np.bincount(strata)
    if np.any(sizes == 1):
        strata = np.unique(np.where(sizes[strata] == 1, -1, strata), return_inverse=True)[1]
        sizes = np.bincount(strata)
    means = np.bincount(strata, weights=differences) / sizes
    squares = np.bincount(strata, weights=(differences - means[strata]) ** 2)
    variance = float((sizes * squares / np.maximum(sizes - 1, 1)).sum())
    return math.sqrt(variance) / num, max(num - len(sizes), 1)


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
