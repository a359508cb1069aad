"""What every stage is checked for before and after its function runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.verify import verify_artifacts
from smoltulu.schemas.artifact import FileRecord, Manifest
from smoltulu.tasks.engine.environment import environment
from smoltulu.tasks.engine.launch import StageFailed
from smoltulu.tasks.job import Job


def check_inputs(job: Job, store: Store, only: str = "") -> None:
    """Read every byte that the stage is made from: weights that went bad would corrupt, unseen, all that follows.

    `only`: of the inputs whose names begin so.
    """
    refs = {Ref(record.stage, record.key) for name, record in job.input_records.items() if name.startswith(only)}
    damaged, unreadable = [], []
    for finding in verify_artifacts(Catalogue(store.root), sorted(refs), report_only=False):
        what = f"{finding.ref.stage}/{finding.ref.key[:12]}: {'; '.join(finding.faults)}"
        if finding.status == "damaged":
            damaged.append(f"{what} ({finding.aside})")
        elif finding.status == "unreadable":
            unreadable.append(what)
    if unreadable:
        raise StageFailed(
            f"{job.node}: what it is made from cannot be read: {'. '.join(unreadable)}. Nothing was set aside; look at "
            "the disk and the rights, and run again"
        )
    if damaged:
        raise StageFailed(
            f"{job.node}: what it is made from was damaged on disk: {'. '.join(damaged)}. Run again to have that made "
            "again"
        )


def manifest_of(
    job: Job,
    files: dict[str, FileRecord],
    digest: str,
    result: Mapping[str, Any],
    started: datetime,
    seconds: float,
) -> Manifest:
    """The manifest of what a job made, `result` being what its function returned, as JSON.

    Raises:
        ValueError: outputs that are not the stage's: they would be refused at every hit, and made again for ever.
    """
    outputs = job.stage.outputs.model_validate(result["outputs"])
    manifest = Manifest(
        key=artifact_key(job.spec),
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
        duration_seconds=seconds,
        forecast=job.forecast,
    )
    job.stage.outputs_of(manifest)
    return manifest
