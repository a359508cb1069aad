"""In which state the cells of a sweep are, from what its runs wrote down and what lies in the store.

`<store>/../sweeps/<name>/` holds `cells.json`, the keys of every cell that was ever asked for, and `outcomes/`, a file
for every cell that ended without an artifact: a failed one by the key of its evaluation, a diverged one by that of its
training, so that another evaluation finds it. Remove the file of a diverged cell to run it again. No graph is built to
read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from smoltulu.artifacts import layout
from smoltulu.artifacts.files import private_folder, read_plain, write_atomically
from smoltulu.artifacts.locks import is_held, open_lock, take
from smoltulu.flows.sweeping.grid import SweepCell
from smoltulu.schemas.common import StrictModel, first_problem
from smoltulu.schemas.run import Key, StageName
from smoltulu.schemas.sweep import Place
from smoltulu.tasks.evaluation.stage import evaluation

State = Literal["pending", "running", "failed", "diverged", "done"]
_MAX_BYTES = 100_000_000


class CellRecord(StrictModel):
    """A cell as its sweep remembers it."""

    place: Place
    block: str
    stage: StageName = Field(description="of the training")
    training: Key
    evaluation: Key


class Outcome(StrictModel):
    """How a cell ended that has no scores."""

    state: Literal["failed", "diverged"]
    message: str
    ended_at: str = Field(description="UTC, ISO 8601")


@dataclass(frozen=True)
class CellState:
    """A cell, its state, and the message of one that ended without scores."""

    cell: CellRecord
    state: State
    message: str = ""


_CELLS = TypeAdapter(tuple[CellRecord, ...])


def sweep_folder(store_root: Path, name: str) -> Path:
    """Where a sweep writes down what it knows."""
    return store_root.parent / "sweeps" / name


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold what a sweep wrote down, to read it and write it anew: two runs at once would lose what the other adds."""
    private_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    with open_lock(folder / "lock") as lock:
        take(lock.fileno(), lambda: None)
        yield


def records_of(cells: Iterable[SweepCell]) -> list[CellRecord]:
    """What is written down of cells."""
    return [
        CellRecord(
            place=cell.place,
            block=cell.block,
            stage=cell.graph.nodes[cell.training].stage.name,
            training=cell.keys[0],
            evaluation=cell.keys[1],
        )
        for cell in cells
    ]


def remember(store_root: Path, folder: Path, cells: Iterable[SweepCell]) -> list[CellRecord]:
    """Write down the cells that a run asks for; those that an earlier one asked for stay. Errors: `check_unchanged`."""
    asked = records_of(cells)
    with alone(folder):
        known = check_unchanged(store_root, folder, asked) | {record.place: record for record in asked}
        (folder / "outcomes").mkdir(exist_ok=True)
        write_atomically(folder / "cells.json", _CELLS.dump_json(tuple(known.values())).decode())
    return asked


def check_unchanged(store_root: Path, folder: Path, asked: Iterable[CellRecord]) -> dict[Place, CellRecord]:
    """The cells that are remembered, by their places.

    ValueError where one that has ended is another training now: one surface would hold two recipes.
    """
    known = {record.place: record for record in remembered(folder)} if (folder / "cells.json").exists() else {}
    others = [known[one.place] for one in asked if one.place in known and known[one.place].training != one.training]
    ended = [one.cell for one in states_of(store_root, folder, others) if one.state in ("done", "diverged")]
    if ended:
        raise ValueError(
            f"sweep {folder.name}: {len(ended)} of its cells have ended and would be other trainings now, the first is "
            f"{ended[0].place.name}; take back what was changed (recipe, overrides, size or arm), or give the sweep "
            "another name: what is equal is found again"
        )
    return known


def remembered(folder: Path) -> tuple[CellRecord, ...]:
    """The cells of a sweep. ValueError where it was never run, or its record is of another form."""
    file = folder / "cells.json"
    try:
        return _CELLS.validate_json(read_plain(file, _MAX_BYTES))
    except FileNotFoundError:
        raise ValueError(f"sweep {folder.name} was never run in this store ({folder}); run it first") from None
    except (OSError, ValidationError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{file}: {why}; remove the file and run the sweep again: finished cells are kept") from None


def write_outcome(folder: Path, cell: CellRecord, state: Literal["failed", "diverged"], message: str) -> None:
    """Write down that a cell ended without scores."""
    key = cell.training if state == "diverged" else cell.evaluation
    outcome = Outcome(state=state, message=message[:4000], ended_at=datetime.now(UTC).isoformat(timespec="seconds"))
    write_atomically(folder / "outcomes" / f"{key}.json", outcome.model_dump_json())


def forget_outcome(folder: Path, cell: CellRecord) -> None:
    """A cell runs again."""
    for key in (cell.training, cell.evaluation):
        (folder / "outcomes" / f"{key}.json").unlink(missing_ok=True)


def outcome_of(folder: Path, cell: CellRecord) -> Outcome | None:
    """How a cell ended without scores; None where it did not, or where its file cannot be read: then it runs again."""
    for key in (cell.training, cell.evaluation):
        with contextlib.suppress(OSError, ValueError):
            return Outcome.model_validate_json(read_plain(folder / "outcomes" / f"{key}.json", 1_000_000))
    return None


def states_of(store_root: Path, folder: Path, cells: Iterable[CellRecord]) -> list[CellState]:
    """The state of every cell. Scores in the store count more than what was written down before them."""
    ended = {path.stem for path in (folder / "outcomes").glob("*.json")}
    return [_state(store_root, folder, cell, ended) for cell in cells]


def known_states(store_root: Path, folder: Path, wanted: Iterable[Place]) -> dict[Place, CellState | None]:
    """The state of every place as its last run remembers it; None where no run has asked for it yet."""
    known = {record.place: record for record in remembered(folder)} if (folder / "cells.json").exists() else {}
    found = list(wanted)
    asked = states_of(store_root, folder, [known[place] for place in found if place in known])
    state_of = {one.cell.place: one for one in asked}
    return {place: state_of.get(place) for place in found}


def _state(store_root: Path, folder: Path, cell: CellRecord, ended: set[str]) -> CellState:
    of_evaluation = layout.key_path(store_root, evaluation.name, cell.evaluation)
    if _is_finished(of_evaluation):
        return CellState(cell, "done")
    if {cell.training, cell.evaluation} & ended and (outcome := outcome_of(folder, cell)) is not None:
        return CellState(cell, outcome.state, outcome.message)
    of_training = layout.key_path(store_root, cell.stage, cell.training)
    is_running = any(is_held(path / layout.LOCK) for path in (of_training, of_evaluation))
    return CellState(cell, "running" if is_running else "pending")


def _is_finished(path: Path) -> bool:
    """Whether a generation is there; a pointer alone is left where one was removed or set aside."""
    try:
        pointer = layout.read_pointer(path)
        return pointer is not None and (path / pointer.name / layout.MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def counts_of(states: Iterable[CellState | None]) -> dict[State, int]:
    """Number of cells in each state, all of them named. None: one that no run has asked for, which is pending."""
    counts: dict[State, int] = {"done": 0, "diverged": 0, "running": 0, "pending": 0, "failed": 0}
    for one in states:
        counts[one.state if one else "pending"] += 1
    return counts


def counted(counts: dict[State, int]) -> str:
    """In words, without what there is none of."""
    return ", ".join(f"{number:,} {state}" for state, number in counts.items() if number) or "no cells"
