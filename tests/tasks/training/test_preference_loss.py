"""The losses of DPO: by hand, against TRL's own, and `sigmoid_norm` against open-instruct's formula."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from smoltulu.schemas.training import DPOSettings, PreferenceLoss
from smoltulu.tasks.training.preference_loss import LogRatios, preference_loss
from tests.small_runs import pairs
from tests.tiny_model import build_tiny_model

NAMES = get_args(PreferenceLoss)
SMOOTHED = ("robust", "exo_pair")


def ratios(count: int, dtype: torch.dtype, scale: float = 3.0) -> LogRatios:
    generator = torch.Generator().manual_seed(count)
    chosen, rejected = scale * torch.randn(2, count, generator=generator, dtype=torch.float64)
    num_chosen, num_rejected = torch.randint(1, 9, (2, count), generator=generator)
    return LogRatios(chosen.to(dtype), rejected.to(dtype), num_chosen, num_rejected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # c = 2 over 4 tokens, r = -1 over 2, beta = 1/4: beta c = 1/2, beta r = -1/4, beta m = 3/4; averages 1/2, -1/2.
        ("sigmoid_norm", 0.5759394),  # -log sigma(1/4)
        ("sigmoid", 0.3868710),  # -log sigma(3/4)
        ("hinge", 0.25),  # 1 - 3/4
        ("ipo", 1.0),  # (1 - 2)^2
        ("robust", 0.2931210),  # (0.9 x 0.3868710 - 0.1 x 1.1368710) / 0.8
        ("exo_pair", 0.1827900),  # 0.6791787 (-0.3868710 + 0.1053605) + 0.3208213 (-1.1368710 + 2.3025851)
        ("nca_pair", 1.2490852),  # 0.4740770 + 0.9740770 / 2 + 0.5759394 / 2
        ("apo_zero", 0.8153642),  # sigma(-1/2) + sigma(-1/4)
        ("apo_down", 0.9432806),  # sigma(1/2) + sigma(-3/4)
        ("sppo_hard", 1.0),  # (2 - 2)^2 + (-1 + 2)^2
    ],
)
def test_by_hand(name: PreferenceLoss, expected: float) -> None:
    pair = LogRatios(*(torch.tensor([value], dtype=torch.float64) for value in (2, -1, 4, 2)))
    loss = preference_loss(name, pair, 0.25, 0.1 if name in SMOOTHED else 0.0)
    assert loss.tolist() == pytest.approx([expected], abs=2e-7)


def test_hinge_is_zero_past_its_margin() -> None:
    pair = LogRatios(*(torch.tensor([value]) for value in (9.0, -9.0, 1, 1)))
    assert preference_loss("hinge", pair, 0.25).tolist() == [0.0]


def test_robust_without_label_smoothing_is_dpo() -> None:
    given = ratios(16, torch.float64)
    assert torch.equal(preference_loss("robust", given, 0.3), preference_loss("sigmoid", given, 0.3))


def test_sigmoid_norm_is_dpo_norm_as_open_instruct_publishes_it() -> None:
    """open_instruct/dpo_utils.py: averages of log-probabilities first, then (pi_c - pi_r) - (ref_c - ref_r)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (2, 32), generator=generator)
    policy, reference = (-3 * torch.rand(2, 2, 32, generator=generator, dtype=torch.float64)).unbind()
    policy_margin, reference_margin = policy[0] - policy[1], reference[0] - reference[1]
    expected = torch.log1p(torch.exp(-5.0 * (policy_margin - reference_margin)))

    sums = lengths * (policy - reference)
    losses = preference_loss("sigmoid_norm", LogRatios(sums[0], sums[1], lengths[0], lengths[1]), 5.0)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's DPOTrainer as it comes; its loss is a method that takes the model as an argument."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    model = build_tiny_model(folder / "model")
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs(2)]
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(str(model)),
        ref_model=AutoModelForCausalLM.from_pretrained(str(model)),
        args=DPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(str(model)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_as_trl_computes_it(trl_trainer: Any, name: PreferenceLoss, dtype: torch.dtype) -> None:
    """The same log-probabilities go into TRL's own `_compute_loss`; its mean and its gradient come out of ours."""
    generator = torch.Generator().manual_seed(3)
    num_pairs, longest, beta = 12, 9, 0.7
    lengths = torch.randint(1, longest + 1, (2 * num_pairs,), generator=generator)
    mask = (torch.arange(longest + 1) >= 1) & (torch.arange(longest + 1) <= lengths[:, None])
    log_probs = -torch.rand(2 * num_pairs, longest, generator=generator, dtype=torch.float64).to(dtype)
    log_probs = (log_probs * mask[:, 1:]).requires_grad_()
    reference = log_probs.detach().sum(dim=1) + torch.randn(2 * num_pairs, generator=generator).to(dtype)
    smoothing = 0.1 if name in SMOOTHED else 0.0

    trainer = trl_trainer
    trainer.loss_types, trainer.beta, trainer.label_smoothing = [name], beta, smoothing
    trainer.precompute_ref_logps = True
    nothing = torch.zeros_like(mask[:, 1:])
    outputs = SimpleNamespace(log_probs=log_probs, entropy=nothing.to(dtype), mean_logits=nothing.to(dtype),
                              is_top1=nothing)  # fmt: skip
    batch = {
        "input_ids": mask.long(),
        "attention_mask": mask.long(),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:num_pairs],
        "ref_rejected_logps": reference[num_pairs:],
    }
    theirs = trainer._compute_loss(lambda **_: outputs, batch, return_outputs=False)
    (their_gradient,) = torch.autograd.grad(theirs, log_probs)

    chosen, rejected = (log_probs.sum(dim=1) - reference).chunk(2)
    losses = preference_loss(name, LogRatios(chosen, rejected, *lengths.chunk(2)), beta, smoothing)
    (our_gradient,) = torch.autograd.grad(losses.mean(), log_probs)
    assert losses.shape == (num_pairs,) and losses.dtype == dtype
    # TRL holds exo_pair's label smoothing in float32.
    tolerance = 1e-12 if dtype == torch.float64 and name != "exo_pair" else 1e-6
    torch.testing.assert_close(losses.mean(), theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=tolerance, atol=tolerance)
    assert our_gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_far_from_the_reference_nothing_overflows(name: PreferenceLoss) -> None:
    far = torch.tensor([2e4, -2e4], requires_grad=True)
    pair = LogRatios(far, -far, torch.tensor([1, 1]), torch.tensor([1, 1]))
    losses = preference_loss(name, pair, 5.0, 0.1 if name in SMOOTHED else 0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), far)
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SMOOTHED])
def test_label_smoothing_that_would_be_ignored_is_refused(name: PreferenceLoss) -> None:
    """TRL trains on without a word."""
    with pytest.raises(ValueError, match=f"0.1 has no meaning for loss_type {name}; set it to 0, or take robust"):
        DPOSettings(learning_rate=1e-6, effective_batch_size=1, max_length=8, loss_type=name, label_smoothing=0.1)


def test_exo_pair_needs_label_smoothing() -> None:
    with pytest.raises(ValueError, match="exo_pair needs a label_smoothing above 0"):
        DPOSettings(learning_rate=1e-6, effective_batch_size=1, max_length=8, loss_type="exo_pair")


def test_at_the_reference() -> None:
    """Where every DPO begins: c = r = 0."""
    zero = LogRatios(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1))
    losses = {name: float(preference_loss(name, zero, 0.5, 0.1 if name in SMOOTHED else 0.0)) for name in NAMES}
    expected = {name: math.log(2) for name in ("sigmoid_norm", "sigmoid", "robust")}
    expected |= {
        "hinge": 1.0,
        "ipo": 1.0,
        "nca_pair": 2 * math.log(2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "sppo_hard": 2.0,
    }
    expected["exo_pair"] = -math.log(2) - 0.5 * (math.log(0.9) + math.log(0.1))
    assert losses == pytest.approx(expected)
