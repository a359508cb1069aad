"""Seven no-op steps in a row through this project's store, without Prefect: `smoltulu_dag.py FOLDER`."""

import logging
import sys
from pathlib import Path

from pydantic import BaseModel

from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import ArtifactReference, InputRecord, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.stage import Stage, StageContext


class Number(BaseModel):
    value: int


class Inputs(BaseModel):
    before: str | None = None


def add_one(config: Number, inputs: Inputs, context: StageContext) -> tuple[Number, dict[str, float]]:
    value = config.value
    if inputs.before is not None:
        value = Number.model_validate_json((Path(inputs.before) / "value.json").read_text()).value + 1
    (context.folder / "value.json").write_text(Number(value=value).model_dump_json())
    return Number(value=value), {}


step = Stage("step", 1, Number, Inputs, Number, add_one)
store = Store(sys.argv[1])
compute = ComputeSettings(launcher="inline", min_free_disk_gb=0)
before: ArtifactReference | None = None
for number in range(7):
    records = {}
    if before is not None:
        records = {"before": InputRecord(stage=before.stage, key=before.key, digest=before.digest)}
    inputs = {name: record.key for name, record in records.items()}
    spec = Spec(stage="step", version=1, config={"step": number}, inputs=inputs, externals={})
    folder = Inputs(before=before.path if before else None)
    job = Job(f"step-{number}", step, Number(value=1), compute, spec, folder, records)
    before = run_stage(job, store, logging.getLogger("benchmark"))
assert before is not None and before.outputs["value"] == 7, before
