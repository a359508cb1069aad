"""PPO's mathematics on ragged responses, padded on the right. Pure: tensors in, tensors out, no model.

The rules are those of Tulu 3 (open-instruct `ppo_vllm_thread_ray_gtrl.py` at 26b7325), but for two, told where they
are: the token that gets the score, and what losses are averaged over. Shapes: (B, T) is (episodes, response tokens),
(N,) the N response tokens of all episodes, one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Added to the variance of advantages before its root is taken; Tulu 3.
WHITENING_EPSILON = 1e-8


def response_mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """True at the tokens of each response, (B, T). lengths: (B,), each at least 1; longest: T."""
    return torch.arange(longest, device=lengths.device)[None] < lengths[:, None]


def kl_estimate(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """k1, the log-ratio: its mean over tokens of the policy is KL(policy || reference) (Schulman's estimator k1)."""
    return logps - reference_logps


def token_rewards(scores: torch.Tensor, kl: torch.Tensor | None, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """-beta k1 at every response token, and the score at the last one besides. (B, T), 0 outside of the responses.

    The last token is the eos where there is one. Tulu 3 puts the score one place behind it, at a padding token, where
    the response is shorter than the longest allowed, and at the last token else. There, values and their mask have a
    place that no action belongs to, and the score of an answer depends on how much room was left. Here every reward
    belongs to a token that the policy wrote. For gae_lambda 1 and gamma 1 the advantages are the same.

    Args:
        scores: (B,) of whole responses.
        kl: (B, T), see `kl_estimate`; None: no such term.
        mask: (B, T), see `response_mask`.
    """
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if kl is not None:
        rewards[mask] = -beta * kl[mask]
    episodes = torch.arange(len(scores), device=scores.device)
    rewards[episodes, mask.sum(dim=1) - 1] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Generalised advantage estimates (arXiv 1506.02438, equation 16), (B, T), 0 outside of the responses.

    delta_t = r_t + gamma V_(t+1) - V_t and A_t = delta_t + gamma lambda A_(t+1). V_t is the value before token t.
    Behind the last token both are 0, also where the response was cut at its longest (Tulu 3).
    """
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(len(rewards))
    next_values = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        # Before a response's last token is reached from behind, both stay 0.
        following = torch.where(inside, delta + gamma * gae_lambda * following, 0.0)
        next_values = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = following
    return advantages


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """sum over u >= t of gamma^(u - t) r_u, (B, T): what followed each token, whatever the critic says."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the tokens of the mask, 0 elsewhere.

    The variance is the unbiased one, as in Tulu 3, over all tokens that are given: of the whole rollout batch, where
    Tulu 3 takes those of one process. A single token becomes 0.
    """
    whitened = torch.zeros_like(values)
    tokens = values[mask]
    if len(tokens) > 1:
        whitened[mask] = (tokens - tokens.mean()) * torch.rsqrt(tokens.var(correction=1) + WHITENING_EPSILON)
    return whitened


@dataclass(frozen=True)
class Targets:
    """What a rollout batch is trained on, each (B, T) and 0 outside of the responses.

    advantages        of the policy; whitened where asked
    returns           of the critic: its own advantages (its own lambda) plus the values
    rewards_to_go     observed, without any value: what explained variance is measured against
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    rewards_to_go: torch.Tensor


def targets(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    critic_lambda: float,
    is_whitened: bool,
) -> Targets:
    """Advantages and returns of a rollout batch. Values are those before the update, (B, T)."""
    advantages = gae(rewards, values, mask, gamma, gae_lambda)
    of_critic = gae(rewards, values, mask, gamma, critic_lambda)
    returns = torch.where(mask, of_critic + values, 0.0)
    if is_whitened:
        advantages = whiten(advantages, mask)
    return Targets(advantages, returns, rewards_to_go(rewards, mask, gamma))


def policy_losses(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A rho, -A clip(rho, 1 - epsilon, 1 + epsilon)) of each token (arXiv 1707.06347, equation 7), rho the ratio.

    The mean is the caller's: over the tokens of the optimizer step, whatever its micro-batches. Tulu 3 averages means
    over micro-batches of two, which weigh a token by the length of its neighbours.

    Returns:
        losses (N,), and where the clipped ratio decides (N,).
    """
    ratio = torch.exp(logps - old_logps)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(free, clipped), clipped > free


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, value_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each token; the mean is the caller's.

    Returns:
        losses (N,), and where the clipped value decides (N,).
    """
    near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(free, clipped), clipped > free


def explained_variance(values: torch.Tensor, targets: torch.Tensor) -> float:
    """1 - Var(target - value) / Var(target) over tokens (N,): 1 perfect, 0 no better than a constant, below 0 worse.

    NaN-free: where all targets are the same, there is nothing to explain, and it is 0.
    """
    if len(targets) < 2 or not (spread := targets.var().item()):
        return 0.0
    return 1 - (targets - values).var().item() / spread
