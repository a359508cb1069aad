"""The pinned baseline of a recipe's nights: who chose it, and when. `pins.json`, replaced whole."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from smoltulu.artifacts.files import make_folder, read_plain, write_atomically
from smoltulu.artifacts.layout import PINS, history_path
from smoltulu.artifacts.locks import open_lock, take
from smoltulu.schemas.nightly import MeasuredModel, Pin, Pins

#: Held while `pins.json` is read and replaced: the lock of the nights is held for as long as one measures.
_LOCK = ".pins-lock"


def read_pins(root: Path, recipe: str) -> Pins:
    """Every baseline that a recipe has and had. ValueError where the file cannot be read: it is not passed over."""
    file = history_path(root, recipe) / PINS
    try:
        return Pins.model_validate_json(read_plain(file))
    except FileNotFoundError:
        return Pins()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what was written"
        raise ValueError(f"{file} cannot be read: {why}; move it away and pin the baseline again") from None


def pin(root: Path, recipe: str, chosen: Mapping[str, MeasuredModel], named: str) -> dict[str, Pin]:
    """Make evaluations (node -> what it measured) the baselines of their nodes. Returns the pins that held before."""
    return _change(root, recipe, {}, chosen, named)


def unpin(root: Path, recipe: str, nodes: list[str]) -> dict[str, Pin]:
    """Let go of the baselines of these nodes; of all where none is named. ValueError where there is none."""
    held = read_pins(root, recipe).held()
    if odd := [node for node in nodes if node not in held] or ([] if held else ["any evaluation"]):
        raise ValueError(f"{recipe} has no baseline of {', '.join(odd)}; pinned: {', '.join(held) or 'none'}")
    return _change(root, recipe, dict.fromkeys(nodes or held), {}, "")


def _change(
    root: Path, recipe: str, let_go: Mapping[str, None], chosen: Mapping[str, MeasuredModel], named: str
) -> dict[str, Pin]:
    folder = make_folder(history_path(root, recipe), root)
    with open_lock(folder / _LOCK) as lock:
        take(lock.fileno(), lambda: None)
        before = read_pins(root, recipe)
        who, now = _who(), datetime.now(UTC).isoformat(timespec="seconds")
        ended = {"unpinned_by": who, "unpinned_at": now}
        kept = tuple(
            one.model_copy(update=ended) if not one.unpinned_at and (one.node in let_go or one.node in chosen) else one
            for one in before.pins
        )
        new = (
            Pin(node=node, measured=measured, named=named, pinned_by=who, pinned_at=now)
            for node, measured in chosen.items()
        )
        write_atomically(folder / PINS, Pins(pins=(*kept, *new)).model_dump_json(indent=1))
    return {node: one for node, one in before.held().items() if node in let_go or node in chosen}


def _who() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        name = str(os.getuid())
    return f"{name}@{os.uname().nodename}"
