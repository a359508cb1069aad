"""A job: one stage to be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from smoltulu.schemas.artifact import Forecast, InputRecord, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.stage import Stage


@dataclass(frozen=True)
class Job:
    """One stage to be made: its identity (spec) and everything that it needs.

    inputs         resolved inputs model (folders and files of upstream artifacts)
    input_records  binding -> upstream artifact, for the manifest and the stale check
    refresh        make it again even if the store has it
    forecast       what was reckoned of it, for its manifest
    """

    node: str
    stage: Stage
    config: BaseModel
    compute: ComputeSettings
    spec: Spec
    inputs: BaseModel
    input_records: Mapping[str, InputRecord] = field(default_factory=dict)
    refresh: bool = False
    forecast: Forecast | None = None

    @property
    def input_digests(self) -> dict[str, str]:
        """Binding -> content digest of the upstream artifacts."""
        return {name: record.digest for name, record in self.input_records.items()}
