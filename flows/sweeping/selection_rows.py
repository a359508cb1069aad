"""What the cells of an experiment with selection trained on, from the manifests of what they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.states import CellRecord
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.selection import SelectionOutputs
from smoltulu.tasks.stages import STAGES

#: Kept tokens may differ by this, or by a row of each source, where that is more: no budget is met closer.
MAX_APART = 0.02
#: Tokens of trainings, which end with a whole batch.
_MAX_TRAINED_APART = 0.1


@dataclass(frozen=True)
class TrainedOn:
    """Rows of one cell.

    num_rows, num_tokens  that were trained on, once
    num_kept_tokens       by the tokens of the selection; None where all rows were taken, weighed or not
    num_trained_tokens    over the whole training; num_steps: optimizer steps
    num_sources           from each of which rows were chosen
    """

    num_rows: int
    num_tokens: int
    num_kept_tokens: int | None
    num_trained_tokens: int
    num_steps: int
    num_sources: int = 1

    @property
    def num_epochs(self) -> float:
        """How often each row was seen, in the mean."""
        return self.num_trained_tokens / self.num_tokens


def trained_on(store_root: Path, cell: CellRecord) -> TrainedOn | None:
    """Rows of a cell; None where its model or its rows were removed since."""
    training = _manifest(store_root, cell.stage, cell.training)
    rows = _upstream(store_root, training)
    if training is None or rows is None:
        return None
    chosen = _upstream(store_root, rows)
    if chosen is None:
        return None
    stage = STAGES.get(chosen.spec.stage)
    is_cut = stage is not None and stage.makes(SelectionOutputs) and chosen.outputs.get("weights_file") is None
    selected = chosen.outputs if is_cut else {}
    num_rows, num_tokens = _count(rows.outputs, "num_rows"), _count(rows.outputs, "num_tokens")
    if not num_rows or not num_tokens:
        return None
    return TrainedOn(
        num_rows,
        num_tokens,
        _count(selected, "num_kept_tokens"),
        _count(training.outputs, "num_tokens") or 0,
        _count(training.outputs, "num_steps") or 0,
        len(selected.get("by_source") or {}) or 1,
    )


def _count(outputs: Mapping[str, Any], name: str) -> int | None:
    value = outputs.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _upstream(store_root: Path, manifest: Manifest | None) -> Manifest | None:
    """Of its input `dataset`."""
    record = None if manifest is None else manifest.inputs.get("dataset")
    return None if record is None else _manifest(store_root, record.stage, record.key)


def _manifest(store_root: Path, stage: str, key: str) -> Manifest | None:
    folder = layout.key_path(store_root, stage, key)
    try:
        pointer = layout.read_pointer(folder)
        return None if pointer is None else read_manifest(folder / pointer.name)
    except (OSError, ValueError, ValidationError):
        return None


def unequal(arms: Mapping[str, Sequence[TrainedOn]]) -> str:
    """Why arms that train on chosen rows are not at equal tokens; empty where they are.

    arms  name -> its cells, without those of which nothing is known
    """
    kept = {name: [one.num_kept_tokens for one in cells if one.num_kept_tokens] for name, cells in arms.items()}
    kept = {name: tokens for name, tokens in kept.items() if tokens}
    if not kept:
        return ""
    fewest = min(kept, key=lambda name: min(kept[name]))
    most = max(kept, key=lambda name: max(kept[name]))
    low, high = min(kept[fewest]), max(kept[most])
    every = [one for cells in arms.values() for one in cells if one.num_kept_tokens]
    a_row_each = max(one.num_sources * one.num_kept_tokens / one.num_rows for one in every)  # type: ignore[operator]
    if high - low <= max(MAX_APART * low, a_row_each):
        return ""
    return (
        f"not at equal tokens: arm {fewest} kept {low:,} and arm {most} {high:,}; give all arms the same "
        "selection.keep.tokens or keep.token_share"
    )


def tokens_notes(arms: Mapping[str, Sequence[TrainedOn | None]]) -> list[str]:
    """What to know of the tokens of arms at one setting: how many were kept, and which arms nobody knows of."""
    notes = []
    known = {name: [one for one in cells if one is not None] for name, cells in arms.items()}
    kept = [one.num_kept_tokens for cells in known.values() for one in cells if one.num_kept_tokens is not None]
    if kept:
        notes.append(f"kept tokens: {min(kept):,} to {max(kept):,} in all arms with chosen rows")
    if lost := [name for name, cells in known.items() if len(cells) < len(arms[name])]:
        notes.append(f"what arms {', '.join(lost)} were trained on is not known: models or rows were removed since")
    trained = {name: [one.num_trained_tokens for one in cells] for name, cells in known.items() if cells}
    if trained:
        low, high = min(map(min, trained.values())), max(map(max, trained.values()))
        apart = f"; by more than {_MAX_TRAINED_APART:.0%}" if high > low * (1 + _MAX_TRAINED_APART) else ""
        notes.append(f"tokens trained on: {low:,} to {high:,} (trainings end with a whole batch{apart})")
    return notes
