"""How often two gold answers of a source coincide, and how many of a sample may then be right by chance. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random


def coincidence_share(truths: Sequence[frozenset[str]], answers: Sequence[str]) -> float:
    """Probability that the answer of a random row is right for another random row, over all ordered pairs.

    Args:
        truths: (rows,) the right answers of each row, in one spelling.
        answers: (rows,) the one of them that is given for it.
    """
    num_rows = len(truths)
    if num_rows < 2:
        return 0.0
    num_right_for = Counter(key for truth in truths for key in truth)
    own = sum(answer in truth for truth, answer in zip(truths, answers, strict=True))
    hits = sum(num_right_for[answer] for answer in answers) - own
    return hits / (num_rows * (num_rows - 1))


def most_frequent(truths: Sequence[frozenset[str]]) -> tuple[str, float]:
    """The answer that is right for most rows, and its share of the rows: what a constant answer would earn."""
    counts = Counter(key for truth in truths for key in truth)
    key, count = min(counts.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
    return key, count / max(len(truths), 1)


def binomial_limit(num_draws: int, share: float, level: float) -> int:
    """The least k such that more than k of `num_draws` hits have a probability under `level`, each having `share`."""
    if num_draws == 0 or share <= 0:
        return 0
    if share >= 1:
        return num_draws
    log_odds = math.log(share) - math.log1p(-share)
    log_probability = num_draws * math.log1p(-share)  # of exactly k hits
    at_most = 0.0
    for k in range(num_draws):
        at_most += math.exp(log_probability)
        if 1 - at_most < level:
            return k
        log_probability += log_odds + math.log((num_draws - k) / (k + 1))
    return num_draws


def pairs_of_rows(num_rows: int, num_pairs: int, random: Random) -> list[tuple[int, int]]:
    """Ordered pairs of two different rows, drawn with replacement: hits among them are binomial."""
    if num_rows < 2:
        return []
    found = []
    for _ in range(num_pairs):
        first, second = random.randrange(num_rows), random.randrange(num_rows - 1)
        found.append((first, second + (second >= first)))
    return found
