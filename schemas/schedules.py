"""Settings of learning-rate schedules. What they compute is in tasks/trainer/schedules.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self, get_args

from pydantic import model_validator

from smoltulu.schemas.budget import share_of
from smoltulu.schemas.common import StrictModel, science

DecayShape = Literal["linear", "cosine", "1-sqrt", "inverse", "half-life", "exponential"]


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
