"""Settings of the four training stages. Every default names its source; `ours` where no source gives one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.common import StrictModel, machinery, science

Schedule = Literal["linear", "cosine", "constant"]
DecayShape = Literal["linear", "cosine", "1-sqrt", "inverse", "half-life", "exponential"]


def share_of(ratio: float, num_steps: int) -> int:
    """`ratio` of `num_steps` steps, rounded up; 7 % of 100 is 7, though 100 * 0.07 is 7.000000000000001."""
    return math.ceil(num_steps * ratio - 1e-9)


# --- Learning-rate schedules: what they compute is in tasks/trainer/schedules.py, the formulas in docs/schedules.md ---


class WarmUp(StrictModel):
    """What every schedule has: a linear rise that ends at the full learning rate."""

    warmup_steps: int = science(0, ge=0, description="optimizer steps")

    def num_warmup_steps(self, num_steps: int) -> int:
        """Optimizer steps of warm-up in a training of `num_steps`."""
        return self.warmup_steps

    def check(self, num_steps: int) -> None:
        """ValueError where the schedule cannot be had in a training of `num_steps` optimizer steps."""
        warmup = self.num_warmup_steps(num_steps)
        if warmup > num_steps:
            raise ValueError(f"schedule: {warmup:,} steps of warm-up are more than all {num_steps:,}; shorten it")


class WarmUpShare(WarmUp):
    """Warm-up in steps, or as a share where the number of steps follows from epochs."""

    warmup_ratio: float = science(
        0.0, ge=0, le=1, description="share of all steps, rounded up; instead of warmup_steps"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio} are two answers; give one"
            )
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        return self.warmup_steps or share_of(self.warmup_ratio, num_steps)


class LinearSchedule(WarmUpShare):
    """Falls linearly to `min_lr_ratio` at the end."""

    kind: Literal["linear"] = science("linear")
    min_lr_ratio: float = science(0.0, ge=0, lt=1, description="last learning rate / learning_rate")


class CosineSchedule(WarmUpShare):
    """Falls as half a cosine to `min_lr_ratio` at the end."""

    kind: Literal["cosine"] = science("cosine")
    min_lr_ratio: float = science(0.0, ge=0, lt=1, description="0: transformers; 0.1 is usual in pretraining")


class ConstantSchedule(WarmUpShare):
    """Stays."""

    kind: Literal["constant"] = science("constant")


class Budgets(WarmUp):
    """A schedule in cycles whose ends are in the recipe; the last one is the end of training.

    Warm-up is in steps only: a share of all would change the past when a budget is appended.
    """

    budgets: tuple[int, ...] = science(
        min_length=1, description="optimizer steps at which a cycle ends, e.g. [500, 1000, 2000]; more can be appended"
    )

    @model_validator(mode="after")
    def _budgets_rise(self) -> Self:
        if any(b <= a for a, b in pairwise((0, *self.budgets))):
            raise ValueError(f"budgets {list(self.budgets)} must rise from one to the next, and the first be positive")
        return self

    def check(self, num_steps: int) -> None:
        if num_steps != self.budgets[-1]:
            raise ValueError(
                f"schedule: the training has {num_steps:,} steps and the last of budgets {list(self.budgets)} is "
                f"another; set max_steps (rlvr: num_steps) to {self.budgets[-1]}, or change the budgets"
            )
        if self.warmup_steps > self.budgets[0]:
            raise ValueError(
                f"schedule: {self.warmup_steps:,} steps of warm-up do not fit into the first of budgets "
                f"{list(self.budgets)}; shorten it"
            )


class CyclicCosineSchedule(Budgets):
    """Half a cosine down to `min_lr_ratio` at every budget, then at once back to the full learning rate."""

    kind: Literal["cyclic_cosine"] = science("cyclic_cosine")
    min_lr_ratio: float = science(0.1, ge=0, lt=1, description="ours, as for WSD-S beside which it is compared")


class Decay(StrictModel):
    """The shape of a decay from 1 to `min_lr_ratio`."""

    decay_shape: DecayShape = science("1-sqrt", description="1-sqrt: Hagele et al., arXiv 2405.18392")
    min_lr_ratio: float = science(0.0, ge=0, lt=1, description="inverse: above 0; half-life: the floor")
    half_life_steps: float | None = science(None, gt=0, description="half-life only: steps in which the rate halves")

    @model_validator(mode="after")
    def _shape_has_what_it_needs(self) -> Self:
        if self.decay_shape == "inverse" and not self.min_lr_ratio:
            raise ValueError("decay_shape inverse never reaches 0: set min_lr_ratio above it, e.g. 0.1 (WSD-S)")
        if (self.decay_shape == "half-life") != (self.half_life_steps is not None):
            raise ValueError(
                f"decay_shape {self.decay_shape} with half_life_steps {self.half_life_steps}: half_life_steps goes "
                "with decay_shape half-life, and must be given there"
            )
        return self


class FinalDecay(Decay, WarmUpShare):
    """One decay, at the end of training. Its length has no default: too short a decay is the usual mistake."""

    decay_steps: int = science(0, ge=0, description="optimizer steps; this or decay_ratio")
    decay_ratio: float = science(0.0, ge=0, le=1, description="share of all steps, rounded up; this or decay_steps")

    @model_validator(mode="after")
    def _one_decay_length(self) -> Self:
        if bool(self.decay_steps) == bool(self.decay_ratio):
            raise ValueError(
                f"decay_steps {self.decay_steps}, decay_ratio {self.decay_ratio}: give exactly one of them, above 0, "
                "e.g. decay_ratio 0.1 (MiniCPM) or 0.25 for a training of few thousand steps"
            )
        return self

    def num_decay_steps(self, num_steps: int) -> int:
        """Optimizer steps of decay in a training of `num_steps`."""
        return self.decay_steps or share_of(self.decay_ratio, num_steps)

    def check(self, num_steps: int) -> None:
        warmup, decay = self.num_warmup_steps(num_steps), self.num_decay_steps(num_steps)
        if warmup + decay > num_steps:
            raise ValueError(
                f"schedule: {warmup:,} steps of warm-up and {decay:,} of decay are more than all {num_steps:,}; "
                "shorten one"
            )


class WSDSchedule(FinalDecay):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 eq. 1)."""

    kind: Literal["wsd"] = science("wsd")


