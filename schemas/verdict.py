"""What the page of a run says of its models: which is better than which, and what they answered."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smoltulu.schemas.common import StrictModel

#: `same`: no item changed. `within noise`: it cannot be told apart from chance.
Change = Literal["gain", "drop", "within noise", "same", "not comparable"]
#: Why a prompt is shown: the last model lost or gained it, was cut, is wrong, or is right.
Fate = Literal["lost", "gained", "truncated", "wrong", "right"]


class ScoreChange(StrictModel):
    """One score of two models, paired by item. Without a test (`not comparable`) it has no difference."""

    task: str
    metric: str
    change: Change = Field(description="gain is better, also where a lower value is")
    before: float
    after: float
    difference: float | None = Field(
        None, description="by how much it got better, mean over items: above 0 also where less is better"
    )
    stderr: float | None = Field(None, description="of the difference")
    num_items: int = Field(0, ge=0)
    p_value: float | None = Field(None, description="two-sided, of this test alone")
    adjusted: float | None = Field(None, description="of all tests of the page (Holm)")
    is_share: bool = Field(False, description="both lie in [0, 1]: told in points of 100")
    is_near_chance: bool = Field(False, description="both are within noise of chance")
    reason: str = Field("", description="why it cannot be compared")


class ModelComparison(StrictModel):
    """Two models of a run; `before` and `after` are the stages that made them."""

    before: str
    after: str
    changes: tuple[ScoreChange, ...]

    @property
    def compared(self) -> tuple[ScoreChange, ...]:
        """Those that have a test."""
        return tuple(one for one in self.changes if one.change != "not comparable")


class Verdict(StrictModel):
    """What a run's evaluations say of its language models."""

    measured: tuple[str, ...] = Field((), description="stages whose language model was measured, in the run's order")
    comparisons: tuple[ModelComparison, ...] = Field(
        (), description="each model with the one before it, then the last with the first"
    )
    level: float = Field(0.05, description="of significance, for all tests together")
    unreadable: dict[str, str] = Field({}, description="stage -> why the samples behind its scores cannot be read")

    @property
    def num_tests(self) -> int:
        """Tests that Holm's adjustment counts."""
        return sum(len(one.compared) for one in self.comparisons)


class Answer(StrictModel):
    """What one model answered. `is_right` is of the text that is shown; None where its score is neither 0 nor 1."""

    subject: str
    text: str
    value: float = Field(description="of the item: the headline's metric, or the share of right samples")
    is_right: bool | None = Field(None)
    num_samples: int = Field(1, ge=1)
    marks: tuple[str, ...] = Field((), description="empty, unparsed, cut at the limit, prompt cut")
    reason: str = Field("", description="of the verifier")
    num_left_out: int = Field(0, ge=0, description="characters of the text that are not kept")


class AnsweredPrompt(StrictModel):
    """One prompt and the answers of all models that were asked it."""

    task: str
    id: str
    fate: Fate
    prompt: str | None = Field(None, description="None where the samples do not keep it")
    target: str = Field("")
    answers: tuple[Answer, ...]
