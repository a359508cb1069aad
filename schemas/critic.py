"""Settings of PPO's critic. Every default names its source."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from smoltulu.schemas.common import MAX_PATH, StrictModel, machinery, science


class CriticSettings(StrictModel):
    """The value model of PPO: one score a token, with an optimizer of its own."""

    initial: Literal["reward_model", "policy", "path"] = science(
        "reward_model",
        description="reward_model: the paper; policy: the starting model with a new head; path: of an earlier run",
    )
    path: str | None = machinery(
        None, max_length=MAX_PATH, description="folder `critic` of an earlier run's artifact; keyed by content"
    )
    learning_rate: float | None = science(None, gt=0, lt=1, description="none: the policy's (Tulu 3)")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = science(None, description="none: the policy's")
    warmup_ratio: float | None = science(None, ge=0, lt=1, description="of the learning rate; none: the policy's")
    gae_lambda: float | None = science(
        None, ge=0, le=1, description="of the returns that it learns; none: the policy's; 1: VC-PPO (arXiv 2503.01491)"
    )
    warmup_steps: int = science(
        0, ge=0, description="optimizer steps of the critic alone, before the policy moves; 0: the paper"
    )
    value_clip: float = science(0.2, gt=0, description="clip range of the values around those of the rollout; Tulu 3")
    value_coefficient: float = science(0.1, gt=0, description="of the value loss; Tulu 3")
    offload_optimizer: bool = machinery(
        False, description="keep Adam's moments of the critic, and move its weights, in CPU memory; slower"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.initial == "path") != (self.path is not None):
            raise ValueError(
                f"critic.initial {self.initial} with critic.path {self.path!r}: give a path with initial "
                "path, and none with reward_model or policy"
            )
        return self
