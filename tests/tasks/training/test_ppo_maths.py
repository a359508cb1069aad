"""PPO's pure functions: by hand, against a literal float64 copy of the published loops, by gradcheck, by identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.training.ppo_maths import (
    explained_variance,
    gae,
    kl_estimate,
    policy_losses,
    response_mask,
    rewards_to_go,
    targets,
    token_rewards,
    value_losses,
    whiten,
)

F64 = torch.float64


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ---------------------------------------------------------------------------------------------------------- by hand


def test_rewards_by_hand() -> None:
    """Two responses of three and one tokens; beta 0.5."""
    mask = response_mask(torch.tensor([3, 1]), 3)
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    kl = kl_estimate(tensor([[-1.0, -2, -3], [-1, 9, 9]]), tensor([[-1.5, -2, -1], [-3, 9, 9]]))
    assert kl.tolist() == [[0.5, 0, -2], [2, 0, 0]]
    assert token_rewards(tensor([10.0, -10]), kl, mask, 0.5).tolist() == [[-0.25, 0, 11], [-11, 0, 0]]
    assert token_rewards(tensor([10.0, -10]), None, mask, 0.5).tolist() == [[0, 0, 10], [-10, 0, 0]]


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5: deltas from behind 10 - 4, 0 + 2 - 2, 1 + 1 - 8."""
    mask = response_mask(torch.tensor([3, 2]), 3)
    rewards, values = tensor([[1.0, 0, 10], [0, 1, 0]]), tensor([[8.0, 2, 4], [3, 5, 99]])
    advantages = gae(rewards, values, mask, 0.5, 0.5)
    # 6; 0 + 0.25 * 6; -6 + 0.25 * 1.5. And 1 - 5; (0 + 0.5 * 5 - 3) + 0.25 * -4. The 99 is behind the end.
    assert advantages.tolist() == [[-5.625, 1.5, 6], [-1.5, -4, 0]]
    assert rewards_to_go(rewards, mask, 0.5).tolist() == [[3.5, 5, 10], [0.5, 1, 0]]
    made = targets(rewards, values, mask, gamma=0.5, gae_lambda=0.5, critic_lambda=1.0, is_whitened=False)
    assert made.advantages.tolist() == advantages.tolist()
    # lambda 1: the critic learns what was observed, whatever it said before.
    assert made.returns.tolist() == made.rewards_to_go.tolist() == [[3.5, 5, 10], [0.5, 1, 0]]
    critic_too = targets(rewards, values, mask, gamma=0.5, gae_lambda=0.5, critic_lambda=0.5, is_whitened=False)
    assert critic_too.returns.tolist() == [[2.375, 3.5, 10], [1.5, 1, 0]]


