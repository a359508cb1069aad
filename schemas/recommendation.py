"""What a sweep says is best: a place that was run, the interval of the optimum, and what the choice costs."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.sweep import SweptStage


class TaskRegret(StrictModel):
    """What a place scores on a task by the items that did not choose it."""

    task: str
    metric: str
    weight: float = Field(description="share of the weighting")
    score: float = Field(description="as the metric is spelt")
    regret: float = Field(description="in the metric's unit: what the task's own best place scores more; 0: it is best")
    regret_stderr: float | None = Field(None, description="over items")


class RecommendedPlace(StrictModel):
    """The best place for a task class, for all tasks, or for a weighting."""

    of: str = Field(description="a class, `all classes`, or `your weights`")
    learning_rate: float = Field(gt=0)
    effective_batch_size: int = Field(ge=1, description="rows")
    max_tokens: int = Field(ge=1, description="budget of the cells that were compared")
    size: str = "base"
    arm: str = "main"
    optimum: float | None = Field(None, description="best learning rate at this batch by the parabola")
    low: float | None = Field(None, description="95 % interval of it, over seeds and items")
    high: float | None = None
    regret: float = Field(description="expected, in standard deviations of the scores of places, weighted")
    regret_stderr: float | None = None
    tasks: tuple[TaskRegret, ...]
    flags: tuple[str, ...] = Field((), description="why not to trust it: an edge of the grid, few seeds, noise")


class Recommendation(StrictModel):
    """Answers of a sweep, the one for what was asked first."""

    sweep: str
    recipe: str
    stage: SweptStage
    choices: tuple[RecommendedPlace, ...] = Field(min_length=1)
    patches: tuple[dict[str, Any], ...] = Field(description="of each choice: a recipe that extends the sweep's")
    recipes: tuple[str, ...] = Field(description="the patches as YAML; what is known of a place stands in comments")
    notes: tuple[str, ...] = ()

    def as_yaml(self, number: int = 0) -> str:
        """A recipe file with the place of one choice."""
        return self.recipes[number]
