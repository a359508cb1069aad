"""Everything around a stage function, the same for all stages: look up, lock, run in a child, check, commit."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts import readable
from smoltulu.artifacts.checkpoints import fault, newest_checkpoint
from smoltulu.artifacts.files import remove_tree
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.verify import verify_artifacts
from smoltulu.schemas.artifact import ArtifactReference, FileRecord, Manifest
from smoltulu.schemas.training import TrainingInputs, TrainingSettings
from smoltulu.tasks.engine.environment import drift, environment
from smoltulu.tasks.engine.launch import DISK_ADVICE, StageFailed, run_child
from smoltulu.tasks.engine.sharing import share, share_if_absent, take_over
from smoltulu.tasks.job import Job
from smoltulu.tasks.models.sizes import adapter_size, model_size
from smoltulu.tasks.progress import Progress
from smoltulu.tasks.stage import DATASETS_FOLDER, StageContext
from smoltulu.tasks.trainer.disk import cache_bytes, num_checkpoints_kept, training_bytes
from smoltulu.tasks.trainer.extension import begin_with, extended, find_donor

if TYPE_CHECKING:
    from smoltulu.artifacts.shared.remote import Remote


def run_stage(
    job: Job, store: Store, log: logging.Logger | logging.LoggerAdapter, remote: Remote | None = None
) -> ArtifactReference:
    """Return the artifact of a job: found here, taken from the shared store `remote`, or made now.

    Raises ValueError for what the user must mend (bad data, bad model, disk full), StageFailed for a crash.
    """
    digests = {name: record.digest for name, record in job.input_records.items()}
    found = store.find(job.spec, digests)
    if isinstance(found, Found) and not job.refresh:
        _accept(found, job)
        store.touch(found)
        if remote is not None:
            share_if_absent(found, remote, job.node, log)
        return reference_to(found, job.stage.name, job.node, "Cached")
    asked_for = _generation(found)
    try:
        with store.producer(
            job.spec, lambda whom: log.info("%s: waiting for %s, which makes it", job.node, whom)
        ) as folder:
            found = store.find(job.spec, digests)
            # Another producer may have made it while we waited; a refresh is content with what was made meanwhile.
            if isinstance(found, Found) and (not job.refresh or _generation(found) != asked_for):
                _accept(found, job)
                return reference_to(found, job.stage.name, job.node, "Cached")
            if isinstance(found, Missing):
                if found.damaged:
                    aside = store.quarantine(folder, found.damaged, found.reason)
                    log.warning("%s: %s; set aside as %s and made again", job.node, found.reason, aside.name)
                else:
                    log.info("%s: runs (%s)", job.node, found.reason)
            return _take_or_make(job, store, folder, remote, log)
    except OSError as error:
        if error.errno not in DISK_ADVICE:
            raise
        raise ValueError(
            f"{job.node}: {error.strerror} ({error.filename or store.root}); {DISK_ADVICE[error.errno]}, then run "
            "again: finished stages and whole checkpoints are kept"
        ) from error


def _accept(found: Found, job: Job) -> None:
    """ValueError where a threshold that was changed since would not have let this artifact pass."""
    if objections := job.stage.objections_to(found.manifest, job.config):
        raise ValueError(f"{job.node}: {found.folder} is there, but by today's thresholds: {'; '.join(objections)}")


def _take_or_make(
    job: Job, store: Store, folder: Path, remote: Remote | None, log: logging.Logger | logging.LoggerAdapter
) -> ArtifactReference:
    """The shared artifact where there is one, else one that is made here and shared: one machine makes a key."""
    if remote is None:
        return reference_to(*_make(job, store, folder, log))
    digests = {name: record.digest for name, record in job.input_records.items()}

    def taken() -> Found | None:
        return None if job.refresh else take_over(job.spec, digests, store, remote, job.node, log)

    if (found := taken()) is not None:
        _accept(found, job)
        return reference_to(found, job.stage.name, job.node, "Cached")
    if not remote.writable:
        return reference_to(*_make(job, store, folder, log))
    from smoltulu.artifacts.shared.remote import RemoteError

    with contextlib.ExitStack() as held:
        try:
            lease = held.enter_context(remote.lease(
                job.stage.name, folder.name, lambda whom: log.info("%s: waiting for %s, which makes it", job.node, whom)
            ))  # fmt: skip
        except RemoteError as error:
            log.warning("%s: %s; goes on without the shared store", job.node, error)
            return reference_to(*_make(job, store, folder, log))
        # Looked for again: it may have been made elsewhere before we had the lease, or while we waited for it (None).
        if (found := taken()) is not None:
            _accept(found, job)
            return reference_to(found, job.stage.name, job.node, "Cached")
        made = _make(job, store, folder, log)
        if lease is not None:
            share(made[0], remote, lease, job.node, log)
        return reference_to(*made)


def _make(
    job: Job, store: Store, folder: Path, log: logging.Logger | logging.LoggerAdapter
) -> tuple[Found, str, str, str]:
    """Run the stage and commit what it made; the arguments of `reference_to`. The caller holds the producer's lock."""
    _check_inputs(job, store)
    work = store.open_work(folder)
    if fault(work / DATASETS_FOLDER, full=True) is not None:
        remove_tree(work / DATASETS_FOLDER)
    _begin_with_stored(job, store, work, log)
    _require_disk(job, store.root, work)
    _warn_of_drift(work, job.node, log)
    output = work / "output"
    remove_tree(output)
    output.mkdir()
    # Two clocks: the wall's for people, the monotonic one for the duration, which a clock set back must not spoil.
    started, began = datetime.now(UTC), time.monotonic()
    result = _run_function(job, work, output, log)
    outputs = job.stage.outputs.model_validate(result["outputs"])

    def draft(files: dict[str, FileRecord], digest: str) -> Manifest:
        return Manifest(
            key=folder.name,
            spec=job.spec,
            digest=digest,
            inputs=dict(job.input_records),
            outputs=outputs.model_dump(mode="json"),
            metrics=result["metrics"],
            files=files,
            environment=environment(),
            compute=job.compute.model_dump(mode="json"),
            node=job.node,
            started_at=started.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_seconds=time.monotonic() - began,
            resumed_from_steps=tuple(result["resumed_from_steps"]),
            extends=extended(work),
        )

    made = store.commit(job.spec, output, draft)
    return made, job.stage.name, job.node, "Resumed" if made.manifest.resumed_from_steps else "Completed"


