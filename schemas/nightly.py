"""What nightly evaluation keeps in a store: the pinned baseline, and what the next night compares with.

Under `<store root>/history/<recipe>/`, beside the nights themselves (`tasks/nightly/history.py`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from smoltulu.schemas.artifact import KEY_PATTERN, STAGE_PATTERN
from smoltulu.schemas.common import StrictModel

#: A recipe's name: that of a folder.
RecipeName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]
GENERATION_PATTERN = r"^gen-[0-9]{4,18}$"
Digest = Annotated[str, StringConstraints(pattern=KEY_PATTERN)]


class MeasuredModel(StrictModel):
    """One generation of an evaluation, and the model that it measured."""

    stage: str = Field(pattern=STAGE_PATTERN)
    key: Digest
    generation: str = Field(pattern=GENERATION_PATTERN)
    digest: Digest = Field(description="content of the evaluation")
    model_digest: Digest = Field(description="content of the model that it measured")

    @property
    def identity(self) -> tuple[str, str]:
        """What was measured how: the same weights measured again are no other model."""
        return self.key, self.model_digest


class Pin(StrictModel):
    """A baseline that somebody chose for one evaluation of a recipe; one that was let go stays, with who and when."""

    node: str = Field(description="evaluation that it is the baseline of, e.g. evaluation-sft")
    measured: MeasuredModel
    named: str = Field(description="what was asked for: a key, tag or run")
    pinned_by: str = Field(description="user@host")
    pinned_at: str = Field(description="UTC, ISO 8601")
    unpinned_by: str = Field("", description="user@host; empty while it holds")
    unpinned_at: str = Field("", description="UTC, ISO 8601")


class Pins(StrictModel):
    """Every baseline that a recipe ever had: `pins.json`, oldest first."""

    pins: tuple[Pin, ...] = ()

    def held(self) -> dict[str, Pin]:
        """Evaluation -> the pin that holds."""
        return {pin.node: pin for pin in self.pins if not pin.unpinned_at}


class Told(StrictModel):
    """What the next night may compare with: `told.json`, for gc. The nights themselves are the source."""

    evaluations: tuple[MeasuredModel, ...] = ()