class WSDSSchedule(Decay, Budgets):
    """WSD-S (arXiv 2410.05192): a decay before every budget; goes on from the decayed weights at the full rate."""

    kind: Literal["wsd_s"] = science("wsd_s")
    decay_shape: DecayShape = science("inverse", description="WSD-S paper; lingua, levanter")
    min_lr_ratio: float = science(0.1, ge=0, lt=1, description="WSD-S paper")
    decay_ratio: float = science(gt=0, lt=1, description="share of `decay_base`, rounded up; 0.1 in levanter's configs")
    decay_base: Literal["cumulative", "period"] = science(
        "cumulative",
        description="cumulative: share of all steps up to the budget (lingua); period: of the steps since the budget "
        "before (levanter, OLMo-core)",
    )

    @model_validator(mode="after")
    def _decays_fit(self) -> Self:
        lengths = self.decay_lengths()
        for number, (before, budget) in enumerate(pairwise((0, *self.budgets))):
            warmup = self.warmup_steps if number == 0 else 0
            room, length = budget - before - warmup, lengths[number]
            if length > room:
                raise ValueError(
                    f"the decay before budget {budget:,} is {length:,} steps (decay_ratio {self.decay_ratio}, "
                    f"{self.decay_base}), and there are {room:,} after {'the warm-up' if warmup else f'{before:,}'}; "
                    "lower decay_ratio, set decay_base to period, or move the budgets apart"
                )
        return self

    def decay_lengths(self) -> tuple[int, ...]:
        """Optimizer steps of the decay before each budget."""
        return tuple(
            share_of(self.decay_ratio, budget if self.decay_base == "cumulative" else budget - before)
            for before, budget in pairwise((0, *self.budgets))
        )


