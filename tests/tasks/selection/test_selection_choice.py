"""Which rows are kept and what they weigh: by hand, and for any scores."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.selection import KeepSettings
from smoltulu.tasks.selection.choice import (
    Ranked,
    as_uniform,
    choose,
    mean_ranks,
    rank_weights,
    row_hashes,
)

LABELS = ("a", "b", "c")


def ranked(domains: list[int], tokens: list[int], scores: list[float], ties: list[int] | None = None) -> Ranked:
    hashes = np.array(ties or range(len(domains)), dtype=np.uint64)
    return Ranked(np.array(domains), np.array(tokens), np.array(scores, dtype=float), hashes)


#: Source 0: 10, 20, 30, 40 tokens, best is the last. Source 1: 100, 50 tokens, best is the first.
SIX = ranked([0, 0, 1, 0, 1, 0], [10, 20, 100, 30, 50, 40], [0.1, 0.2, 9.0, 0.3, 8.0, 0.4])


def kept(keep: dict[str, object], rows: Ranked = SIX) -> list[int]:
    return np.flatnonzero(choose(KeepSettings.model_validate(keep), rows, LABELS)).tolist()


@pytest.mark.parametrize(
    ("keep", "places"),
    [
        ({"share": 0.5}, [2, 3, 5]),
        ({"share": 0.5, "order": "lowest"}, [0, 1, 4]),
        # Over all, the domain with high scores is taken first.
        ({"share": 0.5, "within": "all"}, [2, 4, 5]),
        ({"share": 1}, [0, 1, 2, 3, 4, 5]),
        # Half of 100 tokens: 40, then 70: 40 is nearer to 50. Half of 150: 100 is as near to 75 as 50, and one row.
        ({"token_share": 0.5}, [2, 5]),
        # 125 tokens over 100 + 150: 50 and 75.
        ({"tokens": 125}, [2, 5]),
        ({"tokens": 250}, [0, 1, 2, 3, 4, 5]),
        ({"tokens": 190, "within": "all"}, [2, 4, 5]),
        ({"threshold": 0.3}, [2, 3, 4, 5]),
        ({"threshold": 0.3, "order": "lowest"}, [0, 1, 3]),
    ],
)
def test_selection_by_hand(keep: dict[str, object], places: list[int]) -> None:
    assert kept(keep) == places


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"threshold": 10}, r"keep.threshold 10 keeps none of 6 rows: they score 0.1 to 9, half of them above 0.35"),
        ({"threshold": 0.1}, "keep.threshold 0.1 keeps every one of 6 rows: they score 0.1 to 9"),
        ({"share": 0.1}, r"keep.share 0.1 keeps no row of source 0 \(a\), which has 4 rows; raise it"),
        ({"share": 0.01, "within": "all"}, "keep.share 0.01 keeps no row of the set, which has 6 rows"),
        ({"tokens": 10}, r"of source 0 \(a\), which has 100 tokens; its part is 4.0 tokens, and its first row has 40"),
        ({"tokens": 251}, "keep.tokens 251: the 6 rows with a score have 250 tokens, so all would be kept"),
    ],
)
def test_selection_that_keeps_nothing_or_everything_is_refused(keep: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept(keep)


def test_selection_of_a_source_of_one_row() -> None:
    rows = ranked([0, 0, 1], [10, 10, 10], [1, 2, 3])
    with pytest.raises(ValueError, match=r"source 1 \(b\) has one row with a score.*keep.within to all"):
        kept({"share": 0.5}, rows)
    assert kept({"share": 0.5, "within": "all"}, rows) == [1, 2]
    assert kept({"share": 1}, rows) == [0, 1, 2]
    with pytest.raises(ValueError, match="no row has a score"):
        kept({"share": 0.5}, ranked([], [], []))


def test_equal_scores_are_put_in_order_by_hash() -> None:
    rows = ranked([0] * 4, [1] * 4, [1, 1, 1, 1], ties=[3, 0, 2, 1])
    assert kept({"share": 0.5}, rows) == [1, 3] == kept({"share": 0.5, "order": "lowest"}, rows)


def test_random_selection_is_the_same_on_every_machine() -> None:
    rows = [("0123456789abcdef", "0:1"), ("0123456789abcdef", "0:1#2"), ("fedcba9876543210", "3:17")]
    # blake2b of "DIGEST ID", and of "7 DIGEST ID", 8 bytes, big endian: pinned.
    assert [f"{value:016x}" for value in row_hashes(rows)] == PINNED
    assert [f"{value:016x}" for value in row_hashes(rows, 7)] == PINNED_SEED_7
    assert as_uniform(np.array([0, 1 << 63, 2**64 - 1], dtype=np.uint64)).tolist() == [0.0, 0.5, 1 - 2.0**-53]


PINNED = ["931936f3a115409d", "a5c5e47c4eaa499b", "541085d81b9f326e"]
PINNED_SEED_7 = ["02f9d9af5e6b0954", "101f2b2b52374a68", "d7ef920a7d8308ba"]


def test_weights_fall_in_a_straight_line_over_the_ranks() -> None:
    scores, domains = np.array([5.0, 1, 3, 3, 7, 0.5]), np.array([0, 0, 0, 0, 0, 1])
    # Ranks 3, 0, 1.5, 1.5, 4 of 0 to 4; source 1 has one row.
    weights = rank_weights(scores, domains, "domain", "highest", 0.5, 1.5)
    assert weights.tolist() == [1.25, 0.5, 0.875, 0.875, 1.5, 1.0]
    lowest = rank_weights(scores, domains, "domain", "lowest", 0.5, 1.5)
    assert lowest.tolist() == [0.75, 1.5, 1.125, 1.125, 0.5, 1.0]
    assert rank_weights(scores, domains, "all", "highest", 0, 5).tolist() == [4, 1, 2.5, 2.5, 5, 0]
    assert mean_ranks(np.array([2.0, 2, 1])).tolist() == [1.5, 1.5, 0]


@st.composite
def any_rows(draw: st.DrawFn) -> Ranked:
    size = draw(st.integers(2, 60))
    numbers = lambda low, high: draw(st.lists(st.integers(low, high), min_size=size, max_size=size))  # noqa: E731
    domains = sorted(numbers(0, 2))
    return ranked(domains, numbers(1, 900), [value / 4 for value in numbers(-9, 9)], numbers(0, 2**32))


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.floats(0.05, 1), st.sampled_from(["domain", "all"]), st.sampled_from(["highest", "lowest"]))
def test_every_selector_meets_its_budget_within_a_row_of_each_domain(
    rows: Ranked, part: float, within: str, order: str
) -> None:
    total = int(rows.tokens.sum())
    keep = KeepSettings.model_validate({"tokens": max(1, int(part * total)), "within": within, "order": order})
    try:
        chosen = choose(keep, rows, LABELS)
    except ValueError as error:
        assert "keeps no row" in str(error) or "one row with a score" in str(error)
        return
    assert keep.tokens is not None
    for domain in np.unique(rows.domains) if within == "domain" else [None]:
        are = np.ones(len(chosen), dtype=bool) if domain is None else rows.domains == domain
        budget = keep.tokens * int(rows.tokens[are].sum()) / total
        assert abs(int(rows.tokens[are & chosen].sum()) - budget) < rows.tokens[are].max()
        # The kept ones are those that are ranked first.
        sign = 1 if order == "highest" else -1
        dropped = are & ~chosen
        if dropped.any():
            assert (sign * rows.scores[are & chosen]).min() >= (sign * rows.scores[dropped]).max()


@settings(max_examples=50, deadline=None)
@given(any_rows(), st.randoms())
def test_selection_does_not_depend_on_the_order_of_rows(rows: Ranked, random: object) -> None:
    order = np.arange(len(rows.scores))
    random.shuffle(order)  # type: ignore[attr-defined]
    if len(np.unique(rows.ties)) < len(rows.ties):
        return
    moved = Ranked(rows.domains[order], rows.tokens[order], rows.scores[order], rows.ties[order])
    keep = KeepSettings(share=0.5, within="all")
    assert (choose(keep, rows, LABELS)[order] == choose(keep, moved, LABELS)).all()


def test_a_hundred_thousand_rows_are_selected_in_two_seconds() -> None:
    random = np.random.default_rng(0)
    size = 100_000
    rows = Ranked(
        random.integers(0, 12, size), random.integers(10, 2000, size), random.normal(size=size),
        random.integers(0, 2**63, size).astype(np.uint64),
    )  # fmt: skip
    started = time.process_time()
    chosen = choose(KeepSettings(token_share=0.2), rows, LABELS)
    rank_weights(rows.scores, rows.domains, "domain", "highest", 0.5, 1.5)
    assert time.process_time() - started < 2
    assert 0.19 < rows.tokens[chosen].sum() / rows.tokens.sum() < 0.21
