"""Figures of the page of a selection, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from smoltulu.schemas.selection import KeepSettings
from smoltulu.tasks.selection.choice import Ranked
from smoltulu.tasks.selection.figures import Band, correlations, jaccard, length_bands, overlaps, spearman

NAN = float("nan")


def test_rows_by_length() -> None:
    tokens, kept = np.array([1, 2, 3, 9, 15, 0]), np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    assert length_bands(tokens, kept, np.array([1.0, 2, 4, NAN, NAN, 3])) == [
        Band(1, 1, 2, 1, 2.0), Band(2, 3, 2, 1, 3.0), Band(8, 15, 2, 1, None),
    ]  # fmt: skip


def test_rank_correlation_of_a_selection() -> None:
    ascending = np.array([1.0, 2, 3, 4])
    assert spearman(ascending, np.array([10.0, 100, 1000, 10_000])) == pytest.approx(1)
    assert spearman(ascending, -ascending) == pytest.approx(-1)
    # Ranks 0 1.5 1.5 3 and 0 1 2 3: 4.5 / sqrt(4.5 x 5).
    assert spearman(np.array([0.0, 5, 5, 9]), ascending) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(ascending, np.array([1.0, NAN, 3, 2])) == pytest.approx(0.5)
    assert spearman(ascending, np.array([1.0, NAN, NAN, 2])) is None
    assert spearman(ascending, np.ones(4)) is None


def test_correlations_within_and_over_sources() -> None:
    domains, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 2, 3, 11, 12, 13])
    length = np.array([3.0, 2, 1, 13, 12, 11])
    (over, all_rows), (first, own), (_, other) = correlations(domains, scores, {"length": length})
    assert (over, first) == (None, 0)
    # Ranks 0..5 and 2 1 0 5 4 3: 1 - 6 x 16 / (6 x 35).
    assert all_rows["length"] == pytest.approx(1 - 6 * 16 / (6 * 35))
    assert own["length"] == other["length"] == pytest.approx(-1)


def test_overlap_of_selectors_at_equal_tokens() -> None:
    assert jaccard(np.array([1, 1, 0], dtype=bool), np.array([0, 1, 1], dtype=bool)) == pytest.approx(1 / 3)
    assert jaccard(np.zeros(2, dtype=bool), np.zeros(2, dtype=bool)) == 1
    rows = Ranked(
        np.zeros(4, dtype=int), np.array([40, 10, 10, 20]), np.array([0.0, 3, 2, 1]), np.arange(4, dtype=np.uint64)
    )
    kept = np.array([0, 1, 1, 1], dtype=bool)
    keep, labels = KeepSettings(share=0.75), ("a",)
    # 40 tokens: the longest row alone; the two of the lowest losses, 50 tokens, are nearer than one.
    names, values = zip(*overlaps(keep, rows, kept, np.array([2.0, 1, 8, 9]), labels), strict=True)
    assert names == ("this selection", "longest", "random", "lowest perplexity")
    assert values[0][:2] == [1.0, 0.0] and values[0][3] == 0.25
    assert len(overlaps(keep, rows, kept, np.full(4, NAN), labels)) == 3
