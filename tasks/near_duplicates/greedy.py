"""Which items are near-duplicates of which: candidates that share a band, compared exactly, the first one kept. Pure.

Items are in one order: the sets that are compared with, then the rows. An item is a near-duplicate where it is alike
to an item before it that stays. So chains do not form: of a ~ b ~ c, where a and c are not alike, b goes, a and c stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

#: Of the items that stay, a band remembers so many, the first ones; an item is compared with so many, those that share
#: most bands first. So texts that all look alike and are no near-duplicates (a template) cannot take quadratic time.
#: What a text with the very same words was found to be alike to comes before all: no limit hides a copy.
MAX_KEPT_PER_BAND = 128
MAX_COMPARISONS = 64


@dataclass(frozen=True)
class Pair:
    """An item, and one before it that it is alike to."""

    item: int
    other: int
    jaccard: float


@dataclass
class Found:
    """Pairs in the order of their items; items with more candidates than were compared."""

    pairs: list[Pair] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)


def meeting_places(bands: np.ndarray, is_compared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places where items meet: a place is a value of a band that at least two items share.

    bands        (N, B) uint64
    is_compared  (N,) bool: others meet nobody
    Returns: item and place of every visit, both int64, in the order of items
    """
    items: list[np.ndarray] = []
    places: list[np.ndarray] = []
    num_places = 0
    compared = np.flatnonzero(is_compared)
    for band in range(bands.shape[1]):
        values = bands[compared, band]
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, np.int64)
        sizes = np.diff(np.r_[starts, len(ordered)])
        shared = sizes > 1
        place = np.repeat(np.where(shared, np.cumsum(shared) - 1 + num_places, -1), sizes)
        meets = place >= 0
        items.append(compared[order[meets]])
        places.append(place[meets])
        num_places += int(shared.sum())
    item = np.concatenate(items) if items else np.empty(0, np.int64)
    place = np.concatenate(places) if places else np.empty(0, np.int64)
    order = np.lexsort((place, item))
    return item[order], place[order]


def near_duplicates(
    bands: np.ndarray,
    is_compared: np.ndarray,
    num_others: int,
    alike: Callable[[int, int], float | None],
    within: bool = True,
    hashes: np.ndarray | None = None,
) -> Found:
    """Compare every item with those before it that share a band, and decide in one walk.

    num_others   the first so many items are of other sets: they all stay and are not compared with each other
    alike(a, b)  exact similarity of two items, or None below the threshold
    within       whether rows are compared with each other
    hashes       (N,) of each item's text: copies are compared whatever the limits

    Of the other sets every item that is alike is a pair, of the rows the first one found. A row that is alike to an
    item of another set does not stay, and so is nobody's first.
    """
    found = Found()
    kept: dict[int, list[int]] = {}  # place -> items that stay, the first ones
    copies = _copies(hashes, len(bands))
    known: dict[int, list[int]] = {}  # text that comes again -> its items that stay, or what its first one is alike to
    for item, places in _visits(*meeting_places(bands, is_compared)):
        copy = int(copies[item])
        if item >= num_others:
            same = known.get(copy, [])
            met = Counter(other for place in places for other in kept.get(place, ()))
            candidates = sorted(
                met.keys() | same, key=lambda other: (other not in same, other >= num_others, -met[other], other)
            )
            if len(candidates) > MAX_COMPARISONS:
                found.unfinished.append(item)
            stays = True
            alike_to = []
            for other in sorted(candidates[:MAX_COMPARISONS], key=lambda other: other >= num_others):
                if other >= num_others and not stays:
                    break
                similarity = alike(item, other)
                if similarity is not None:
                    found.pairs.append(Pair(item, other, similarity))
                    alike_to.append(other)
                    stays = False
            if copy >= 0 and not stays:
                known.setdefault(copy, alike_to)
            if not (stays and within):
                continue
        if copy >= 0 and len(first := known.setdefault(copy, [])) < MAX_COMPARISONS:
            first.append(item)
        for place in places:
            first = kept.setdefault(place, [])
            if len(first) < MAX_KEPT_PER_BAND:
                first.append(item)
    return found


def _copies(hashes: np.ndarray | None, num_items: int) -> np.ndarray:
    """A number for each text that comes more than once, -1 for the others."""
    if hashes is None:
        return np.full(num_items, -1)
    _, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.where(counts[numbers] > 1, numbers, -1)


def _visits(items: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(item, its places), in the order of items."""
    starts = np.flatnonzero(np.r_[True, items[1:] != items[:-1]]) if len(items) else np.empty(0, np.int64)
    ends = np.r_[starts[1:], len(items)] if len(items) else starts
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(items[start]), places[start:end].tolist()
