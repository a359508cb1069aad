"""Removal of what `artifacts.upkeep.gc` found that may go.

Holds the lock of each key, looks again, and leaves a valid store when it is killed at any instant: the pointer goes
first, then whole generations by a rename each, and consumers go before their inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from smoltulu.artifacts.files import TRASH_PREFIX, remove_tree
from smoltulu.artifacts.layout import CURRENT, Pointer, key_path, read_pointer
from smoltulu.artifacts.locks import hold_if_idle
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.upkeep.gc import Plan, Removal


@dataclass
class Outcome:
    """What removal did; `skipped` says what stayed, and why."""

    removed: list[Removal] = field(default_factory=list)
    skipped: list[tuple[Removal, str]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes freed."""
        return sum(removal.num_bytes for removal in self.removed)


def remove(plan: Plan, root: Path, told: Callable[[Removal], None] = lambda removal: None) -> Outcome:
    """Carry out a plan. What is in use by now, was used since, or cannot be removed is skipped with a reason."""
    root = root.absolute()
    outcome = Outcome()
    needed: set[Ref] = set()
    for removal in plan.removals:
        try:
            is_needed = removal.kind == "artifact" and removal.ref in needed
            fault = "something that stays was made from it" if is_needed else _remove_one(root, removal)
        except OSError as error:
            fault = f"{error.strerror}: {error.filename}"
        if fault is None:
            outcome.removed.append(removal)
            told(removal)
        else:
            outcome.skipped.append((removal, fault))
            needed |= removal.inputs
    return outcome


def _remove_one(root: Path, removal: Removal) -> str | None:
    """Remove under the key's lock; why not, or None."""
    stage = root / removal.ref.stage
    folder = key_path(root, *removal.ref) if removal.ref.key else stage
    if folder != root and (folder.is_symlink() or (stage != root and stage.is_symlink())):
        return "lies behind a link"
    if not removal.ref.key:
        return _remove_names(folder, removal)
    # The lock files stay: another flow may just be waiting on them.
    with hold_if_idle(folder) as holder:
        if holder is not None:
            return f"in use by {holder}"
        pointer = read_pointer(folder) or Pointer("", 0)
        if pointer.changed != removal.last_used:
            return "used meanwhile"
        if pointer.name in removal.names and CURRENT not in removal.names:
            return "is the current generation by now"
        return _remove_names(folder, removal)


def _remove_names(folder: Path, removal: Removal) -> str | None:
    before = set(os.listdir(folder))  # with the trash of somebody who was killed: that goes as a leftover
    for name in removal.names:
        path = folder / name
        if path.is_symlink():
            return f"{name} is a link"
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    prefixes = tuple(f"{TRASH_PREFIX}{name}-" for name in removal.names)
    left = [name for name in os.listdir(folder) if name.startswith(prefixes) and name not in before]
    return f"{left[0]} could not be removed wholly" if left else None
