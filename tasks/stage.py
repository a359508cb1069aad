"""What a stage is: a name, a version, three contracts and a function. It does not know store, key or Prefect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.compute import ComputeSettings

#: Folder of a stage's `work` for caches of its rows, marked complete like a checkpoint.
DATASETS_FOLDER = "datasets"
#: Exit status of a stage process that was asked to stop and did, its checkpoint written.
STOPPED = 143


class StageStopped(Exception):
    """The stage was asked to stop (SIGTERM) before it was done; what it wrote into `work` is there to go on from."""


class Report(Protocol):
    """Progress of a stage: shown to the user, never part of a result."""

    def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
        """`step` of `num_steps` is done; metrics such as loss, reward, tokens_per_second."""
        ...


@dataclass(frozen=True)
class StageContext:
    """Where a stage function works, and how.

    folder   empty; what is in it when the function returns becomes the artifact
    work     survives failures: trainer checkpoints and logs, so that a re-run resumes
    compute  this stage's machinery (exceptions applied)
    report   progress callback; free to call often
    """

    folder: Path
    work: Path
    compute: ComputeSettings
    report: Report


@dataclass(frozen=True)
class Stage:
    """`function(config, inputs, context)` writes files into `context.folder` and returns (outputs, metrics).

    Raise `version` when the meaning of the stage changes: it is part of every key. `ValueError` from the function
    is the user's to mend and is shown without a traceback.

    objections(config, outputs, metrics)  what today's thresholds say against a cached artifact: they are machinery, so
                                          the key does not tell
    """

    name: str
    version: int
    config: type[BaseModel]
    inputs: type[BaseModel]
    outputs: type[BaseModel]
    function: Callable[[Any, Any, StageContext], tuple[BaseModel, dict[str, float]]]
    objections: Callable[[Any, Any, Mapping[str, float]], list[str]] | None = None

    def objections_to(self, manifest: Manifest, config: BaseModel) -> list[str]:
        """What the thresholds of `config` say against an artifact; nothing where another version wrote it."""
        if self.objections is None:
            return []
        try:
            outputs = self.outputs.model_validate(manifest.outputs)
        except ValidationError:
            return []
        return self.objections(config, outputs, manifest.metrics)
