"""Whether two answers are equal, part by part. What two expressions are worth is decided by whoever asks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from smoltulu.tasks.verifiers.math_values import Group, Leaf, Named, Node

#: Groups whose parts have no order.
_UNORDERED = ("list", "set", "union")

#: Whether two expressions are equal; None where that is not known here.
Decide = Callable[[Leaf, Leaf], bool | None]


def compare(given: Node, expected: Node, decide: Decide) -> bool | None:
    """Whether two answers are equal; None where `decide` does not know."""
    if isinstance(given, Named) and isinstance(expected, Named):
        if given.name != expected.name:
            return False
        return compare(given.node, expected.node, decide)
    # An equation without a name on its left says the same in another way; any other name is just a name.
    for one, other in ((given, expected), (expected, given)):
        if isinstance(one, Named) and isinstance(other, Leaf) and other.kind == "equation":
            if isinstance(one.node, Leaf):
                return decide(Leaf("equation", f"{one.name}={one.node.text}"), other)
            return False
    given = given.node if isinstance(given, Named) else given
    expected = expected.node if isinstance(expected, Named) else expected
    if isinstance(given, Named) or isinstance(expected, Named):
        return False
    if isinstance(given, Leaf) and isinstance(expected, Leaf):
        return _compare_leaves(given, expected, decide)
    if not isinstance(given, Group) or not isinstance(expected, Group):
        return False
    return _compare_groups(given, expected, decide)


def _compare_groups(given: Group, expected: Group, decide: Decide) -> bool | None:
    kinds = {given.kind, expected.kind}
    if len(kinds) > 1 and kinds != {"list", "set"}:
        return False
    if len(given.parts) != len(expected.parts):
        return False
    if given.kind not in _UNORDERED:
        return _all(compare(one, other, decide) for one, other in zip(given.parts, expected.parts, strict=True))
    left, right = Counter(given.parts), Counter(expected.parts)
    if left == right:
        return True
    # What has the same spelling on both sides is paired; the others are tried against each other.
    ours = _without(given.parts, right)
    theirs = _without(expected.parts, left)
    return _match(ours, theirs, decide)


def _match(ours: list[Node], theirs: list[Node], decide: Decide) -> bool | None:
    known: bool | None = True
    for one in ours:
        found: bool | None = False
        for place, other in enumerate(theirs):
            equal = compare(one, other, decide)
            if equal:
                found = True
                del theirs[place]
                break
            if equal is None:
                found = None
        if found is False:
            return False
        known = None if found is None else known
    return known


def _without(parts: tuple[Node, ...], others: Counter[Node]) -> list[Node]:
    """Parts that have no partner of the same spelling among `others`."""
    left = Counter(others)
    unpaired = []
    for part in parts:
        if left[part] > 0:
            left[part] -= 1
        else:
            unpaired.append(part)
    return unpaired


def _compare_leaves(given: Leaf, expected: Leaf, decide: Decide) -> bool | None:
    if given.unit and expected.unit and given.unit != expected.unit:
        return False
    if given.text == expected.text and (given.kind == expected.kind or "words" in (given.kind, expected.kind)):
        return True
    if "words" in (given.kind, expected.kind):
        return _letters(given) == _letters(expected)
    if given.kind != expected.kind and not {given.kind, expected.kind} <= {"number", "expression"}:
        return False
    if given.kind in ("number", "based") and expected.kind == given.kind:
        return False
    return decide(given, expected)


def _letters(leaf: Leaf) -> str:
    return re.sub(r"[\s{}\\]", "", leaf.text).lower()


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """False where any is, else None where any is."""
    known: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        known = None if verdict is None else known
    return known