def _begin_with_stored(job: Job, store: Store, work: Path, log: logging.Logger | logging.LoggerAdapter) -> None:
    """Where a training has no checkpoint of its own, lay that of a finished one with a smaller budget into `work`."""
    if job.refresh or newest_checkpoint(work / "checkpoints") is not None:
        return
    digests = {name: record.digest for name, record in job.input_records.items()}
    donor = find_donor(
        store, job.spec, job.config, job.compute, digests, damaged=lambda why: log.warning("%s: %s", job.node, why)
    )
    try:
        begin_with(donor, work)
    except FileNotFoundError:
        log.warning("%s: %s was removed before it could be gone on from", job.node, donor)
        donor = None
        begin_with(None, work)
    if donor is not None:
        log.info("%s: goes on from %s, which had budget %s", job.node, donor, f"{donor.record.num_steps:,}")


def _check_inputs(job: Job, store: Store) -> None:
    """Read every byte that the stage is made from: weights that went bad would spoil, unseen, all that follows."""
    refs = {Ref(record.stage, record.key) for record in job.input_records.values()}
    damaged = []
    for finding in verify_artifacts(Catalogue(store.root), sorted(refs), report_only=False, told=lambda finding: None):
        if finding.status == "damaged":
            damaged.append(f"{finding.ref.stage}/{finding.ref.key[:12]}: {'; '.join(finding.faults)} ({finding.aside})")
    if damaged:
        raise StageFailed(
            f"{job.node}: what it is made from was damaged on disk: {'. '.join(damaged)}. Run again to have that made "
            "again"
        )


def _generation(found: Found | Missing) -> str | None:
    return found.folder.name if isinstance(found, Found) else None


def _warn_of_drift(work: Path, node: str, log: logging.Logger | logging.LoggerAdapter) -> None:
    """Say where unfinished work was begun with other code or packages than it would go on with."""
    file, now = work / "environment.json", environment()
    if newest_checkpoint(work / "checkpoints") is None or not file.exists():
        file.write_text(json.dumps(now))
        return
    try:
        changed = drift(json.loads(file.read_text()), now)
    except (ValueError, AttributeError):
        changed = ["what it was begun with is unreadable"]
    if changed:
        log.warning("%s: goes on from a checkpoint made with other versions: %s", node, ", ".join(changed))


def _run_function(job: Job, work: Path, output: Path, log: logging.Logger | logging.LoggerAdapter) -> dict:
    """Run the stage function in a process of its own (or here, `launcher: inline`); its result as plain JSON values."""
    for name in ("result.json", "error.json"):
        (work / name).unlink(missing_ok=True)
    if job.compute.launcher == "inline":
        context = StageContext(output, work, job.compute, Progress(job.node, log))
        outputs, metrics = job.stage.function(job.config, job.inputs, context)
        result: dict[str, Any] = {"outputs": outputs.model_dump(mode="json"), "metrics": metrics}
    else:
        run_child(job, work, output, log)
        result = json.loads((work / "result.json").read_text())
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
    num_kept = num_checkpoints_kept(job.compute, job.config.is_extendable)
    size, lora = model_size(Path(inputs.model)), getattr(job.config, "lora", None)
    adapter = adapter_size(size, lora.r) if lora else None
    whole = training_bytes(size, cache_bytes(Path(inputs.dataset)), num_kept, adapter)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = whole - there
    if free < needed:
        raise ValueError(
            f"{job.node} needs {readable.size(needed)} more for checkpoints and rows, {readable.size(free)} are "
            f"free under {root}; free some (`smoltulu gc` shows what may go), name another compute.store, or lower "
            "compute.save_total_limit"
        )


def reference_to(found: Found, stage: str, node: str, outcome: str) -> ArtifactReference:
    """What tasks pass on about an artifact of the store."""
    manifest = found.manifest
    return ArtifactReference(
        stage=stage,
        node=node,
        key=manifest.key,
        digest=manifest.digest,
        path=str(found.folder),
        outcome=outcome,
        outputs=manifest.outputs,
        metrics=manifest.metrics,
    )
