"""Settings of the four training stages. Every default names its source; `ours` where no source gives one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.common import StrictModel, science

Schedule = Literal["linear", "cosine", "constant"]


class TrainingSettings(StrictModel):
    """What every training stage has."""

    learning_rate: float = science(gt=0, lt=1)
    effective_batch_size: int = science(
        ge=1, description="sequences (SFT), pairs (reward model, DPO) or completions (RLVR) per optimizer step"
    )
    lr_scheduler_type: Schedule = science("linear")
    warmup_ratio: float = science(0.0, ge=0, le=1, description="share of all steps")
    weight_decay: float = science(0.0, ge=0)
    adam_epsilon: float = science(1e-8, gt=0)
    max_grad_norm: float = science(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = science(
        "bfloat16", description="bfloat16: autocast over float32 weights; float32: everywhere"
    )
    seed: int = science(123, ge=0, description="Tulu 3 SFT: 123 (open-instruct docs/tulu3.md)")


class SupervisedSettings(TrainingSettings):
    """Stages that go over a set in epochs."""

    num_train_epochs: float = science(1.0, gt=0)
    max_steps: int | None = science(None, ge=1, description="stop after so many optimizer steps")
    max_length: int = science(ge=8, description="tokens")


class SFTSettings(SupervisedSettings):
    """Loss on assistant tokens and the closing eos only; over-long rows are cut at `max_length` (Tulu 3)."""


class RewardModelSettings(SupervisedSettings):
    """Bradley-Terry; score head drawn from N(0, 1/(hidden_size + 1)); dropout off. Starts from SFT (Tulu 3)."""

    adam_epsilon: float = science(1e-5, gt=0, description="Tulu 3")


class DPOSettings(SupervisedSettings):
    """Starts from SFT, which is also the reference."""

    loss_type: Literal["sigmoid_norm", "sigmoid"] = science(
        "sigmoid_norm",
        description="sigmoid_norm: log-probabilities divided by completion length (open-instruct dpo_norm)",
    )
    beta: float = science(5.0, gt=0, description="5 with sigmoid_norm (Tulu 3); 0.1 is usual with sigmoid")


class RLVRSettings(TrainingSettings):
    """GRPO over verifiable rewards; starts from DPO."""

    algorithm: Literal["grpo"] = science("grpo")
    num_steps: int = science(ge=1, description="optimizer steps")
    num_generations: int = science(8, ge=2, description="rollouts per prompt")
    num_iterations: int = science(1, ge=1, description="optimizer passes over each rollout batch")
    steps_per_generation: int = science(1, ge=1, description="optimizer steps that share one generation batch")
    max_prompt_length: int = science(ge=8, description="tokens; longer prompts are dropped before training")
    max_completion_length: int = science(ge=1, description="tokens")
    temperature: float = science(1.0, gt=0)
    beta: float = science(0.0, ge=0, description="KL coefficient against the starting model; 0: no reference model")
    epsilon: float = science(0.2, gt=0, lt=1, description="clip range of the policy ratio")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = science("dapo")
    scale_rewards: Literal["group", "batch", "none"] = science("group")
    reward_correct: float = science(1.0, gt=0, description="reward of a verified completion; 10 in Tulu 3")
    non_stop_reward: float | None = science(None, description="reward of a completion without eos; None: as verified")

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.effective_batch_size % self.num_generations:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}: a step must hold whole groups"
            )
        return self


class TrainingInputs(StrictModel):
    """Resolved inputs of a training stage."""

    model: str = Field(description="folder of the model to start from")
    dataset: str = Field(description="rows file")
    chat_template: str = Field(description="text of the Jinja template")
