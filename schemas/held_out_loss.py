"""The held-out loss of SFT, the reward model and DPO: when it is computed, and what depends on it.

Held-out rows are put aside by the data (schemas/mixture.py). RLVR has held-out prompts instead (schemas/held_out.py).
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import StrictModel, science

#: Share of a run between two evaluations, where nothing else is said.
EVERY_SHARE = 0.1


class HeldOutLossSettings(StrictModel):
    """All of it is science: the losses are part of what the stage makes, and with `keep` or `patience` so are weights.

    Absent: where rows are held out, their loss is computed at the start, after each tenth of the run and at its end.
    """

    every_steps: int | None = science(None, ge=1, description="optimizer steps between two evaluations")
    every_share: float | None = science(
        None, gt=0, le=1, description=f"the same as a share of the run; neither given: {EVERY_SHARE:g}"
    )
    keep: Literal["last", "best"] = science("last", description="weights that are kept; best: of the lowest loss")
    patience: int | None = science(
        None, ge=1, description="the run ends after so many evaluations in a row without a lower loss"
    )
    min_delta: float = science(0.0, ge=0, description="of patience: a loss is lower if it is so by more than this")

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_steps is not None and self.every_share is not None:
            raise ValueError(
                f"every_steps {self.every_steps:,} and every_share {self.every_share:g} are two intervals; keep one"
            )
        if self.min_delta and self.patience is None:
            raise ValueError(
                f"min_delta {self.min_delta:g} belongs to patience, which is not set; set it, or remove it"
            )
        return self

    @property
    def decides(self) -> bool:
        """Whether the trained weights depend on it."""
        return self.keep == "best" or self.patience is not None

    def every(self, num_steps: int) -> int:
        """Optimizer steps between two evaluations of a run of so many."""
        if self.every_steps is not None:
            return self.every_steps
        return max(1, math.ceil((self.every_share or EVERY_SHARE) * num_steps - 1e-9))

    def num_evaluations(self, num_steps: int) -> int:
        """Evaluations of a run of so many steps: at its start, on the way and at its end."""
        return 2 + (num_steps - 1) // self.every(num_steps)


class HeldOutLoss(StrictModel):
    """The loss on the held-out rows after an optimizer step."""

    step: int = Field(ge=0)
    loss: float = Field(description="mean over tokens (SFT) or pairs")
    accuracy: float | None = Field(None, ge=0, le=1, description="pairs only: chosen before rejected")
    stderr: float | None = Field(None, ge=0, description="of the loss; of SFT over rows, whose tokens are alike")


class HeldOutLossOutputs(StrictModel):
    """What the held-out rows say of a finished training, and which weights were kept."""

    num_rows: int = Field(ge=1)
    num_counted: int = Field(ge=1, description="supervised tokens (SFT) or pairs")
    losses: tuple[HeldOutLoss, ...] = Field(min_length=2)
    kept_step: int = Field(ge=0)
    why: str = Field(description="why these weights were kept")
    ended_early: str | None = Field(None, description="why the run ended before its budget did")

    @property
    def start(self) -> HeldOutLoss:
        return self.losses[0]

    @property
    def last(self) -> HeldOutLoss:
        return self.losses[-1]

    @property
    def kept(self) -> HeldOutLoss:
        """Of several evaluations of this step the last."""
        return next(one for one in reversed(self.losses) if one.step == self.kept_step)
