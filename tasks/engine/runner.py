"""Everything around a stage function, the same for all stages: look up, lock, run in a child, check, commit."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from smoltulu.artifacts import readable
from smoltulu.artifacts.checkpoints import fault, newest_checkpoint
from smoltulu.artifacts.files import remove_tree
from smoltulu.artifacts.layout import CHECKPOINTS
from smoltulu.artifacts.store import WAITING, Found, Log, Missing, Store
from smoltulu.schemas.artifact import ArtifactReference, FileRecord, Manifest
from smoltulu.schemas.training import TrainingInputs, TrainingSettings
from smoltulu.tasks.engine.cells import with_cells
from smoltulu.tasks.engine.checks import check_inputs, manifest_of
from smoltulu.tasks.engine.child import RESULT_FILE
from smoltulu.tasks.engine.environment import drift, environment
from smoltulu.tasks.engine.launch import DISK_ADVICE, run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.progress import Progress
from smoltulu.tasks.stage import DATASETS_FOLDER, StageContext
from smoltulu.tasks.trainer.disk import disk_of_training
from smoltulu.tasks.trainer.extension import begin_with, extended, find_source_run


def run_stage(job: Job, store: Store, log: Log) -> ArtifactReference:
    """Return the artifact of a job: found here, taken from a shared store, or made now.

    Raises ValueError for what the user must fix (bad data, bad model, disk full), StageFailed for a crash.
    """
    digests = job.input_digests
    found = store.find(job.spec, digests)
    if isinstance(found, Found) and not job.refresh:
        cached = _cached(found, job)
        store.touch(found)
        store.share(found, job.node, log)
        return cached
    before = found
    try:
        with store.producer(job.spec, partial(log.info, WAITING, job.node)) as folder:
            found = store.find(job.spec, digests)
            # Another producer may have made it while we waited; a refresh is content with what was made meanwhile.
            if isinstance(found, Found) and (not job.refresh or found != before):
                return _cached(found, job)
            if isinstance(found, Missing):
                if found.damaged:
                    aside = store.quarantine(folder, found.damaged, found.reason)
                    log.warning("%s: %s; set aside as %s and made again", job.node, found.reason, aside.name)
                else:
                    log.info("%s: runs (%s)", job.node, found.reason)
            make = partial(_make, job, store, folder, log)
            made, is_new = store.make_once(job.spec, digests, job.node, log, job.refresh, make)
            if not is_new:
                return _cached(made, job)
            return reference_to(made, job.node, "Resumed" if made.manifest.resumed_from_steps else "Completed")
    except OSError as error:
        if error.errno not in DISK_ADVICE:
            raise
        raise ValueError(
            f"{job.node}: {error.strerror} ({error.filename or store.root}); {DISK_ADVICE[error.errno]}, then run "
            "again: finished stages and whole checkpoints are kept"
        ) from error


def _cached(found: Found, job: Job) -> ArtifactReference:
    """ValueError where its outputs are not the stage's, or a threshold that was changed since would have refused it."""
    job.stage.outputs_of(found.manifest)
    if failures := job.stage.gate_failures_of(found.manifest, job.config):
        raise ValueError(f"{job.node}: {found.folder} is there, but by today's thresholds: {'; '.join(failures)}")
    return reference_to(found, job.node, "Cached")


def _make(job: Job, store: Store, folder: Path, log: Log) -> Found:
    """Run the stage and commit what it made. The caller holds the producer's lock."""
    if job.stage.cells is None:  # else its cells read them, where any is to be made
        check_inputs(job, store)
    work = store.open_work(folder, job.input_digests, lambda why: log.warning("%s: %s", job.node, why))
    if fault(work / DATASETS_FOLDER, full=True) is not None:
        remove_tree(work / DATASETS_FOLDER)
    _begin_with_stored(job, store, work, log)
    _require_disk(job, store.root, work)
    _warn_of_drift(work, job.node, log)
    output = work / "output"
    remove_tree(output)
    output.mkdir()
    # Two clocks: the wall's for people, the monotonic one for the duration, which a clock set back must not distort.
    started, began = datetime.now(UTC), time.monotonic()
    if job.stage.cells is not None:
        job = with_cells(job, store, work, log)
        check_inputs(job, store, only="cells.")
    result = _run_function(job, work, output, log)

    def draft(files: dict[str, FileRecord], digest: str) -> Manifest:
        seconds = time.monotonic() - began
        manifest = manifest_of(job, files, digest, result, started, seconds)
        return manifest.model_copy(
            update={"resumed_from_steps": tuple(result["resumed_from_steps"]), "extends": extended(work)}
        )

    return store.commit(job.spec, output, draft)


