"""How many rows of each source a set has, which ones, and in which order. Pure: numbers only.

Every row has a rank in its source, drawn from seed, source and number of the row. A source of n rows takes the n
lowest, so a larger share contains a smaller one, whatever else is in the set, and on every machine. Repeats follow the
same ranks: of 2.3 times 10 rows each is there twice, and the three lowest a third time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smoltulu.schemas.mixture import MixtureRule
from smoltulu.tasks.data.draw import seed_of

#: Shares are written with a few decimals: what is less than a row beside a whole number is rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Drawn:
    """The rows of a mixture, in its order.

    places  (N,) of the rows in the file that was read
    times   (N,) 1: the first time that the row is there, 2: the second ...
    """

    places: np.ndarray
    times: np.ndarray


def counts(rules: Sequence[MixtureRule], num_rows: Sequence[int], labels: Sequence[str]) -> list[int]:
    """Rows of each source in the set, of so many that may be trained on.

    Sources with a share have it of the whole set; the others say how large that is. Where every source has a share (or
    a weight), the set is as large as its sources allow: it ends when the last one is used up, or where one would be
    there more often than its max_repeats.

    Raises:
        ValueError: a source has no row, or fewer than its rule asks for; nothing of it would be in the set.
    """
    problems = [f"{label}: no row is left of it" for label, have in zip(labels, num_rows, strict=True) if not have]
    if problems:
        raise ValueError(_cannot(problems))
    most = [have * (rule.max_repeats or 1) for rule, have in zip(rules, num_rows, strict=True)]
    shares = _shares(rules)
    fixed = [
        _fixed(rule, have) if share is None else 0 for rule, have, share in zip(rules, num_rows, shares, strict=True)
    ]
    of_shares = [share for share in shares if share is not None]
    if len(of_shares) == len(rules):
        ends = [have / share for have, share in zip(num_rows, of_shares, strict=True)]
        size = min(max(ends), *(limit / share for limit, share in zip(most, of_shares, strict=True)))
    else:
        size = sum(fixed) / (1 - sum(of_shares))
    made = [own if share is None else _rounded(share * size) for own, share in zip(fixed, shares, strict=True)]
    if len(of_shares) == len(rules):  # rounding up must not ask for a row more than there is
        made = [min(count, int(limit)) for count, limit in zip(made, most, strict=True)]
    for rule, label, count, limit, have in zip(rules, labels, made, most, num_rows, strict=True):
        if not count:
            problems.append(f"{label}: {_said(rule)} of its {have:,} rows is none; raise it, or leave the source out")
        elif rule.repeats is None and count > limit + _ROUNDING:
            asked = "" if rule.num_rows is not None else f" of a set of {size:,.0f} rows is {count:,} rows"
            problems.append(
                f"{label}: {_said(rule)}{asked}, and {have:,} are there to train on; lower it, or allow repeats "
                f"(max_repeats of at least {math.ceil(100 * count / have) / 100:g})"
            )
    if problems:
        raise ValueError(_cannot(problems))
    return made


def _shares(rules: Sequence[MixtureRule]) -> list[float | None]:
    """The share of each source; weights are shares once they are divided by their sum."""
    total = sum(rule.weight or 0 for rule in rules)
    if total:
        return [(rule.weight or 0) / total for rule in rules]
    of_all = sum(rule.share or 0 for rule in rules)
    are_all = all(rule.share is not None for rule in rules)
    return [rule.share / of_all if are_all and rule.share else rule.share for rule in rules]


def _fixed(rule: MixtureRule, have: int) -> int:
    if rule.num_rows is not None:
        return rule.num_rows
    return have if rule.repeats is None else _rounded(rule.repeats * have)


def _rounded(number: float) -> int:
    return int(number + 0.5 + _ROUNDING)


def _said(rule: MixtureRule) -> str:
    return next(
        (
            f"{name} {getattr(rule, name):g}"
            for name in ("repeats", "num_rows", "share", "weight")
            if getattr(rule, name)
        ),
        "all",
    )


def _cannot(problems: Sequence[str]) -> str:
    return "the mixture cannot be made:\n" + "\n".join(problems)


def draw(seed: int, sources: np.ndarray, numbers: np.ndarray, num_wanted: Sequence[int]) -> Drawn:
    """Draw so many rows of each source, and shuffle them.

    sources, numbers  (R,) of each row that may be drawn: its source, and its number there (from its id)
    num_wanted        of each source
    """
    places, times = [], []
    for source, wanted in enumerate(num_wanted):
        own = np.flatnonzero(sources == source)
        ranked = own[np.lexsort((numbers[own], splitmix64(seed_of(seed, f"rank:{source}"), numbers[own])))]
        whole, rest = divmod(wanted, len(ranked)) if len(ranked) else (0, 0)
        for number in range(1, whole + 1):
            places.append(ranked)
            times.append(np.full(len(ranked), number))
        places.append(ranked[:rest])
        times.append(np.full(rest, whole + 1))
    place, time = np.concatenate(places), np.concatenate(times).astype(np.uint64)
    # The order of two rows does not depend on which others are there.
    names = (sources[place].astype(np.uint64) << np.uint64(48)) ^ numbers[place].astype(np.uint64)
    order = splitmix64(0, splitmix64(seed_of(seed, "order"), names) + time)
    shuffled = np.lexsort((time, numbers[place], sources[place], order))
    return Drawn(place[shuffled], time[shuffled].astype(np.int64))


def splitmix64(seed: int, numbers: np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each number (splitmix64, Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        well_mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return well_mixed