def test_whitening_by_hand() -> None:
    """1, 2, 3 have a mean of 2 and an unbiased variance of 1; what is outside of the mask does not count."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    made = whiten(tensor([[1.0, 2, 77], [3, 77, 77]]), mask)
    assert made.tolist() == [[pytest.approx(-1, abs=1e-7), 0, 0], [pytest.approx(1, abs=1e-7), 0, 0]]
    assert whiten(tensor([[5.0]]), torch.tensor([[True]])).tolist() == [[0]]
    assert whiten(tensor([[5.0, 5]]), torch.tensor([[True, True]])).tolist() == [[0, 0]]
    assert whiten(tensor([[5.0]]), torch.tensor([[False]])).tolist() == [[0]]


def test_losses_by_hand() -> None:
    ratios = tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    losses, is_clipped = policy_losses(ratios.log(), tensor([0.0] * 5), tensor([2.0, 2, -2, 2, -2]), 0.2)
    assert losses.tolist() == pytest.approx([-2, -2.4, 3, -1, 1.6])
    assert is_clipped.tolist() == [False, True, False, False, True]
    # A value that left its old one by more than 0.2 counts as one at 0.2, where that is further from the return.
    values, old = tensor([1.0, 1, 1, 1]), tensor([1.1, 0, 0, 0])
    losses, is_clipped = value_losses(values, old, tensor([0.0, 2, 0.9, 0.2]), 0.2)
    assert losses.tolist() == pytest.approx([0.5, 0.5 * 1.8**2, 0.5 * 0.7**2, 0.5 * 0.8**2])
    assert is_clipped.tolist() == [False, True, True, False]


def test_explained_variance_by_hand() -> None:
    wanted = tensor([1.0, 2, 3, 4])
    assert explained_variance(wanted, wanted) == 1
    assert explained_variance(tensor([9.0] * 4), wanted) == 0
    assert explained_variance(-wanted, wanted) == pytest.approx(-3)
    assert explained_variance(wanted, tensor([7.0] * 4)) == explained_variance(wanted[:1], wanted[:1]) == 0


# ----------------------------------------------------------------------------- the published loops, literally, in float


def published(
    lengths: list[int], longest: int, scores: list[float], logps: list[list[float]], refs: list[list[float]],
    values: list[list[float]], *, beta: float, gamma: float, lam: float, behind: bool,
) -> tuple[list[list[float]], list[list[float]]]:  # fmt: skip
    """Advantages (whitened) and returns by open-instruct's index rules, a number at a time.

    behind  True: the score at its published place, the token behind the last one where that fits; the values keep that
            place too (`padding_mask_p1`). False: at the last token, and the values end there
    """
    advantages = [[0.0] * longest for _ in lengths]
    returns = [[0.0] * longest for _ in lengths]
    for i, length in enumerate(lengths):
        sequence_length = length - 1  # of the last token
        end_of_values = sequence_length + 1 if behind else sequence_length
        rewards = [0.0] * longest
        seen = [0.0] * longest
        for t in range(longest):
            # A token outside of the response has log-probability 1.0 on both sides.
            inside = t <= sequence_length
            rewards[t] = -beta * ((logps[i][t] if inside else 1.0) - (refs[i][t] if inside else 1.0))
            seen[t] = values[i][t] if t <= end_of_values else 0.0
        p1 = sequence_length + 1
        rewards[p1 if behind and p1 < longest else sequence_length] += scores[i]
        last = 0.0
        for t in reversed(range(longest)):
            next_value = seen[t + 1] if t < longest - 1 else 0.0
            delta = rewards[t] + gamma * next_value - seen[t]
            last = delta + gamma * lam * last
            advantages[i][t] = last
            returns[i][t] = last + seen[t]
    inside = [advantages[i][t] for i, length in enumerate(lengths) for t in range(length)]
    mean = sum(inside) / len(inside)
    variance = sum((a - mean) ** 2 for a in inside) / (len(inside) - 1)
    white = [
        [(a - mean) / math.sqrt(variance + 1e-8) if t < lengths[i] else 0.0 for t, a in enumerate(row)]
        for i, row in enumerate(advantages)
    ]
    return white, returns


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    longest = draw(st.integers(2, 7))
    lengths = draw(st.lists(st.integers(1, longest), min_size=2, max_size=5))
    number = st.floats(-5, 5, allow_nan=False, width=32)
    grid = st.lists(st.lists(number, min_size=longest, max_size=longest), min_size=len(lengths), max_size=len(lengths))
    return {
        "lengths": lengths, "longest": longest,
        "scores": draw(st.lists(st.sampled_from([10.0, 0.0, -10.0]), min_size=len(lengths), max_size=len(lengths))),
        "logps": draw(grid), "refs": draw(grid), "values": draw(grid),
    }  # fmt: skip


def ours(
    lengths: list[int], longest: int, scores: list[float], logps: Any, refs: Any, values: Any,
    *, beta: float, gamma: float, lam: float,
) -> Any:  # fmt: skip
    mask = response_mask(torch.tensor(lengths), longest)
    rewards = token_rewards(tensor(scores), kl_estimate(tensor(logps), tensor(refs)), mask, beta)
    made = targets(
        rewards, tensor(values), mask, gamma=gamma, gae_lambda=lam, critic_lambda=lam, is_whitened=True
    )  # fmt: skip
    return made, mask


@given(batches(), st.floats(0.5, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_against_the_published_loops(batch: dict[str, Any], gamma: float, lam: float, beta: float) -> None:
    made, mask = ours(**batch, beta=beta, gamma=gamma, lam=lam)
    advantages, returns = published(**batch, beta=beta, gamma=gamma, lam=lam, behind=False)
    torch.testing.assert_close(made.advantages, tensor(advantages), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(made.returns[mask], tensor(returns)[mask], rtol=1e-9, atol=1e-9)


@given(batches(), st.floats(0, 0.5))
def test_the_published_place_of_the_score_is_the_same_for_lambda_one(batch: dict[str, Any], beta: float) -> None:
    made, mask = ours(**batch, beta=beta, gamma=1.0, lam=1.0)
    advantages, returns = published(**batch, beta=beta, gamma=1.0, lam=1.0, behind=True)
    torch.testing.assert_close(made.advantages, tensor(advantages), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(made.returns[mask], tensor(returns)[mask], rtol=1e-9, atol=1e-9)


def test_and_another_one_below_it() -> None:
    """What the departure changes: the score reaches a token through one value and one lambda less."""
    batch = {
        "lengths": [2, 4], "longest": 4, "scores": [10.0, 0.0], "logps": [[0.0] * 4] * 2, "refs": [[0.0] * 4] * 2,
        "values": [[1.0] * 4] * 2,
    }  # fmt: skip
    _, here = published(**batch, beta=0.0, gamma=1.0, lam=0.5, behind=False)  # type: ignore[arg-type]
    _, there = published(**batch, beta=0.0, gamma=1.0, lam=0.5, behind=True)  # type: ignore[arg-type]
    assert here[0][:2] == [5.5, 10.0] and there[0][:3] == [3.25, 5.5, 10.0]
    assert here[1] == there[1]  # as long as allowed: no place behind it


# ------------------------------------------------------------------------------------------------------- identities


def test_gradients() -> None:
    torch.manual_seed(0)
    logps = torch.randn(9, dtype=F64).sub(1).requires_grad_()
    old, advantages = logps.detach() + 0.3 * torch.randn(9, dtype=F64), torch.randn(9, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: policy_losses(x, old, advantages, 0.2)[0], logps)
    values = torch.randn(9, dtype=F64, requires_grad=True)
    before, returns = values.detach() + 0.3 * torch.randn(9, dtype=F64), torch.randn(9, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: value_losses(x, before, returns, 0.2)[0], values)


def test_an_endless_clip_is_the_unclipped_gradient() -> None:
    torch.manual_seed(1)
    old, advantages = torch.randn(50, dtype=F64), torch.randn(50, dtype=F64)
    logps = (old + torch.randn(50, dtype=F64)).requires_grad_()
    (wide,) = torch.autograd.grad(policy_losses(logps, old, advantages, 1e9)[0].mean(), logps)
    (free,) = torch.autograd.grad((-advantages * (logps - old).exp()).mean(), logps)
    assert torch.equal(wide, free)
    (clipped,) = torch.autograd.grad(policy_losses(logps, old, advantages, 0.2)[0].mean(), logps)
    assert not torch.allclose(clipped, free)


def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_and_its_gradient_reinforce() -> None:
    """lambda 1, a critic of zeros, no whitening: REINFORCE with the KL term in the reward, to 1e-12 in float64."""
    torch.manual_seed(2)
    lengths, longest = torch.tensor([5, 2, 1]), 5
    mask = response_mask(lengths, longest)
    logps = torch.randn(3, longest, dtype=F64).sub(2).requires_grad_()
    refs, scores, beta = logps.detach() + torch.randn(3, longest, dtype=F64), tensor([10.0, 0, -10]), 0.05
    rewards = token_rewards(scores, kl_estimate(logps.detach(), refs), mask, beta)
    made = targets(
        rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0, critic_lambda=1.0, is_whitened=False
    )
    loss = policy_losses(logps[mask], logps.detach()[mask], made.advantages[mask], 0.2)[0].mean()
    assert loss.item() == pytest.approx(-made.advantages[mask].mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logps)

    expected = torch.zeros_like(rewards)
    for i, length in enumerate(lengths.tolist()):
        for t in range(length):
            to_go = sum(-beta * (logps[i, u] - refs[i, u]).item() for u in range(t, length)) + scores[i].item()
            expected[i, t] = -to_go / int(lengths.sum())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert not gradient[~mask].any()
