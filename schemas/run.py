"""What one run of the pipeline came to: written as `artifacts/reports/<run name>/summary.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.common import StrictModel

Outcome = Literal["Completed", "Cached", "Resumed", "Failed", "Not run"]
ScoreKind = Literal["language_model", "reward_model", "implicit_reward"]


class StageRun(StrictModel):
    """One node of the graph in this run."""

    node: str = Field(description="name in the graph, e.g. evaluation-dpo")
    stage: str
    outcome: Outcome
    seconds: float = Field(0.0, ge=0, description="spent in this run; about 0 where cached")
    key: str = Field("", description="artifact key; empty where none was made")
    path: str = Field("", description="folder of the generation; empty where none was made")
    metrics: dict[str, float] = Field({})
    error: str | None = Field(None)


class RunScore(StrictModel):
    """A score of `schemas.evaluation.Score`, and whose it is."""

    node: str
    kind: ScoreKind
    subject: str = Field(description="stage whose model was measured")
    task: str
    metric: str
    value: float
    stderr: float | None = Field(None)
    num_samples: int = Field(ge=1)
    num_fewshot: int | None = Field(None)
    harness: str
    task_version: str
    template_digest: str
    limited: bool = Field(False, description="measured on a part of the task")


class RunSummary(StrictModel):
    """Everything a reader of a run needs first; the manifests hold the rest."""

    run_name: str
    recipe: str = Field(description="name of the recipe")
    state: str = Field(description="Completed, Failed, or another state of Prefect")
    started_at: str = Field(description="UTC, ISO 8601")
    finished_at: str = Field(description="UTC, ISO 8601")
    error: str | None = Field(None)
    stages: tuple[StageRun, ...]
    scores: tuple[RunScore, ...] = Field(())
    published: str | None = Field(None, description="folder that is ready to be pushed")
    pushed: str = Field("", description="one sentence: where it was pushed to, or why it stayed local")
    summary_path: str | None = Field(None)
    report_path: str | None = Field(None, description="the HTML report")
