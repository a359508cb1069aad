"""RLVR's prompts that are never trained on, what ends a run by them, and what a collapse of the policy is."""

from __future__ import annotations

from typing import Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from smoltulu.schemas.budget import Budget
from smoltulu.schemas.common import StrictModel, machinery, science

#: Which weights become the artifact: those of the last step, or those of the highest held-out accuracy.
Keep = Literal["last", "best"]


#: The exact test of seven prompts that all fall says p = 2 / 2^7, of eight 2 / 2^8 < 0.01.
MIN_PROMPTS_OF_A_FALL = 8
#: A fall is one of the mean of so many evaluations, the newest.
NUM_LATEST = 2


class HeldOutSettings(StrictModel):
    """Prompts of the run's own rows that are put aside and answered before, while and after the policy is trained.

    All of it is science: it decides which rows are trained on, and which weights are kept.
    """

    num_prompts: int = science(ge=2, description="prompts put aside; of held-out kinds, so many are answered at most")
    num_samples: int = science(1, ge=1, description="answers to each, at the run's temperature")
    every_steps: int = science(ge=1, description="optimizer steps; rounded up to the end of a batch of rollouts")
    kinds: tuple[str, ...] = science(
        (),
        description="functions of ifeval rows, kinds of constraint rows, or verifiers: none of their rows is trained",
    )
    max_drop: float | None = science(
        None, gt=0, lt=1, description="a run ends whose held-out accuracy has fallen by more than this, beyond noise"
    )
    max_kinds_drop: float | None = science(None, gt=0, lt=1, description="the same of held-out kinds")

    @field_validator("kinds")
    @classmethod
    def _one_spelling(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """Order, repetition and case mean nothing, so they must not change the key."""
        return tuple(sorted({kind.strip().lower() for kind in kinds}))

    @model_validator(mode="after")
    def _kinds_that_drop_are_named(self) -> Self:
        if self.max_kinds_drop is not None and not self.kinds:
            raise ValueError(
                f"max_kinds_drop {self.max_kinds_drop:g} is about held-out kinds, and kinds names none; name some, or "
                "leave it out"
            )
        is_asked = self.max_drop is not None or self.max_kinds_drop is not None
        if is_asked and self.num_prompts < MIN_PROMPTS_OF_A_FALL:
            raise ValueError(
                f"max_drop and max_kinds_drop need num_prompts of at least {MIN_PROMPTS_OF_A_FALL}, and it is "
                f"{self.num_prompts}: of fewer prompts even a fall of all is not beyond noise (p < 0.01)"
            )
        return self

    def most_answers(self) -> int:
        """Answers of one evaluation, at most."""
        return self.num_prompts * self.num_samples * (2 if self.kinds else 1)

    def every(self, cycle: int) -> int:
        """`every_steps`, rounded up to whole batches of rollouts, of `cycle` optimizer steps each."""
        return -(-self.every_steps // cycle) * cycle

    def num_evaluations(self, num_steps: int, cycle: int = 1, num_warmup_steps: int = 0) -> int:
        """Evaluations of a run of so many optimizer steps: at its start, on the way after a warm-up, and at its end."""
        every, last = self.every(cycle), num_steps - 1
        return 2 + last // every - min(num_warmup_steps, last) // every


class RolloutGuards(StrictModel):
    """What ends a run as failed: means over the last `window` optimizer steps. None: not asked.

    All of it is machinery: a run that none of it ends is the same run without it.
    """

    window: int = machinery(20, ge=1, description="optimizer steps of a mean; ours")
    max_kl: float | None = machinery(None, gt=0, description="to the starting model, a token; needs beta above 0")
    min_entropy: float | None = machinery(None, gt=0, description="of the policy, a token, in nats")
    max_truncated_share: float | None = machinery(None, gt=0, lt=1, description="completions without their end")
    min_mean_length: float | None = machinery(None, gt=0, description="of completions, in tokens")
    max_mean_length: float | None = machinery(None, gt=0, description="of completions, in tokens")
    min_groups_with_signal: float | None = machinery(
        None, gt=0, le=1, description="share of groups whose rewards differ; PPO: of batches of rollouts"
    )
    min_explained_variance: float | None = machinery(
        None, lt=1, description="of PPO's critic, after its warm-up; below 0 it is worse than a constant"
    )

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the limits that are set."""
        return tuple(n for n in type(self).model_fields if n != "window" and getattr(self, n) is not None)

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> Self:
        low, high = self.min_mean_length, self.max_mean_length
        if low is not None and high is not None and low >= high:
            raise ValueError(f"min_mean_length {low:g} is not below max_mean_length {high:g}: every run would end")
        return self


class Run(Protocol):
    """What `fault_of` asks of the settings of RLVR; they import this module."""

    @property
    def algorithm(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def guards(self) -> RolloutGuards: ...
    @property
    def held_out(self) -> HeldOutSettings | None: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def max_completion_length(self) -> int: ...
    @property
    def reward(self) -> str: ...
    @property
    def reward_model_weight(self) -> float: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def num_warmup_steps_of_critic(self) -> int | None: ...
    @property
    def num_steps_per_rollout(self) -> int: ...


def fault_of(run: Run) -> str | None:
    """What is wrong with the held-out prompts and guards of a run; None where they fit it."""
    held_out, guards, num_steps = run.held_out, run.guards, run.budget.max_steps or 0
    if run.keep == "best" and held_out is None:
        return "keep best needs held-out prompts to tell which weights are best: add a block held_out, or keep last"
    if held_out is not None and held_out.every_steps > num_steps > 0:
        return (
            f"held_out.every_steps {held_out.every_steps:,} is more than the run's {num_steps:,} optimizer steps; give "
            f"at most {num_steps:,}"
        )
    if held_out is not None and (fault := _fault_of_drop(run, held_out, num_steps)) is not None:
        return fault
    if guards.asked and guards.window > num_steps > 0:
        return (
            f"guards.window {guards.window:,} is more than the run's {num_steps:,} optimizer steps, so nothing would "
            f"ever be asked; give at most {num_steps:,}"
        )
    if guards.max_kl is not None and not run.beta:
        return "guards.max_kl needs the reference model, which beta 0 does without; raise beta, or leave max_kl out"
    for name in ("min_mean_length", "max_mean_length"):
        length = getattr(guards, name)
        if length is not None and length >= run.max_completion_length:
            return (
                f"guards.{name} {length:g} is not below max_completion_length {run.max_completion_length:,}, the most "
                "that a completion can have; lower it"
            )
    if guards.min_groups_with_signal is not None and run.reward == "constant":
        return "guards.min_groups_with_signal would end every run with reward constant; leave it out"
    if guards.min_groups_with_signal is not None and run.reward_model_weight:
        return (
            "guards.min_groups_with_signal would never end a run with reward_model_weight "
            f"{run.reward_model_weight:g}: scores of a reward model nearly always differ; leave one of them out"
        )
    return _fault_of_explained_variance(run, num_steps)


def _fault_of_drop(run: Run, held_out: HeldOutSettings, num_steps: int) -> str | None:
    """A limit of a fall that no evaluation would ever be asked about."""
    name = "max_drop" if held_out.max_drop is not None else "max_kinds_drop"
    if getattr(held_out, name) is None or not num_steps:
        return None
    made = held_out.num_evaluations(num_steps, run.num_steps_per_rollout, run.num_warmup_steps_of_critic or 0)
    # The first is the start. With keep best the last ends nothing: the run is over.
    needed = 1 + NUM_LATEST + (run.keep == "best")
    if made >= needed:
        return None
    return (
        f"held_out.{name} would never end this run: it asks the mean of {NUM_LATEST} evaluations after the start, "
        f"before the last step where keep is best, and there are {made - 1} after the start; lower "
        f"held_out.every_steps ({held_out.every_steps:,}), or leave {name} out"
    )


def _fault_of_explained_variance(run: Run, num_steps: int) -> str | None:
    guards, num_warmup_steps = run.guards, run.num_warmup_steps_of_critic
    if guards.min_explained_variance is None:
        return None
    if num_warmup_steps is None:
        return (
            f"guards.min_explained_variance is about a critic, and {run.algorithm} has none; leave it out, or take "
            "algorithm ppo"
        )
    if guards.window > num_steps - num_warmup_steps > 0:
        return (
            f"guards.window {guards.window:,} is more than the {num_steps - num_warmup_steps:,} optimizer steps after "
            "the critic's warm-up, so min_explained_variance would never be asked; lower one of the two"
        )
    return None


class HeldOutScore(StrictModel):
    """Share of verified answers after an optimizer step; None where nothing of the kind is held out."""

    step: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    stderr: float | None = Field(None, ge=0, description="clustered by prompt")
    kinds_accuracy: float | None = Field(None, ge=0, le=1)
    kinds_stderr: float | None = Field(None, ge=0)


class HeldOutOutputs(StrictModel):
    """What the held-out prompts say of a finished run, and which weights were kept."""

    num_prompts: int = Field(ge=1)
    num_prompts_of_kinds: int = Field(0, ge=0, description="that are answered")
    num_rows_left_out: int = Field(
        0, ge=0, description="not trained on: held out, of a held-out kind, or the same text"
    )
    start: HeldOutScore
    kept: HeldOutScore
    last: HeldOutScore
    why: str = Field(description="why these weights were kept")
    ended_early: str | None = Field(None, description="why the run ended before its budget did")
