"""Drawing at random by what a thing is called, so that neither order nor other things change what becomes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def seed_of(seed: int, what: str) -> int:
    """63 bits that depend on seed and name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}".encode()).digest()[:8]) >> 1


def drawn(names: Sequence[str], count: int | None, seed: int) -> list[int]:
    """Places of `count` of the names, ascending; None, or more than there are: all. More contain fewer."""
    if count is None or count >= len(names):
        return list(range(len(names)))
    ranked = sorted(range(len(names)), key=lambda place: (seed_of(seed, f"drawn:{names[place]}"), place))
    return sorted(ranked[:count])