class PowerSchedule(FinalDecay):
    """Power law in tokens n (arXiv 2408.13359), anchored: (n / anchor_tokens) ** exponent, at most 1; final decay."""

    kind: Literal["power"] = science("power")
    anchor_tokens: int = science(ge=1, description="tokens up to which learning_rate holds, and from which it falls")
    exponent: float = science(-0.51, lt=0, ge=-2, description="Power paper, section 4: -0.51; searched -0.6 to -0.4")
    initial_tokens: int = science(
        0, ge=0, description="tokens that count as trained before step 0: go on down the curve of another training"
    )
    decay_shape: DecayShape = science("exponential", description="Power paper")


ScheduleSettings = (
    LinearSchedule
    | CosineSchedule
    | ConstantSchedule
    | CyclicCosineSchedule
    | WSDSchedule
    | WSDSSchedule
    | PowerSchedule
)
SCHEDULE_KINDS = tuple(str(model.model_fields["kind"].default) for model in get_args(ScheduleSettings))


# --- Stages -----------------------------------------------------------------------------------------------------------


class TrainingSettings(StrictModel):
    """What every training stage has."""

    learning_rate: float = science(gt=0, lt=1)
    effective_batch_size: int = science(
        ge=1, description="sequences (SFT), pairs (reward model, DPO) or completions (RLVR) per optimizer step"
    )
    lr_scheduler_type: Schedule = science("linear")
    warmup_ratio: float = science(0.0, ge=0, lt=1, description="share of all steps; transformers: 1 is one step")
    schedule: ScheduleSettings | None = science(
        None,
        absent=None,
        discriminator="kind",
        description="instead of lr_scheduler_type and warmup_ratio, see docs/schedules.md",
    )
    weight_decay: float = science(0.0, ge=0)
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
        planned = self.planned_steps()
        if planned is not None:
            self.schedule.check(planned)
        elif isinstance(self.schedule, Budgets):
            raise ValueError(
                f"a schedule with budgets {list(self.schedule.budgets)} needs max_steps {self.schedule.budgets[-1]}: "
                "epochs do not say where it ends"
            )
        return self

    def planned_steps(self) -> int | None:
        """Optimizer steps, where the recipe says so; None where they follow from epochs and rows."""
        raise NotImplementedError


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
    """Stages that go over a set of rows: for so many epochs, optimizer steps or tokens."""

    num_train_epochs: float = science(1.0, gt=0)
    max_steps: int | None = science(None, ge=1, description="optimizer steps, instead of epochs")
    max_tokens: int | None = science(
        None, absent=None, ge=1, description="tokens, instead of epochs; rounded up to whole optimizer steps"
    )
    max_length: int = science(ge=8, description="tokens")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.max_steps is not None and self.max_tokens is not None:
            raise ValueError(f"max_steps {self.max_steps} and max_tokens {self.max_tokens} are two budgets; give one")
        return self

    def planned_steps(self) -> int | None:
        return self.max_steps


#: What becomes of a row that is longer than max_length.
Overlong = Literal["truncate", "drop"]


class SFTSettings(SupervisedSettings):
    """Loss on assistant tokens and the closing eos only."""

    overlong: Overlong = science(
        "truncate", absent="truncate", description="rows longer than max_length; truncate: cut at its end (Tulu 3)"
    )
    lora: LoraSettings | None = science(None, absent=None, description="none: every weight is trained (Tulu 3)")
    gate: GateSettings = machinery(GateSettings())

    @property
    def starts_from(self) -> str | None:
        return None

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

    def row_rules(self) -> RowRules:
        return RowRules(
            kind="pairs", max_length=self.max_length, overlong=self.overlong, trained_turns=self.trained_turns
        )


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
    gate: GateSettings = machinery(GateSettings())

    def planned_steps(self) -> int | None:
        return self.num_steps

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.effective_batch_size % self.num_generations:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}: a step must hold whole groups"
            )
        return self

    def row_rules(self) -> RowRules:
        return RowRules(kind="prompts", max_length=self.max_prompt_length, overlong="drop")


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


class DPOInputs(TrainingInputs):
    """Those of DPO."""

    reference_logps: str = Field(description="file of the reference's log-probabilities, one line a tokenised pair")
