"""Trainer checkpoints inside `work/`: which are whole, which one to go on from, which to keep.

The trainer's own saves are not atomic (transformers#35782): a checkpoint counts only with its completion marker, which
names every file with its size and digest and is written after all of them are on disk. Sizes are enough to see a torn
checkpoint; before a training goes on from one its bytes are read too, for a damaged optimizer would go unnoticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from smoltulu.artifacts.files import (
    READ_ERRORS,
    link_or_copy,
    read_plain,
    remove_tree,
    sync,
    sync_tree,
    write_atomically,
)
from smoltulu.artifacts.keys import file_fault, folder_records
from smoltulu.schemas.artifact import FileRecord, FileRecords
from smoltulu.schemas.common import StrictModel

CHECKPOINT_MARKER = ".complete"


class Marker(StrictModel):
    """Content of a completion marker."""

    files: FileRecords = Field(min_length=1)
    score: float | None = None


def mark_complete(folder: Path, score: float | None = None, known: Mapping[str, FileRecord] | None = None) -> None:
    """Write the completion marker.

    score  higher is better; what `prune` keeps the best checkpoint by
    known  records of files whose bytes need not be read again
    """
    (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)
    files = folder_records(folder, known or {})
    kept = score if score is not None and math.isfinite(score) else None
    _complete(folder, Marker(files=files, score=kept))


def _complete(folder: Path, marker: Marker) -> None:
    """The files of a checkpoint on disk, then its marker, then its own name: older ones may be removed after that."""
    sync_tree(folder, marker.files)
    write_atomically(folder / CHECKPOINT_MARKER, marker.model_dump_json())
    sync(folder.parent)
    sync(folder.parent.parent)


def place_checkpoint(whole: Path, target: Path, left_out: Collection[str] = ()) -> None:
    """A whole checkpoint at a second place, its marker last; `left_out`: names of files that do not come along.

    Files are hard links where the file system has them: checkpoints are only ever read, or removed.
    """
    marker = _marker(whole)
    files = {name: record for name, record in marker.files.items() if name not in left_out}
    remove_tree(target)
    for name in files:
        link_or_copy(whole / name, target / name)
    _complete(target, Marker(files=files, score=marker.score))


def newest_checkpoint(folder: Path, full: bool = False) -> tuple[int, Path] | None:
    """Step and folder of the newest complete `checkpoint-<step>`; others are passed over. `full`: as for `fault`."""
    newest_first = sorted(_checkpoints(folder), reverse=True)
    return next(((step, path) for step, path in newest_first if fault(path, full) is None), None)


def torn_checkpoints(folder: Path, full: bool = False) -> list[tuple[int, Path, str]]:
    """Step, folder and fault of every checkpoint that does not count, newest first. `full`: as for `fault`.

    OSError where one cannot be read: it may be whole, and what does not count is removed.
    """
    found = ((step, path, fault(path, full, strict=True)) for step, path in _checkpoints(folder))
    return sorted(((step, path, reason) for step, path, reason in found if reason is not None), reverse=True)


def fault(folder: Path, full: bool = False, strict: bool = False) -> str | None:
    """What is wrong with a checkpoint (or another folder that was marked), or None where it is whole.

    full    read and hash every byte, instead of looking at sizes
    strict  OSError where the disk does not let it be read, which is no fault of the checkpoint
    """
    try:
        files = _marker(folder).files
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValidationError) as error:
        if strict and isinstance(error, OSError) and error.errno in READ_ERRORS:
            raise
        return f"its completion marker is unreadable ({type(error).__name__})"
    faults = (file_fault(folder, name, record, full, strict) for name, record in files.items())
    return next((found for found in faults if found is not None), None)


def num_steps_of(checkpoint: Path) -> int | None:
    """Optimizer steps of the whole training that a checkpoint belongs to; None where the trainer did not say."""
    try:
        steps = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def prune(folder: Path, num_kept: int) -> None:
    """Remove whole checkpoints but the newest `num_kept` and the one with the best score.

    Called after a new one is marked complete: the trainer's own rotation deletes before, and a kill in between would
    lose everything where one is kept.
    """
    whole = sorted((step, path) for step, path in _checkpoints(folder) if fault(path) is None)
    scored = [(score, step) for step, path in whole if (score := _marker(path).score) is not None]
    best = max(scored, default=(0.0, -1))[1]
    for step, path in whole[:-num_kept]:
        if step != best:
            remove_tree(path)


def _marker(folder: Path) -> Marker:
    return Marker.model_validate_json(read_plain(folder / CHECKPOINT_MARKER))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    named = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return [(int(step), path) for step, path in named if step.isascii() and step.isdecimal()]
