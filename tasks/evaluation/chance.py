"""Whether a share of right choices is more than guessing gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: A score is near chance where guessing gives one as far away as often as this, or more often.
LEVEL = 0.05
#: Metrics that say of an item whether the chosen answer is right.
METRICS = ("acc", "acc_norm", "acc_bytes")


def p_value(num_right: float, chances: Sequence[float]) -> float:
    """Two-sided, of so many right answers where each item is guessed right with its chance.

    Exact (binomial) where all items have one chance; else the normal approximation to the sum.
    """
    if len(set(chances)) == 1:
        return _binomial_p_value(round(num_right), len(chances), chances[0])
    variance = math.fsum(chance * (1 - chance) for chance in chances)
    return math.erfc(abs(num_right - math.fsum(chances)) / math.sqrt(2 * variance))


def _binomial_p_value(num_right: int, num: int, chance: float) -> float:
    """Two-sided: all outcomes that are no likelier. As scipy.stats.binomtest, whose import would cost a second."""
    odds, all_wrong = math.log(chance / (1 - chance)), num * math.log1p(-chance)
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) + k * odds + all_wrong
        for k in range(num + 1)
    ]
    limit = logs[num_right] + 1e-7  # equally likely ones are rounded apart
    return min(1.0, math.fsum(math.exp(one) for one in logs if one <= limit))


def mean_p_value(value: float, chances: Sequence[Sequence[float]]) -> float:
    """The same of a mean of members' shares that count alike, by the normal approximation."""
    expected = math.fsum(math.fsum(member) / len(member) for member in chances) / len(chances)
    variance = math.fsum(math.fsum(p * (1 - p) for p in member) / len(member) ** 2 for member in chances)
    return math.erfc(abs(value - expected) * len(chances) / math.sqrt(2 * variance))


def chance_details(value: float, members: Sequence[Sequence[tuple[float, int]]]) -> dict[str, Any]:
    """`chance` and `is_near_chance` of a score, for its details. Empty where guessing has no known chance.

    Args:
        value: the score, the share of right items or the mean of the members' shares.
        members: of each member of a group (or of the task alone): is it right (1 or 0) and the number of choices, of
            each item.
    """
    items = [item for member in members for item in member]
    if not items or any(right not in (0, 1) or num_choices < 2 for right, num_choices in items):
        return {}
    chances = [[1 / num_choices for _, num_choices in member] for member in members]
    every = [chance for member in chances for chance in member]
    num_right = math.fsum(right for right, _ in items)
    if math.isclose(num_right / len(items), value, abs_tol=1e-9):
        return {"chance": math.fsum(every) / len(every), "is_near_chance": p_value(num_right, every) >= LEVEL}
    shares = [math.fsum(right for right, _ in member) / len(member) for member in members]
    if not math.isclose(math.fsum(shares) / len(shares), value, abs_tol=1e-9):
        return {}
    chance = math.fsum(math.fsum(member) / len(member) for member in chances) / len(members)
    return {"chance": chance, "is_near_chance": mean_p_value(value, chances) >= LEVEL}


def guessed(results: Mapping[str, Any], metric: str) -> list[list[tuple[float, int]]]:
    """The `members` that lie behind the score of `metric` (`acc_norm,none`), from lm-eval's results."""
    name, _, of_filter = metric.partition(",")
    if name not in METRICS:
        return []
    members = []
    for samples in results.get("samples", {}).values():
        used = [sample for sample in samples if sample["filter"] == of_filter and name in sample["metrics"]]
        members.append([(float(sample[name]), _num_choices(sample)) for sample in used])
    return members if all(members) else []


def _num_choices(sample: Mapping[str, Any]) -> int:
    """0 where it is not the chance of a guess that decides: answers are written, or several are right."""
    if isinstance(sample["target"], (list, tuple)) or not isinstance(sample["resps"][0][0], tuple):
        return 0
    with_unconditional = "acc_mutual_info" in sample["metrics"]  # each choice a second time, without a context
    return len(sample["resps"]) // (2 if with_unconditional else 1)
