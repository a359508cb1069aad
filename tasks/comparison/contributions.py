"""What each item adds to a score, so that the score is the mean of what its items add. Pure.

An evaluation says what its score is and what its items are, not how one becomes the other. Each way that is known is
tried, and it is the right one if it gives both scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A score is the mean of what its items add, up to this.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Item:
    """One measured item.

    value   its score; of several parts their mean
    parts   of an item that is several answers in one (a prompt of IFEval with its instructions)
    prompt  digest of what was asked
    member  of a group: the task that it belongs to
    weight  what it counts, where the evaluation says so
    row     its line of the samples, for a reader
    """

    value: float
    prompt: str | None = None
    member: str = ""
    parts: tuple[float, ...] = ()
    weight: float = 1.0
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)


@dataclass(frozen=True)
class Contributions:
    """Item -> what it adds, before and after; and its stratum: the member of a group.

    Members are strata and no clusters: the score is that of these members, and another sample of it would have other
    items of the same ones. As clusters they would speak of other members than these, and ARC has only two.
    """

    before: dict[str, float]
    after: dict[str, float]
    stratum_of: dict[str, str]


Items = Mapping[str, Item]


def contributions(before: Items, after: Items, scores: tuple[float, float]) -> Contributions | None:
    """What each item adds to two scores; None where no known way gives both. The items of both are the same."""
    if any(item.parts for item in after.values()):
        ways: tuple[Callable[[Items], dict[str, float]], ...] = (_by_part, _prompts_and_parts, _alike)
    else:
        ways = (_alike, _by_member, _by_weight)
    for way in ways:
        made = [way(items) for items in (before, after)]
        if all(_is_mean(list(values.values()), score) for values, score in zip(made, scores, strict=True)):
            return Contributions(made[0], made[1], {name: item.member for name, item in after.items()})
    return None


def _is_mean(values: Sequence[float], score: float) -> bool:
    return abs(math.fsum(values) / len(values) - score) <= _ROUNDING * max(1.0, abs(score))


def _alike(items: Items) -> dict[str, float]:
    """Mean of the items, which may be those of all members of a group."""
    return {name: item.value for name, item in items.items()}


def _by_member(items: Items) -> dict[str, float]:
    """Mean of the members' means (macro average): an item of a small member adds more."""
    sizes = Counter(item.member for item in items.values())
    share = len(items) / len(sizes)
    return {name: item.value * share / sizes[item.member] for name, item in items.items()}


def _by_weight(items: Items) -> dict[str, float]:
    """Mean by the weights that the evaluation gave its items."""
    mean_weight = math.fsum(item.weight for item in items.values()) / len(items)
    return {name: item.value * item.weight / mean_weight for name, item in items.items()}


def _by_part(items: Items) -> dict[str, float]:
    """Mean of all parts (IFEval by instruction)."""
    mean_size = sum(len(item.parts) for item in items.values()) / len(items)
    return {name: math.fsum(item.parts) / mean_size for name, item in items.items()}


def _prompts_and_parts(items: Items) -> dict[str, float]:
    """Half of it by part, half the share of the items of which every part is right (IFEval's average)."""
    by_part = _by_part(items)
    return {name: (float(all(item.parts)) + by_part[name]) / 2 for name, item in items.items()}
