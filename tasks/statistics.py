"""Means with their standard errors, and the paired test by which two models are compared on the same prompts. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error sd/sqrt(n) with the n - 1 variance; None for fewer than two values."""
    assert values
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float, float]:
    """Two-sided paired test of b against a over prompts with the same ids (normal approximation of the t-test).

    Args:
        a, b: prompt id -> score; the ids must be the same.

    Returns:
        mean of b - a, its standard error, and the p-value. Equal everywhere: (0, 0, 1).

    Raises:
        ValueError: different ids, or fewer than two.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"a paired test needs the same ids on both sides; {len(odd)} are on one only, e.g. {odd[:3]}")
    if len(a) < 2:
        raise ValueError(f"a paired test needs at least two ids, got {len(a)}")
    mean, stderr = mean_and_stderr([b[key] - a[key] for key in a])
    assert stderr is not None
    if stderr == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    return mean, stderr, 2 * NormalDist().cdf(-abs(mean / stderr))
