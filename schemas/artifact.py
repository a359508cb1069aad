"""What the store writes down about an artifact, and what tasks pass to each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from smoltulu.schemas.common import StrictModel, plain_path

#: 2: digests are BLAKE3, what lies below `logs/` (and, since it exists, `checkpoint/`) is no content.
MANIFEST_SCHEMA_VERSION = 2
#: Name of a stage and of an artifact, which are folders of a store.
STAGE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"
KEY_PATTERN = r"^[0-9a-f]{64}$"


class InputRecord(StrictModel):
    """An upstream artifact as it was when this one was made."""

    stage: str
    key: str
    digest: str = Field(description="content digest; differs from the present one when upstream was made again")


class FileRecord(StrictModel):
    """One file of an artifact."""

    size: int = Field(ge=0, description="bytes")
    blake3: str = Field(pattern="^[0-9a-f]{64}$")


def _stay_inside(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    for name in files:
        plain_path(name)
    return files


#: Relative path -> record of files below one folder.
FileRecords = Annotated[dict[str, FileRecord], AfterValidator(_stay_inside)]


class Spec(StrictModel):
    """What the key is the hash of: the identity of an artifact, known before it is made."""

    format: int = Field(1)
    stage: str
    version: int = Field(ge=1)
    config: dict[str, Any] = Field(description="the science of the stage's config")
    inputs: dict[str, str | list[str] | dict[str, str]] = Field(description="input name -> upstream key(s)")
    externals: dict[str, str] = Field(description="name -> content digest or resolved revision")


class ExtendedTraining(StrictModel):
    """The training with a smaller budget whose stored checkpoint another one went on from."""

    stage: str
    key: str
    step: int = Field(ge=1, description="optimizer step of the checkpoint")
    num_steps: int = Field(ge=1, description="optimizer steps of that training")


#: Where a forecast of time is from: a similar finished stage, compute.device_tflops, rates that were measured here.
Basis = Literal["similar", "stated", "measured"]


class Forecast(StrictModel):
    """What was reckoned of a stage just before it was made, of what was left to do. None: not known."""

    seconds: float | None = Field(None, ge=0)
    basis: Basis | None = Field(None, description="of the seconds")
    num_steps: int | None = Field(None, ge=0, description="optimizer steps")
    num_tokens: int | None = Field(None, ge=0)
    device_bytes: int | None = Field(None, ge=0, description="memory that every device holds at least")
    peak_disk_bytes: int | None = Field(None, ge=0)


class Manifest(StrictModel):
    """Written last into a generation: without it there is no artifact."""

    schema_version: int = Field(MANIFEST_SCHEMA_VERSION)
    key: str
    spec: Spec
    digest: str = Field(description="over the names, sizes and digests of the files, without logs/ and checkpoint/")
    inputs: dict[str, InputRecord] = Field(description="binding -> upstream artifact")
    outputs: dict[str, Any] = Field(description="the stage's outputs model as JSON")
    metrics: dict[str, float]
    files: FileRecords = Field(description="relative path -> record")
    environment: dict[str, Any] = Field(description="packages, python, hardware, git commit")
    compute: dict[str, Any] = Field({})
    node: str = Field(description="name in the graph that first asked for it, e.g. evaluation-dpo")
    started_at: str = Field(description="UTC, ISO 8601")
    finished_at: str = Field(description="UTC, ISO 8601")
    duration_seconds: float = Field(ge=0)
    resumed_from_steps: tuple[int, ...] = Field((), description="optimizer step of each resume")
    extends: ExtendedTraining | None = Field(None, description="none: it trained from its own start")
    forecast: Forecast | None = Field(None, description="to be held against duration_seconds and outputs")
    adopted_from: str | None = Field(None, description="key under which it was made: flows/planning/adoption.py")
    checksum: str = Field("", description="SHA-256 over all other fields; empty only until it is committed")


class ArtifactReference(StrictModel):
    """What tasks pass to each other: never a live model."""

    stage: str
    node: str
    key: str
    digest: str
    path: str = Field(description="folder of the generation")
    outcome: str = Field("Completed", description="Cached, Completed or Resumed")
    outputs: dict[str, Any] = Field({})
    metrics: dict[str, float] = Field({})
