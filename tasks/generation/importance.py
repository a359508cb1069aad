"""Truncated importance sampling: a correction where the sampler's distribution is not quite the policy's.

An engine with other kernels or another precision draws tokens from a distribution that differs from the one that the
update differentiates. The ratio of the two, cut off at a cap, weighs each token's loss (arXiv 1802.01561, equation 4;
for language models: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", whose
cap is 2). Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def importance_weights(
    logps: torch.Tensor, sampled_logps: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(exp(logps - sampled_logps), cap) of each token, and the ratio before the cut; both shaped as the arguments.

    Args:
        logps: of the policy that wrote, as the update computes them.
        sampled_logps: of the sampler, under the distribution that it drew from.
        cap: None: no correction, the weights are 1; the ratio is told all the same.
    """
    import torch

    ratio = torch.exp(logps - sampled_logps)
    return (torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)), ratio
