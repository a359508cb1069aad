"""Rewards of rollouts from the verdicts of their verifiers; the same for every algorithm of RLVR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