def _begin_with_stored(job: Job, store: Store, work: Path, log: Log) -> None:
    """Where a training has no checkpoint of its own, lay that of a finished one with a smaller budget into `work`."""
    if job.refresh or newest_checkpoint(work / CHECKPOINTS) is not None:
        return
    source_run = find_source_run(
        store,
        job.spec,
        job.config,
        job.compute,
        job.input_digests,
        damaged=lambda why: log.warning("%s: %s", job.node, why),
    )
    try:
        begin_with(source_run, work)
    except FileNotFoundError:
        log.warning("%s: %s was removed before this training could resume from it", job.node, source_run)
        source_run = None
        begin_with(None, work)
    if source_run is not None:
        log.info("%s: goes on from %s, which had budget %s", job.node, source_run, f"{source_run.record.num_steps:,}")


def _warn_of_drift(work: Path, node: str, log: Log) -> None:
    """Say where unfinished work was begun with other code or packages than it would go on with."""
    file, now = work / "environment.json", environment()
    if newest_checkpoint(work / CHECKPOINTS) is None or not file.exists():
        file.write_text(json.dumps(now))
        return
    try:
        changed = drift(json.loads(file.read_text()), now)
    except (ValueError, AttributeError):
        changed = ["what it was begun with is unreadable"]
    if changed:
        log.warning("%s: goes on from a checkpoint made with other versions: %s", node, ", ".join(changed))


def _run_function(job: Job, work: Path, output: Path, log: Log) -> dict:
    """Run the stage function in a process of its own (or here, `launcher: inline`); its result as plain JSON values."""
    (work / RESULT_FILE).unlink(missing_ok=True)
    if job.compute.launcher == "inline" or job.stage.cells is not None:
        context = StageContext(output, work, job.compute, Progress(job.node, log), job.spec.externals)
        outputs, metrics = job.stage.function(job.config, job.inputs, context)
        result: dict[str, Any] = {"outputs": outputs.model_dump(mode="json"), "metrics": metrics}
    else:
        run_child(job, work, output, log)
        result = json.loads((work / RESULT_FILE).read_text())
    resumes = work / "resumed.jsonl"
    lines = resumes.read_text(errors="replace").split() if resumes.exists() else []
    result["resumed_from_steps"] = [int(line) for line in lines if line.isdecimal()]
    return result


def _require_disk(job: Job, root: Path, work: Path) -> None:
    """Refuse to start a stage that the disk would stop half-way: computed for trainings, `min_free_disk_gb` for all."""
    free = shutil.disk_usage(root).free
    if free < job.compute.min_free_disk_gb * 1e9:
        raise ValueError(
            f"{readable.size(free)} free under {root}, compute.min_free_disk_gb asks for "
            f"{job.compute.min_free_disk_gb:g}; free some space, or lower it if you know that the stage needs less"
        )
    if not job.stage.is_training:
        return
    inputs = job.inputs
    assert isinstance(inputs, TrainingInputs)
    assert isinstance(job.config, TrainingSettings)
    whole = disk_of_training(job.config, Path(inputs.model), Path(inputs.dataset), job.compute)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = whole - there
    if free < needed:
        raise ValueError(
            f"{job.node} needs {readable.size(needed)} more for checkpoints and rows, {readable.size(free)} are "
            f"free under {root}; free some (`smoltulu gc` shows what may go), name another compute.store, or lower "
            "compute.save_total_limit"
        )


def reference_to(found: Found, node: str, outcome: str) -> ArtifactReference:
    """What tasks pass on about an artifact of the store."""
    manifest = found.manifest
    return ArtifactReference(
        stage=manifest.spec.stage,
        node=node,
        key=manifest.key,
        digest=manifest.digest,
        path=str(found.folder),
        outcome=outcome,
        outputs=manifest.outputs,
        metrics=manifest.metrics,
    )
