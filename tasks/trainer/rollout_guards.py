"""Ends RLVR where the policy or its critic collapses: rules as pure functions, and the callback that applies them.

A rule looks at a mean over the last `window` optimizer steps, as they were logged, never at one batch. What was logged
is in every checkpoint, so a resumed training decides as an unbroken one. docs/guards.md.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.held_out import RolloutGuards
from smoltulu.tasks.stage import Diverged
from smoltulu.tasks.trainer.signal import METRIC

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Rule:
    """A limit of a logged metric.

    name     of the setting
    metric   as it is logged
    limit    of the mean over the window
    is_most  whether the limit is the largest that is allowed, else the least
    what     the metric in words
    advice   what to look at, or change
    """

    name: str
    metric: str
    limit: float
    is_most: bool
    what: str
    advice: str

    def is_broken(self, mean: float) -> bool:
        return mean > self.limit if self.is_most else mean < self.limit


class WindowMean:
    """Mean of a metric over the last `window` optimizer steps after step `first`, from what is logged."""

    def __init__(self, window: int, first: int = 0) -> None:
        self.window, self.first, self.step = window, first, 0
        # An entry stands for at least one step, so these are enough.
        self.spans: deque[tuple[int, float]] = deque(maxlen=window)

    def add(self, step: int, value: float) -> None:
        """`value` is the mean of the steps since the one that was added before. NaN is no value; infinity is one."""
        start, self.step = self.step, step
        if start >= self.first and step > start and not math.isnan(value):
            self.spans.append((step - start, value))

    def mean(self) -> float | None:
        """None while there are fewer steps than the window has."""
        taken: list[tuple[int, float]] = []
        for span in reversed(self.spans):
            taken.append(span)
            if (num_steps := sum(num for num, _ in taken)) >= self.window:
                return sum(num * value for num, value in taken) / num_steps
        return None


#: Setting -> metric, what it is in words, and advice. Settings that begin with `max_` are largest values.
_RULES: dict[str, tuple[str, str, str]] = {
    "max_kl": (
        "kl", "KL to the starting model, a token,",
        "The policy has left the model that it started from: lower learning_rate or raise beta",
    ),
    "min_entropy": (
        "entropy", "entropy of the policy, a token,",
        "The policy writes one answer to everything and explores nothing: lower learning_rate or raise beta; see in "
        "the samples whether what it writes is right, or pleases the verifier only",
    ),
    "max_truncated_share": (
        "completions/clipped_ratio", "share of completions without their end",
        "The policy forgets to stop, or is cut off: set non_stop_reward, raise max_completion_length, or lower "
        "learning_rate",
    ),
    "min_mean_length": (
        "completions/mean_length", "mean length of completions, in tokens,",
        "See in the samples whether short answers please the verifier without being right",
    ),
    "max_mean_length": (
        "completions/mean_length", "mean length of completions, in tokens,",
        "See in the samples whether answers repeat themselves, or list every candidate",
    ),
    "min_groups_with_signal": (
        METRIC, "share of groups whose rewards differ",
        "There is little left to learn from: leave prompts out that are always or never right (leave_out), or end the "
        "run earlier",
    ),
    "min_explained_variance": (
        "explained_variance", "explained variance of the critic",
        "Its values are worse than a constant, and so are the advantages: raise critic.warmup_steps or set "
        "critic.gae_lambda to 1, lower critic.learning_rate, or begin with another critic.initial",
    ),
}  # fmt: skip


def rules_of(guards: RolloutGuards) -> list[Rule]:
    """Those that are asked for."""
    made = []
    for name in guards.asked:
        metric, what, advice = _RULES[name]
        made.append(Rule(name, metric, getattr(guards, name), name.startswith("max_"), what, advice))
    return made


def said_of(rule: Rule, mean: float, step: int, window: int) -> str:
    """The error."""
    side = "above" if rule.is_most else "below"
    return (
        f"the policy collapses: at step {step:,} the {rule.what} is {mean:.4g} in the mean of the last {window:,} "
        f"steps, {side} guards.{rule.name} {rule.limit:g}; the checkpoints before it are kept. {rule.advice}. To go on "
        f"all the same, set another guards.{rule.name}: it goes on from the newest checkpoint"
    )


def rollout_guards(guards: RolloutGuards, num_warmup_steps: int = 0) -> TrainerCallback | None:
    """The callback that ends a training with a ValueError; every process logs the same and raises the same.

    None where nothing is asked for. `num_warmup_steps`: those of the critic, in which its values are not asked about,
    and the policy stands still.
    """
    rules = rules_of(guards)
    if not rules:
        return None
    from transformers import TrainerCallback

    class RolloutGuard(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.logging_steps > state.max_steps:
                raise ValueError(
                    f"compute.logging_steps {args.logging_steps:g} is more than the run's {state.max_steps:,} steps: "
                    f"no limit of guards ({', '.join(rule.name for rule in rules)}) would ever be asked; lower it"
                )
            self.means = {rule.name: WindowMean(guards.window, num_warmup_steps) for rule in rules}
            for row in state.log_history:  # of the steps before a resume
                self.add(row["step"], row)

        def add(self, step: int, row: dict[str, Any]) -> None:
            for rule in rules:
                if rule.metric in row:
                    self.means[rule.name].add(step, float(row[rule.metric]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.add(state.global_step, logs or {})
            for rule in rules:
                mean = self.means[rule.name].mean() if rule.metric in (logs or {}) else None
                if mean is not None and rule.is_broken(mean):
                    raise Diverged(said_of(rule, mean, state.global_step, guards.window))

    return RolloutGuard()
