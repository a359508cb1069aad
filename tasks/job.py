"""One stage that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from smoltulu.schemas.artifact import InputRecord, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.stage import Stage


@dataclass(frozen=True)
class Job:
    """One stage that is wanted: identity (spec) and everything needed to make it.

    inputs         resolved inputs model (folders and files of upstream artifacts)
    input_records  binding -> upstream artifact, for the manifest and the stale check
    refresh        make it again even if it is there
    """

    node: str
    stage: Stage
    config: BaseModel
    compute: ComputeSettings
    spec: Spec
    inputs: BaseModel
    input_records: Mapping[str, InputRecord] = field(default_factory=dict)
    refresh: bool = False
