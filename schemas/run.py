"""What one run of the pipeline is and came to.

`RunSummary` is written as `artifacts/reports/<run name>/summary.json`, `RunRecord` and `TagRecord` into the store.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smoltulu.schemas.artifact import KEY_PATTERN, STAGE_PATTERN, Forecast
from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.evaluation import Measurement, ScoreKind
from smoltulu.schemas.verdict import Verdict

#: `Running` stands in reports that are written while a run goes on, `Killed` in those of a run whose process is gone.
Outcome = Literal["Completed", "Cached", "Resumed", "Running", "Failed", "Cancelled", "Killed", "Not run"]
StageName = Annotated[str, Field(pattern=STAGE_PATTERN)]
Key = Annotated[str, Field(pattern=KEY_PATTERN)]


#: What becomes of a stage, as its contracts say.
Makes = Literal["language model", "reward model", "scores", "other"]


class StageRun(StrictModel):
    """One node of the graph in this run."""

    node: str = Field(description="name in the graph, e.g. evaluation-dpo")
    stage: str
    makes: Makes = Field("other", description="what the stage is for, also where it made nothing yet")
    outcome: Outcome
    seconds: float = Field(0.0, ge=0, description="spent in this run; about 0 where cached")
    forecast: Forecast | None = Field(None, description="of what was made in this run; none where cached")
    key: str = Field("", description="artifact key; empty where none was made")
    path: str = Field("", description="folder of the generation; empty where none was made")
    metrics: dict[str, float] = Field({})
    error: str | None = Field(None)


class RunScore(Measurement):
    """A score of a run, and whose it is."""

    node: str
    kind: ScoreKind
    subject: str = Field(description="stage whose model was measured")
    counts: dict[str, int] = Field(
        {}, description="what was odd of its answers (empty, cut, ...) -> how many; no zeros"
    )
    is_near_chance: bool = Field(False, description="within noise of what guessing gives")


class RunSummary(StrictModel):
    """Everything a reader of a run needs first; the manifests hold the rest."""

    run_name: str
    recipe: str = Field(description="name of the recipe")
    state: str = Field(
        description="Running while it goes on, Killed where its process ended without a word; else a state of Prefect"
    )
    started_at: str = Field(description="UTC, ISO 8601")
    finished_at: str = Field(description="UTC, ISO 8601; empty while it runs, and where it was killed")
    written_at: str = Field("", description="UTC, ISO 8601: when this was written")
    error: str | None = Field(None)
    stages: tuple[StageRun, ...]
    scores: tuple[RunScore, ...] = Field(())
    verdict: Verdict = Field(Verdict(), description="which model is better than which, and how sure that is")
    published: str | None = Field(None, description="folder that is ready to be pushed")
    pushed: str = Field("", description="one sentence: where it was pushed to, or why it stayed local")
    summary_path: str | None = Field(None)
    report_path: str | None = Field(None, description="the HTML report")


class RunRecord(StrictModel):
    """A flow run as the store knows it: `<store root>/runs/<run name>.json`, written at its start and at its end."""

    run_name: str
    flow_run_id: str = Field("", description="Prefect's id; empty without a server")
    recipe: str = Field(description="name of the recipe")
    state: str = Field(description="Running until the end; then Completed, Failed, Crashed or another state of Prefect")
    started_at: str = Field(description="UTC, ISO 8601")
    finished_at: str = Field("", description="UTC, ISO 8601; empty while it runs")
    host: str = Field(description="where the flow's process runs or ran")
    pid: int = Field(ge=0, lt=1 << 31, description="of the flow's process on that host")
    stages: dict[str, StageName] = Field(description="node -> stage, every planned node")
    keys: dict[str, Key] = Field(description="node -> artifact key, every planned node, from the start")
    outcomes: dict[str, str] = Field({}, description="node -> outcome; empty at the start")
    report_path: str = Field("", description="the HTML report; empty until it is written")
    compared_with: dict[str, str] | None = Field(
        None,
        description="of a night of an older version: node -> generation that its scores are compared with; empty once "
        "the verdict was told. Nights are in the store's history now",
    )


class TagRecord(StrictModel):
    """A name for one artifact, which gc then keeps with all that it was made from: `<store root>/tags/<name>.json`."""

    stage: StageName
    key: Key
    tagged_at: str = Field(description="UTC, ISO 8601")
