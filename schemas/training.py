"""Settings of the training stages (RLVR's: rlvr.py).

Every default names its source; `ours` where no source gives one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.budget import Budget
from smoltulu.schemas.common import StrictModel, machinery, science
from smoltulu.schemas.held_out_loss import HeldOutLossSettings
from smoltulu.schemas.schedules import SCHEDULE_KINDS, Budgets, ConstantSchedule, FinalDecay, ScheduleSettings


class TrainingSettings(StrictModel):
    """What every training stage has."""

    learning_rate: float = science(gt=0, lt=1)
    effective_batch_size: int = science(
        ge=1, description="sequences (SFT), pairs (reward model, DPO) or completions (RLVR) per optimizer step"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = science("linear")
    warmup_ratio: float = science(0.0, ge=0, lt=1, description="share of all steps; transformers: 1 is one step")
    schedule: ScheduleSettings | None = science(
        None,
        absent=None,
        discriminator="kind",
        description="instead of lr_scheduler_type and warmup_ratio, see docs/schedules.md",
    )
    weight_decay: float = science(0.0, ge=0)
    adam_beta2: float = science(
        0.999,
        absent=0.999,
        gt=0,
        lt=1,
        description="Adam's second moment, of PPO's critic too; small batches want more",
    )
    adam_epsilon: float = science(1e-8, gt=0)
    max_grad_norm: float = science(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = science(
        "bfloat16", description="bfloat16: autocast over float32 weights; float32: everywhere"
    )
    seed: int = science(123, ge=0, description="Tulu 3 SFT: 123 (open-instruct docs/tulu3.md)")

    @property
    def starts_from(self) -> str | None:
        """Block of the recipe without which there is no model to start from; None: the base model is enough."""
        return "sft"

    def row_rules(self) -> RowRules:
        """What its preflight makes of the rows."""
        raise NotImplementedError

    @field_validator("schedule", mode="before")
    @classmethod
    def _schedule_names_its_kind(cls, value: Any) -> Any:
        # pydantic's own text does not say what is allowed.
        if isinstance(value, dict) and "kind" not in value:
            raise ValueError(f"kind is missing; give one of {', '.join(SCHEDULE_KINDS)}")
        return value

    @model_validator(mode="after")
    def _one_schedule_that_fits(self) -> Self:
        if self.schedule is None:
            if self.lr_scheduler_type == "constant" and self.warmup_ratio:
                raise ValueError(
                    f"lr_scheduler_type constant has no warm-up, and would ignore warmup_ratio {self.warmup_ratio}; "
                    "set it to 0, or use a schedule of kind constant, which has one"
                )
            return self
        if self.lr_scheduler_type != "linear" or self.warmup_ratio:
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type}, warmup_ratio {self.warmup_ratio} and a schedule of kind "
                f"{self.schedule.kind} are two answers; to use the schedule, set lr_scheduler_type to linear and "
                "warmup_ratio to 0, their defaults (the schedule has a warm-up of its own), else remove it"
            )
        num_steps = self.budget.max_steps
        if num_steps is not None:
            self.schedule.check(num_steps)
        elif isinstance(self.schedule, Budgets):
            raise ValueError(
                f"a schedule with budgets {list(self.schedule.budgets)} needs max_steps {self.schedule.budgets[-1]}: "
                "epochs do not say where it ends"
            )
        return self

    @property
    def budget(self) -> Budget:
        """How long the training is to be."""
        raise NotImplementedError

    @property
    def num_passes(self) -> int:
        """Optimizer passes over each row that is paid for once: over the rollouts of RLVR."""
        return 1

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes that every device holds at least for each parameter of the model.

        Float32 weights, gradients and the two moments of Adam, before `compute.parallel` divides them. Activations come
        on top.
        """
        return 16

    @property
    def is_extendable(self) -> bool:
        """Whether it has a checkpoint that a training with a larger budget could go on from."""
        return False

    @property
    def trains_critic(self) -> bool:
        """Whether a second model, of the size of the first, is trained, kept in checkpoints and in the artifact."""
        return False

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights so far are kept beside the checkpoints."""
        return False


class LoraSettings(StrictModel):
    """Low-rank adapters (arXiv 2106.09685) on all linear layers but the output head; merged at the end."""

    r: int = science(16, ge=1, description="rank")
    lora_alpha: float = science(32.0, gt=0, description="the adapter is scaled by lora_alpha / r")
    lora_dropout: float = science(0.0, ge=0, lt=1)


class GateSettings(StrictModel):
    """What a trained language model must show before its artifact is committed; no result depends on it."""

    num_prompts: int = machinery(8, ge=0, description="prompts of the training rows that it answers greedily; 0: none")
    max_new_tokens: int = machinery(512, ge=1, description="tokens in which an answer should have stopped")
    min_stopped_share: float = machinery(
        0.125, ge=0, le=1, description="share of the answers that must end in eos, here one of eight; 0: only counted"
    )


class SupervisedSettings(TrainingSettings):
    """Stages that go over a set of rows: for so many epochs, optimizer steps or tokens.

    reduction   how the loss of an effective batch is averaged
    """

    reduction: ClassVar[str] = "mean over pairs"

    num_train_epochs: float = science(1.0, gt=0)
    max_steps: int | None = science(None, ge=1, description="optimizer steps, instead of epochs")
    max_tokens: int | None = science(
        None, absent=None, ge=1, description="tokens, instead of epochs; rounded up to whole optimizer steps"
    )
    max_length: int = science(ge=8, description="tokens")
    held_out: HeldOutLossSettings | None = science(
        None,
        absent=None,
        description="when the loss of held-out rows is computed, and what it decides: docs/mixtures.md",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.max_steps is not None and self.max_tokens is not None:
            raise ValueError(f"max_steps {self.max_steps} and max_tokens {self.max_tokens} are two budgets; give one")
        every = self.held_out.every_steps if self.held_out else None
        if self.max_steps is not None and every is not None and every > self.max_steps:
            raise ValueError(
                f"held_out.every_steps {every:,} is more than the run's {self.max_steps:,} optimizer steps; give at "
                f"most {self.max_steps:,}"
            )
        return self

    @property
    def keeps_best(self) -> bool:
        return self.held_out is not None and self.held_out.keep == "best"

    @property
    def budget(self) -> Budget:
        return Budget(self.effective_batch_size, self.num_train_epochs, self.max_steps, self.max_tokens)

    @property
    def is_extendable(self) -> bool:
        # The best weights so far are no part of a checkpoint, and a longer run ends early elsewhere.
        decides = self.held_out is not None and self.held_out.decides
        return not decides and isinstance(self.schedule, FinalDecay | Budgets | ConstantSchedule)


#: What becomes of a row that is longer than max_length.
Overlong = Literal["truncate", "drop"]


class SFTSettings(SupervisedSettings):
    """Loss on assistant tokens and the closing eos only."""

    reduction: ClassVar[str] = "mean over tokens"

    overlong: Overlong = science(
        "truncate", absent="truncate", description="rows longer than max_length; truncate: cut at its end (Tulu 3)"
    )
    lora: LoraSettings | None = science(None, absent=None, description="none: every weight is trained (Tulu 3)")
    mup_base_width: int | None = science(
        None,
        absent=None,
        ge=1,
        description="muP: learning_rate is that of a model of this hidden_size; base_model.scratch.mup has the same",
    )
    gate: GateSettings = machinery(GateSettings())

    @model_validator(mode="after")
    def _mup_trains_matrices(self) -> Self:
        if self.mup_base_width is not None and self.lora is not None:
            raise ValueError(
                f"mup_base_width {self.mup_base_width} scales the rates of a model's own matrices, and lora trains "
                "none of them; keep one of the two"
            )
        return self

    @property
    def starts_from(self) -> str | None:
        return None

    @property
    def bytes_per_parameter(self) -> int:
        return 4 if self.lora else super().bytes_per_parameter  # the weights alone; adapters are a few per cent

    def row_rules(self) -> RowRules:
        return RowRules(kind="conversations", max_length=self.max_length, overlong=self.overlong)


class RewardModelSettings(SupervisedSettings):
    """Bradley-Terry; score head drawn from N(0, 1/(hidden_size + 1)); dropout off. Over-long pairs are dropped."""

    start_from: Literal["sft", "dpo"] = science(
        "sft", absent="sft", description="sft: Tulu 3; dpo: the card of SmolTulu's reward model"
    )
    adam_epsilon: float = science(1e-5, gt=0, description="Tulu 3")

    @property
    def starts_from(self) -> str | None:
        return self.start_from

    def row_rules(self) -> RowRules:
        return RowRules(kind="pairs", max_length=self.max_length, overlong="drop")


PreferenceLoss = Literal[
    "sigmoid_norm", "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down", "sppo_hard"
]
TrainedTurns = Literal["last", "all"]


class DPOSettings(SupervisedSettings):
    """Starts from SFT, which is also the reference."""

    loss_type: PreferenceLoss = science(
        "sigmoid_norm",
        description="sigmoid_norm: log-probabilities divided by completion length (open-instruct dpo_norm)",
    )
    beta: float = science(5.0, gt=0, description="5 with sigmoid_norm (Tulu 3); 0.1 is usual with sigmoid")
    label_smoothing: float = science(
        0.0, absent=0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round"
    )
    trained_turns: TrainedTurns = science(
        "last", absent="last", description="assistant turns that count; all: also those of the prompt (open-instruct)"
    )
    overlong: Overlong = science(
        "truncate", absent="truncate", description="pairs longer than max_length; truncate: cut the completions' ends"
    )
    lora: LoraSettings | None = science(None, absent=None, description="none: every weight is trained (Tulu 3)")
    gate: GateSettings = machinery(GateSettings())

    @model_validator(mode="after")
    def _label_smoothing_has_a_meaning(self) -> Self:
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} has no meaning for loss_type {self.loss_type}; set it to 0, "
                "or take robust or exo_pair"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0: its paper recommends 1e-3")
        return self

    @property
    def bytes_per_parameter(self) -> int:
        return 4 if self.lora else super().bytes_per_parameter  # the reference is gone by then

    def row_rules(self) -> RowRules:
        return RowRules(
            kind="pairs", max_length=self.max_length, overlong=self.overlong, trained_turns=self.trained_turns
        )


#: Rows of `data.sft`, `data.preference` and `data.rlvr`, in this order.
RowKind = Literal["conversations", "pairs", "prompts"]


class RowRules(StrictModel):
    """What decides about the tokens of a training's rows."""

    kind: RowKind = science(description="conversations: SFT; pairs: reward model, DPO; prompts: RLVR")
    max_length: int = science(ge=8, description="tokens; of a prompt, for prompts")
    overlong: Overlong = science(description="prompts are always dropped")
    trained_turns: TrainedTurns = science("last", description="pairs: assistant turns that count")


class TrainingInputs(StrictModel):
    """Resolved inputs of a training stage."""

    model: str = Field(description="folder of the model to start from")
    dataset: str = Field(description="rows file of the preflight: tokenised (RLVR: rows whose prompts fit)")
    chat_template: str = Field(description="text of the Jinja template")
    held_out: str | None = Field(None, description="rows file of the preflight of held-out rows")
    held_out_rows: str | None = Field(None, description="the same rows as text: their ids name their sources")


class SFTInputs(TrainingInputs):
    """Those of SFT."""

    weights: str | None = Field(None, description="weights.parquet of the rows file that the preflight read")


class DPOInputs(TrainingInputs):
    """Those of DPO."""

    reference_logps: str = Field(description="file of the reference's log-probabilities, one line a tokenised pair")
    held_out_reference_logps: str | None = Field(None, description="the same of the held-out pairs")
