"""How often gold answers coincide, and how many may be right by chance: by hand, and against scipy and all pairs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.verifier_audit.chance import binomial_limit, coincidence_share, most_frequent, pairs_of_rows


def test_coincidence_of_four_rows_by_hand() -> None:
    """Truths 7, 7, 7, 9: of the 12 ordered pairs, the 6 among the sevens coincide."""
    answers = ["7", "7", "7", "9"]
    assert coincidence_share([frozenset({one}) for one in answers], answers) == 6 / 12
    assert most_frequent([frozenset({one}) for one in answers]) == ("7", 0.75)


def test_a_truth_with_alternatives_takes_each() -> None:
    """The answer of row 0 is right for row 1; the one that is given for row 1 (its second) is not for row 0."""
    assert coincidence_share([frozenset({"a"}), frozenset({"a", "b"})], ["a", "b"]) == 1 / 2
    assert coincidence_share([frozenset({"a"})], ["a"]) == 0.0


@given(st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_coincidence_is_that_of_all_pairs(truths: list[set[int]], random: Random) -> None:
    keys = [frozenset(map(str, truth)) for truth in truths]
    answers = [random.choice(sorted(key)) for key in keys]
    pairs = [(i, j) for i in range(len(keys)) for j in range(len(keys)) if i != j]
    assert coincidence_share(keys, answers) == pytest.approx(sum(answers[i] in keys[j] for i, j in pairs) / len(pairs))


def test_limits_by_hand() -> None:
    """Three draws, each a hit with probability 1/2: 0, 1, 2, 3 hits have 1/8, 3/8, 3/8, 1/8."""
    assert [binomial_limit(3, 0.5, level) for level in (0.9, 0.6, 0.2, 0.1)] == [0, 1, 2, 3]
    assert binomial_limit(1000, 0.0, 1e-6) == 0 and binomial_limit(1000, 1.0, 1e-6) == 1000
    assert binomial_limit(0, 0.5, 1e-6) == 0


@given(st.integers(1, 3000), st.floats(1e-4, 0.999), st.sampled_from([1e-9, 1e-6, 1e-3, 0.05]))
def test_limits_are_those_of_scipy(num_draws: int, share: float, level: float) -> None:
    from scipy.stats import binom

    limit = binomial_limit(num_draws, share, level)
    # By a factor for rounding: more than the limit is rarer than the level, more than one less is not.
    assert binom.sf(limit, num_draws, share) < level * 1.001
    assert limit == 0 or binom.sf(limit - 1, num_draws, share) > level * 0.999


def test_pairs_are_of_two_rows_and_even() -> None:
    pairs = pairs_of_rows(3, 6000, Random(0))
    assert all(first != second for first, second in pairs)
    for pair in [(i, j) for i in range(3) for j in range(3) if i != j]:
        assert 850 < pairs.count(pair) < 1150  # 1,000 expected, standard deviation 29
    assert pairs_of_rows(1, 10, Random(0)) == []
