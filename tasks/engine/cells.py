"""Cells: artifacts that another one is put together of. Those that are there are taken, the others made in one process.

What is made of a cell is in the work of its own key: whoever asks for it next goes on from there, under whatever node.
A cell's spec names what it reads by content (`externals`). So it is looked up by its key alone: the artifact that holds
the same weights today, with another log beside them, makes it neither stale nor its unfinished work another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from smoltulu.artifacts.files import remove_tree
from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.store import WAITING, Found, Log, Missing, Store
from smoltulu.schemas.artifact import FileRecord, InputRecord, Manifest
from smoltulu.tasks.engine.checks import check_inputs, manifest_of
from smoltulu.tasks.engine.child import RESULT_FILE, run_cells
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.progress import Progress


def cells_there(job: Job, store: Store) -> dict[str, Found | Missing]:
    """Name -> the finished cell of a job, here or in the shared store; else why it is to be made. Makes nothing.

    A shared cell that is not here has the store's root for a folder. Imports no torch.

    Raises:
        ValueError, OSError: as `Stage.cells`.
        RemoteError: the shared store cannot be asked.
    """
    assert job.stage.cells is not None
    there: dict[str, Found | Missing] = {}
    for name, cell in job.stage.cells(job).items():
        there[name] = found = store.find(cell.spec)
        if isinstance(found, Missing) and (manifest := store.published(cell.spec, {})) is not None:
            there[name] = Found(manifest, store.root)
    return there


def with_cells(job: Job, store: Store, work: Path, log: Log) -> Job:
    """A job with its cells among its inputs; those that are missing are made. `work`: of the job, which is locked.

    Raises:
        ValueError: what the user must fix. Cells that were finished before stay.
        StageFailed: as `run_child`.
    """
    assert job.stage.cells is not None
    cells: Mapping[str, Job] = job.stage.cells(job)
    found: dict[str, Found] = {}
    if not job.refresh:
        for name, cell in cells.items():
            if (one := store.obtain(cell.spec, {}, cell.node, log)) is not None:
                found[name] = one
                store.share(one, cell.node, log)
    if missing := {name: cell for name, cell in cells.items() if name not in found}:
        if found:
            log.info("%s: %s there; to measure: %s", job.node, ", ".join(found), ", ".join(missing))
        check_inputs(job, store)
        found |= _make(job, missing, store, work, log)
    records = {
        f"cells.{name}": InputRecord(stage=one.manifest.spec.stage, key=one.manifest.key, digest=one.manifest.digest)
        for name in cells
        if (one := found[name])
    }
    folders = {name: str(found[name].folder) for name in cells}
    return dataclasses.replace(
        job,
        inputs=job.inputs.model_copy(update={"cells": folders}),
        input_records={**job.input_records, **records},
    )


def _make(job: Job, cells: Mapping[str, Job], store: Store, work: Path, log: Log) -> dict[str, Found]:
    """Make cells in one process, and commit each that is finished, also where another one fails."""
    made: dict[str, Found] = {}
    with contextlib.ExitStack() as held:
        opened: dict[str, Path] = {}
        # All in one order, so that two evaluations that want the same cells never wait for each other.
        for name, cell in sorted(cells.items(), key=lambda item: artifact_key(item[1].spec)):
            if cell.spec in [cells[other].spec for other in opened]:
                continue  # asked for twice
            before = store.find(cell.spec)
            folder = held.enter_context(store.producer(cell.spec, partial(log.info, WAITING, cell.node)))
            found = store.find(cell.spec)
            # Another producer may have made it while we waited; a refresh is content with that.
            if isinstance(found, Found) and (not job.refresh or found != before):
                made[name] = found
                continue
            if isinstance(found, Missing) and found.damaged:
                aside = store.quarantine(folder, found.damaged, found.reason)
                log.warning("%s: %s; set aside as %s and made again", cell.node, found.reason, aside.name)
            opened[name] = store.open_work(
                folder,
                {},
                lambda why, node=cell.node: log.warning("%s: %s", node, why),  # type: ignore[misc]
            )
        try:
            _run(job, {name: (cells[name], own) for name, own in opened.items()}, work, log)
        finally:
            for name, own in opened.items():
                if (own / RESULT_FILE).exists():
                    made[name] = _commit(cells[name], own, store, log)
    by_spec = {artifact_key(cells[name].spec): one for name, one in made.items()}
    return {name: by_spec[artifact_key(cell.spec)] for name, cell in cells.items()}


def _run(job: Job, cells: Mapping[str, tuple[Job, Path]], work: Path, log: Log) -> None:
    """Run the cells that have no result yet."""
    descriptions = []
    for name, (cell, own) in cells.items():
        if not (own / RESULT_FILE).exists():
            remove_tree(own / "output")
            (own / "output").mkdir()
            descriptions.append(_description(name, cell, own))
    if not descriptions:
        return
    stage, config = next((cell.stage, cell.config) for cell, _ in cells.values())
    if job.compute.launcher == "inline":
        run_cells(
            stage,
            {"compute": job.compute.model_dump(mode="json"), "cells": descriptions},
            Progress(job.node, log),
        )
    else:
        run_child(dataclasses.replace(job, stage=stage, config=config), work, work / "output", log, descriptions)


def _description(name: str, cell: Job, work: Path) -> dict[str, Any]:
    return {
        "name": name,
        "config": cell.config.model_dump(mode="json"),
        "inputs": cell.inputs.model_dump(mode="json"),
        "externals": dict(cell.spec.externals),
        "folder": str(work / "output"),
        "work": str(work),
    }


def _commit(cell: Job, work: Path, store: Store, log: Log) -> Found:
    result = json.loads((work / RESULT_FILE).read_text())
    seconds = float(result["seconds"])

    def draft(files: dict[str, FileRecord], digest: str) -> Manifest:
        return manifest_of(cell, files, digest, result, datetime.now(UTC) - timedelta(seconds=seconds), seconds)

    made = store.commit(cell.spec, work / "output", draft)
    store.share(made, cell.node, log)
    return made
