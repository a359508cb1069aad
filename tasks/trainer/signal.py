"""Stops RLVR where no reward ever differs from another: such a run would train nothing and yet complete.

A group is the rollouts of one prompt whose rewards are compared (GRPO, RLOO); where an algorithm compares all rollouts
of a batch (PPO), the batch is one group. Rules are pure functions; grpo.py and ppo_trainer.py of tasks/training apply
them. docs/guards.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Share of the groups of a batch of rollouts whose rewards differ, as it is logged.
METRIC = "groups_with_signal"
#: A whole run of fewer rollouts is a trial, which is warned only; ours.
TRIAL_ROLLOUTS = 100
#: File of a checkpoint.
_STATE_FILE = "signal.json"
_NUM_SHOWN = 3
_SHOWN_CHARACTERS = 240


def share_with_signal(rewards: Sequence[float], group_size: int) -> float:
    """Share of the groups in which two rewards differ. `rewards`: group after group; NaN: could not be graded."""
    groups = [rewards[first : first + group_size] for first in range(0, len(rewards), group_size)]
    graded = [[reward for reward in group if not math.isnan(reward)] for group in groups]
    return sum(min(group) < max(group) for group in graded if group) / max(len(groups), 1)


@dataclass
class SignalWatch:
    """Counts the rollouts until rewards of one group differ for the first time.

    max_rollouts  so many without a signal are too many; 0: never
    """

    max_rollouts: int
    num_rollouts: int = 0
    has_signal: bool = False

    def save(self, checkpoint: Path) -> None:
        """Keep what was seen in a checkpoint: metrics may not have been logged yet."""
        seen = {"num_rollouts": self.num_rollouts, "has_signal": self.has_signal}
        (checkpoint / _STATE_FILE).write_text(json.dumps(seen))

    @staticmethod
    def of(max_rollouts: int, checkpoint: Path | None) -> SignalWatch:
        """The watch of a training that begins, or goes on from a checkpoint."""
        if checkpoint is None:
            return SignalWatch(max_rollouts)
        file = checkpoint / _STATE_FILE
        if not file.exists():  # of an older version, which does not say: then there is nothing to stop for
            return SignalWatch(max_rollouts, has_signal=True)
        seen = json.loads(file.read_text())
        return SignalWatch(max_rollouts, int(seen["num_rollouts"]), bool(seen["has_signal"]))

    def add(self, rewards: Sequence[float], group_size: int) -> float:
        """Take in a batch of rollouts; returns its share of groups with a signal."""
        share = share_with_signal(rewards, group_size)
        self.num_rollouts += len(rewards)
        self.has_signal = self.has_signal or share > 0
        return share

    def is_hopeless(self, is_last: bool) -> bool:
        """Whether to stop now. `is_last`: the training ends with these rollouts."""
        if not self.max_rollouts or self.has_signal:
            return False
        enough = min(self.max_rollouts, TRIAL_ROLLOUTS) if is_last else self.max_rollouts
        return self.num_rollouts >= enough

    def is_warned(self, is_last: bool) -> bool:
        """Whether a trial ends without a signal."""
        return bool(self.max_rollouts) and is_last and not self.has_signal and not self.is_hopeless(is_last)


@dataclass(frozen=True)
class Rollout:
    """A completion, what it was asked, what its verifier says, and what it earned (NaN: could not be graded)."""

    prompt: str
    completion: str
    verifier: str
    ground_truth: str
    verdict: str
    reward: float


def without_signal(watch: SignalWatch, rollouts: Sequence[Rollout]) -> str:
    """The error, with a few rollouts: those of different prompts first."""
    first: dict[str, Rollout] = {}
    for rollout in rollouts:
        first.setdefault(rollout.prompt, rollout)
    others = [rollout for rollout in rollouts if rollout is not first[rollout.prompt]]
    shown = [*first.values(), *others][:_NUM_SHOWN]
    lines = [
        f"  {_short(one.prompt)} -> {_short(one.completion)}; ground truth {_short(one.ground_truth)}; verifier "
        f"{one.verifier}: {one.verdict}, reward {one.reward:g}"
        for one in shown
    ]
    return (
        f"no reward differed from the others of its group in {watch.num_rollouts:,} rollouts, so there was nothing to "
        "learn from:\n" + "\n".join(lines) + "\nWhere these answers are right, the verifier does not fit the data's "
        "form: choose another. Where they are wrong or do not end, start from a better model, take easier prompts or "
        "raise max_completion_length. To go on all the same, set rlvr.max_rollouts_without_signal to 0"
    )


def _short(text: str) -> str:
    """The end of a text: there stand the question and the answer."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else "…" + text[-_SHOWN_CHARACTERS:])
