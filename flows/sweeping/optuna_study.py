"""Cells of a sweep as Optuna studies in a journal file, for its dashboard; and the trials of a study as scores, for us.

A journal is JSON lines. A budget, size and arm is a study of its own: a plot over its two parameters shows one surface.
Repeats are trials with equal parameters; what tells them apart (seed, keys, state) is in their attributes.

Optuna is the extra `smoltulu[optuna]`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smoltulu.flows.sweeping.scores import TaskScores, load_scores
from smoltulu.flows.sweeping.states import CellState
from smoltulu.schemas.common import printable
from smoltulu.schemas.sweep import MAX_EXPONENT, SweepSettings
from smoltulu.tasks.surface.optimum import Cells

if TYPE_CHECKING:
    import optuna

_RATE, _BATCH = "learning_rate", "effective_batch_size"
_MAX_BYTES = 200_000_000


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("Optuna is not installed; `pip install 'smoltulu[optuna]'` adds it") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(file: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))


def metric_names(sweep: SweepSettings) -> list[str]:
    """Of the objectives of a study, in their order."""
    return [f"{one.task} {one.metric}" for one in sweep.tasks]


def directions(sweep: SweepSettings) -> list[str]:
    """Of the objectives of a study, in their order."""
    return ["minimize" if one.lower_is_better else "maximize" for one in sweep.tasks]


def export_study(sweep: SweepSettings, store_root: Path, states: Sequence[CellState], file: Path) -> int:
    """Write a new journal with the cells that ended; returns the number of trials.

    Done is COMPLETE; diverged and failed are FAIL, told apart by the attribute `state`.

    Raises:
        ValueError: a file that is there, no such folder, no cell that ended; Optuna is not installed.
    """
    optuna = _optuna()
    if file.exists():
        raise ValueError(f"{file} is there already; name a new file, or remove it")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder; make it, or name another")
    ended = [one for one in states if one.state in ("done", "diverged", "failed")]
    values: dict[Any, list[float]] = defaultdict(list)
    for arm in dict.fromkeys(one.cell.place.arm for one in ended if one.state == "done"):
        for of_task in load_scores(sweep, store_root, states, arm):
            for cell, mean in zip(of_task.of, of_task.means, strict=True):
                values[cell.place].append(float(mean))
    if not ended:
        raise ValueError(f"sweep {sweep.name}: no cell has ended yet; run it first")
    surfaces: dict[tuple[int, str, str], list[CellState]] = defaultdict(list)
    for one in ended:
        surfaces[one.cell.place.max_tokens, one.cell.place.size, one.cell.place.arm].append(one)
    # Under another name until it is whole: a command that is killed leaves no journal that looks like all cells.
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        for (max_tokens, size, arm), cells in surfaces.items():
            study = optuna.create_study(
                storage=_storage(partial),
                study_name=f"{sweep.name} {max_tokens} {size} {arm}",
                directions=directions(sweep),
            )
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                study.set_metric_names(metric_names(sweep))
            about: dict[str, Any] = {"sweep": sweep.name, "recipe": sweep.recipe, "stage": sweep.stage}
            about |= {"size": size, "arm": arm, "max_tokens": max_tokens}
            about["classes"] = {one.task: one.task_class for one in sweep.tasks}
            for name, value in about.items():
                study.set_user_attr(name, value)
            study.add_trials(_trials(cells, values))
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return len(ended)


def _trials(cells: Sequence[CellState], values: dict[Any, list[float]]) -> list[optuna.trial.FrozenTrial]:
    """One trial a cell; all have the same distributions, as Optuna asks of a study."""
    import optuna

    at = [one.cell.place for one in cells]
    rates, batches = [one.learning_rate for one in at], [one.effective_batch_size for one in at]
    spaces = {
        _RATE: optuna.distributions.FloatDistribution(min(rates), max(rates), log=True),
        _BATCH: optuna.distributions.IntDistribution(min(batches), max(batches), log=True),
    }
    made = []
    for one in cells:
        place, is_done = one.cell.place, one.state == "done"
        told = {"seed": place.seed, "cell": place.name, "block": one.cell.block, "state": one.state}
        told |= {"training": one.cell.training, "evaluation": one.cell.evaluation}
        made.append(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if is_done else optuna.trial.TrialState.FAIL,
                values=values[place] if is_done else None,
                params={_RATE: place.learning_rate, _BATCH: place.effective_batch_size},
                distributions=spaces,
                user_attrs=told | ({"message": one.message} if one.message else {}),
            )
        )
    return made


def import_study(sweep: SweepSettings, file: Path, study: str | None = None) -> list[TaskScores]:
    """The finished trials of a study, or of all studies of arm main in a journal, as scores of the sweep's tasks.

    A trial that is FAIL with the attribute `state: diverged` ranks last; other failures, and trials that are not over,
    are left out. A trial has one score a task: no items are resampled. Without an attribute `seed`, repeats of the same
    parameters are numbered.

    Raises:
        ValueError: no such file or study; other parameters, directions or metrics than the sweep's; no budget; no
            trial that is complete.
    """
    optuna = _optuna()
    if not file.is_file():
        raise ValueError(f"{file} is no file; name the journal file of an Optuna study")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; {_MAX_BYTES:,} are read at most")
    try:
        storage = _storage(file)
        names = [one.study_name for one in storage.get_all_studies()]
        wanted = names if study is None else [study]
        if study is not None and study not in names:
            raise ValueError(f"it has no study {study!r}; its studies: {', '.join(names) or 'none'}")
        studies = [optuna.load_study(study_name=name, storage=storage) for name in wanted]
        # Another arm is another surface.
        studies = [one for one in studies if study is not None or one.user_attrs.get("arm", "main") == "main"]
        rows = [row for one in studies for row in _rows(sweep, one)]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        OSError,
        RecursionError,
        OverflowError,
    ) as error:
        is_said = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
        said = str(error) if is_said else f"no journal of an Optuna study ({type(error).__name__}: {error})"
        raise ValueError(f"{file}: {printable(said)[:500]}") from None
    if not any(row["values"] for row in rows):
        raise ValueError(f"{file}: no trial of {', '.join(wanted) or 'no study'} is complete; nothing can be judged")
    return _as_scores(sweep, rows)


def _rows(sweep: SweepSettings, study: optuna.study.Study) -> list[dict[str, Any]]:
    named = f"study {study.study_name!r}"
    got, want = [one.name.lower() for one in study.directions], directions(sweep)
    if got != want:
        raise ValueError(f"{named} has the directions {got}; those of the sweep's tasks, in their order, are {want}")
    if study.metric_names and study.metric_names != (known := metric_names(sweep)):
        raise ValueError(
            f"{named} has the metrics {study.metric_names}; those of the sweep, in their order, are {known}"
        )
    max_tokens, size = study.user_attrs.get("max_tokens"), study.user_attrs.get("size", "base")
    if not _is_whole(max_tokens) or max_tokens < 1:
        raise ValueError(
            f"{named} does not say its budget; study.set_user_attr('max_tokens', 64000000) does so, for 64 M tokens"
        )
    if size not in sweep.sizes:
        raise ValueError(f"{named} is of size {size!r}; those of {sweep.name} are {', '.join(sweep.sizes)}")
    repeats: Counter[tuple[float, float]] = Counter()
    rows = []
    for trial in study.trials:
        if trial.params.keys() != {_RATE, _BATCH} and (trial.params or trial.state.name == "COMPLETE"):
            raise ValueError(
                f"{named}, trial {trial.number} has the parameters {sorted(trial.params)}; a sweep has {_RATE} and "
                f"{_BATCH} (other budgets and arms are studies of their own)"
            )
        diverged = trial.state.name == "FAIL" and trial.user_attrs.get("state") == "diverged"
        if not diverged and trial.state.name != "COMPLETE":
            continue
        rate, batch = trial.params[_RATE], trial.params[_BATCH]
        if not all(_is_number(one) and 2.0**-MAX_EXPONENT <= one <= 2.0**MAX_EXPONENT for one in (rate, batch)):
            raise ValueError(
                f"{named}, trial {trial.number}: learning rate {rate!r} and batch {batch!r} must be above 0: numbers "
                f"from 2^-{MAX_EXPONENT} to 2^{MAX_EXPONENT}"
            )
        at = math.log2(rate), math.log2(batch)
        seed = trial.user_attrs.get("seed", repeats[at])
        repeats[at] += 1
        if not _is_whole(seed):
            raise ValueError(f"{named}, trial {trial.number}: the attribute seed is {seed!r}; give a whole number")
        values = [] if diverged else list(trial.values or ())
        if not diverged and (len(values) != len(want) or not all(map(_is_number, values))):
            raise ValueError(
                f"{named}, trial {trial.number} has the scores {values}; give {len(want)} finite numbers, one a task"
            )
        rows.append({"at": at, "seed": seed, "max_tokens": max_tokens, "size": size, "values": values})
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    """Whether it is an integer that an array can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def _as_scores(sweep: SweepSettings, rows: Sequence[dict[str, Any]]) -> list[TaskScores]:
    diverged = np.array([not row["values"] for row in rows])
    made = []
    for number, task in enumerate(sweep.tasks):
        means = np.array([row["values"][number] if row["values"] else math.nan for row in rows])
        sign = -1.0 if task.lower_is_better else 1.0
        cells = Cells(
            log2_lr=np.array([row["at"][0] for row in rows]),
            log2_batch=np.array([row["at"][1] for row in rows]),
            log2_tokens=np.log2([row["max_tokens"] for row in rows]),
            log2_size=np.array([math.log2(sweep.sizes[row["size"]].num_parameters or 1) for row in rows]),
            seed=np.array([row["seed"] for row in rows]),
            diverged=diverged,
            items=sign * means[:, None],
        )
        made.append(TaskScores(task, cells, means, ()))
    return made
