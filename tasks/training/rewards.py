"""Rewards of rollouts from the verdicts of their verifiers; the same for every algorithm of RLVR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.verifiers import verify


def rollout_reward(
    verdict: float | None, stopped: bool, reward_correct: float, non_stop_reward: float | None
) -> float | None:
    """Reward of one rollout; None (left out of the advantage) where the ground truth cannot be graded."""
    if verdict is None:
        return None
    if not stopped and non_stop_reward is not None:
        return non_stop_reward
    return reward_correct * verdict


def reward_function(config: RLVRSettings, eos_token_id: int | list[int]) -> Callable[..., list[float | None]]:
    """The verifiers as a TRL reward function; `completions` are lists of one assistant message.

    `eos_token_id`: every token that ends a completion.
    """
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)

    def verifiable_reward(
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        verifier: list[str],
        ground_truth: list[str],
        **columns: Any,
    ) -> list[float | None]:
        return [
            rollout_reward(
                verify(name, completion[0]["content"], truth),
                bool(ids) and ids[-1] in stops,
                config.reward_correct,
                config.non_stop_reward,
            )
            for completion, ids, name, truth in zip(completions, completion_ids, verifier, ground_truth, strict=True)
        ]

    return verifiable_reward


#: What became of a rollout. Of one that is not graded there is no reward: it is in no loss, and counted.
Verdict = Literal["right", "wrong", "no_eos", "could_not_grade"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Score:
    """Reward of one rollout (None: could not be graded), what it was given for, and why in words."""

    reward: float | None
    verdict: Verdict
    reason: str = ""


def score_rollout(config: RLVRSettings, verifier: str, ground_truth: str, text: str, stopped: bool) -> Score:
    """Reward and verdict of one rollout. `text`: what the model wrote, without the token that ended it."""
    verdict = verify(verifier, text, ground_truth)
    reward = rollout_reward(verdict, stopped, config.reward_correct, config.non_stop_reward)
    if reward is None:
        return Score(None, "could_not_grade", f"{verifier} cannot read the ground truth")
    if not stopped and config.non_stop_reward is not None:
        return Score(reward, "no_eos", f"no end within {config.max_completion_length:,} tokens")
    return Score(reward, "right" if verdict else "wrong", f"{verifier}: {verdict:g}")
