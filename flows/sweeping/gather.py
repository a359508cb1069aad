"""Everything that a sweep has measured so far: states of its cells, and the scores of every arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.scores import TaskScores, load_scores
from smoltulu.flows.sweeping.states import CellRecord, CellState, State, remembered, states_of, sweep_folder
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.sweep import Place, SweepSettings, places
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.surface.analysis import Analysis, analyse


@dataclass(frozen=True)
class Cell:
    """A place with its state. `record` is None where no run has asked for it yet."""

    place: Place
    block: str
    state: State
    message: str
    record: CellRecord | None


@dataclass(frozen=True)
class Training:
    """What is known of a cell's training beside its place; None where it was not made."""

    weight_decay: float | None = None
    reduction: str | None = None
    num_steps: int | None = None
    num_tokens: int | None = None

    @property
    def tokens_a_step(self) -> float | None:
        """Effective batch in tokens."""
        return self.num_tokens / self.num_steps if self.num_tokens and self.num_steps else None


@dataclass(frozen=True)
class Gathered:
    """What a sweep has measured.

    cells    in the order of the sweep, then those that an earlier grid had
    scores   arm -> its tasks, in the order of the sweep; arms without a finished cell are not there
    notes    what was passed over, and why
    """

    sweep: SweepSettings
    store_root: Path
    cells: tuple[Cell, ...]
    scores: Mapping[str, list[TaskScores]]
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return sweep_folder(self.store_root, self.sweep.name)

    def analyses(self) -> tuple[Analysis, ...]:
        """What is said of every arm, `main` first where it is there."""
        is_scan = self.sweep.kind == "scan"
        arms = sorted(self.scores, key=lambda arm: (arm != "main", list(self.sweep.arms).index(arm)))
        return tuple(analyse(arm, [(one.task, one.cells) for one in self.scores[arm]], is_scan=is_scan) for arm in arms)


def gather(sweep: SweepSettings, store_root: Path) -> Gathered:
    """Read what there is. Nothing is run.

    Raises:
        ValueError: the sweep was never run in this store; scores that do not belong together.
    """
    folder = sweep_folder(store_root, sweep.name)
    known = {record.place: record for record in remembered(folder)}
    asked = places(sweep)
    notes = []
    others = [place for place in known if place not in asked]
    if foreign := {place for place in others if place.size not in sweep.sizes or place.arm not in sweep.arms}:
        notes.append(f"{len(foreign)} cells of an earlier grid are of a size or arm that the sweep has no more")
    shown = [place for place in [*asked, *others] if place in known and place not in foreign]
    states = dict(zip(shown, states_of(store_root, folder, [known[place] for place in shown]), strict=True))
    states, problems = _without_strangers(sweep, store_root, states, set(asked))
    notes += problems
    cells = [_cell(place, asked.get(place), states.get(place)) for place in [*asked, *others] if place not in foreign]
    scores = {}
    for arm in sweep.arms:
        of_arm = [one for place, one in states.items() if place.arm == arm]
        if any(one.state == "done" for one in of_arm):
            scores[arm] = load_scores(sweep, store_root, of_arm, arm)
    made = [cell for cell in cells if cell.block or cell.place in states]
    return Gathered(sweep, store_root, tuple(made), scores, tuple(notes))


def _without_strangers(
    sweep: SweepSettings, store_root: Path, states: dict[Place, CellState], asked: set[Place]
) -> tuple[dict[Place, CellState], list[str]]:
    """Without finished cells of an earlier grid whose scores do not fit: they were measured otherwise."""
    others = [one for place, one in states.items() if place not in asked and one.state == "done"]
    ours = next((one for place, one in states.items() if place in asked and one.state == "done"), None)
    dropped: dict[Place, str] = {}
    for one in others:
        try:
            with_ours = [CellState(two.cell, "done") for two in (ours, one) if two is not None]
            same = [
                CellState(two.cell.model_copy(update={"place": _at(two, n)}), "done") for n, two in enumerate(with_ours)
            ]
            load_scores(sweep, store_root, same, "main")
        except ValueError as error:
            dropped[one.cell.place] = str(error)
    notes = []
    if dropped:
        place, why = next(iter(dropped.items()))
        notes.append(f"{len(dropped)} cells of an earlier grid are not shown, the first is {place.name}: {why}")
    return {place: one for place, one in states.items() if place not in dropped}, notes


def _at(one: CellState, seed: int) -> Place:
    return one.cell.place.model_copy(update={"arm": "main", "seed": seed})


def _cell(place: Place, block: str | None, state: CellState | None) -> Cell:
    if state is None:
        return Cell(place, block or "", "pending", "", None)
    return Cell(place, block or state.cell.block, state.state, state.message, state.cell)


def training_of(store_root: Path, cell: Cell) -> Training:
    """Steps, tokens and the settings that change what a learning rate means, from the manifest of the training."""
    if cell.record is None:
        return Training()
    folder = layout.key_path(store_root, cell.record.stage, cell.record.training)
    try:
        pointer = layout.read_pointer(folder)
        manifest = read_manifest(folder / pointer.name) if pointer is not None else None
    except (OSError, ValueError):
        return Training()
    return Training() if manifest is None else _training(cell.record.stage, manifest)


def _training(stage: str, manifest: Manifest) -> Training:
    config, outputs = manifest.spec.config, manifest.outputs

    def number(values: Mapping[str, Any], name: str) -> Any:
        value = values.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    settings = STAGES[stage].config
    loss = config.get("loss_type") if issubclass(settings, RLVRSettings) else None
    return Training(
        number(config, "weight_decay"),
        f"{loss} (TRL)" if loss else getattr(settings, "reduction", None),
        number(outputs, "num_steps"),
        number(outputs, "num_tokens"),
    )
