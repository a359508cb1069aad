"""The loss of each stage against its published formula, written again in a few lines of float64.

The left side of every comparison is what the real trainer of the stage logged while it trained (all rows are one
optimizer step, cut into micro-batches of two); the right side is computed here from the weights that the step began
with, one sequence at a time, without padding, masks or TRL. Formulas: open-instruct `open_instruct/finetune.py`
(`--reduce_loss sum`), `open_instruct/reward_modeling.py`, `open_instruct/dpo_utils.py` (`dpo_norm`); the papers are
named in docs/stages.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.small_runs import conversations, pairs, run, trainer_of, turn, weights_of_checkpoint
from tests.tiny_model import EOS, build_tiny_model

CONVERSATIONS, PAIRS = conversations(8), pairs(6)
TWO_STEPS = {"max_steps": 2, "num_train_epochs": 2, "learning_rate": 2e-3}
# The trainer computes in float32, whose relative precision is 6e-8; what is left is the sum over tokens and layers.
CLOSE: dict[str, Any] = {"rel": 2e-6, "abs": 1e-7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def double(folder: Path, kind: Any = AutoModelForCausalLM, checkpoint: Path | None = None) -> Any:
    """The model of a folder, with the weights of a checkpoint where one is given."""
    model = kind.from_pretrained(str(folder), dtype=torch.float64, **({"num_labels": 1} if checkpoint else {})).eval()
    if checkpoint is not None:
        told = model.load_state_dict(weights_of_checkpoint(checkpoint), strict=False)
        assert not told.unexpected_keys and set(told.missing_keys) <= {"lm_head.weight"}
    return model


def rendered(messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The Tulu template by hand: text, and the character spans of each assistant's content with its eos."""
    text, spans = "", []
    for index, message in enumerate(messages):
        text += f"<|{message['role']}|>\n"
        said = message["content"] + (EOS if message["role"] == "assistant" else "")
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(said)))
        text += said + ("" if message["role"] == "assistant" and index == len(messages) - 1 else "\n")
    return text, spans


def encoded(base: Path, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them lie in what the assistant says or closes with."""
    text, spans = rendered(messages)
    tokens = AutoTokenizer.from_pretrained(str(base))(text, add_special_tokens=False, return_offsets_mapping=True)
    return tokens["input_ids"], [any(a <= x and y <= b for a, b in spans) for x, y in tokens["offset_mapping"]]


def token_log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """log p(x_t | x_<t) for t = 1 .. T-1."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def sft_sum_and_count(model: Any, base: Path, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, int]:
    """Tulu 3's loss, the sum of -log p over supervised tokens, and the number of them."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, supervised = encoded(base, row["messages"])
        mask = torch.tensor(supervised[1:])
        total = total - token_log_probs(model, ids)[mask].sum()
        count += int(mask.sum())
    return total, count


# ---------------------------------------------------------------------------------------------------------------- SFT


def test_sft_supervises_assistant_content_and_its_eos_only(base: Path, tmp_path: Path) -> None:
    """Every token of a two-turn conversation with its label, by hand."""
    messages = [
        turn("user", "Good morning"),
        turn("assistant", "Good night."),
        turn("user", "cat, dog"),
        turn("assistant", "3"),
    ]
    trainer = trainer_of("sft", tmp_path, base, [{"messages": messages}], {}, per_device_train_batch_size=1)
    row = trainer.train_dataset[0]
    names = [trainer.processing_class.decode([token]) for token in row["input_ids"]]
    labels = [None if label == -100 else trainer.processing_class.decode([label]) for label in row["labels"]]
    # fmt: off
    assert names == [
        "<|", "user", "|>", "\n", "Good", " mornin", "g", "\n",
        "<|", "assistant", "|>", "\n", "Good", " nigh", "t", ".", EOS, "\n",
        "<|", "user", "|>", "\n", "c", "at", ",", " dog", "\n",
        "<|", "assistant", "|>", "\n", "3", EOS,
    ]
    no = None
    assert labels == [
        no, no, no, no, no, no, no, no,
        no, no, no, no, "Good", " nigh", "t", ".", EOS, no,
        no, no, no, no, no, no, no, no, no,
        no, no, no, no, "3", EOS,
    ]
    # fmt: on


def test_sft_batches_supervise_what_the_hand_written_template_says(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path, base, CONVERSATIONS, {}, packing=False)
    for row, conversation in zip(trainer.train_dataset, CONVERSATIONS, strict=True):
        ids, supervised = encoded(base, conversation["messages"])
        assert row["input_ids"] == ids
        assert row["labels"] == [token if keep else -100 for token, keep in zip(ids, supervised, strict=True)]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    assert (batch["labels"] == trainer.processing_class.eos_token_id).sum() == 4 + 2  # two of the four have two turns


@pytest.mark.parametrize("per_device", [1, 8])
def test_sft_loss_is_the_sum_over_the_step_divided_by_its_supervised_tokens(
    base: Path, tmp_path: Path, per_device: int
) -> None:
    """However the step is cut; the mean of the micro-batches' means, which it must not be, is another number."""
    history = run(
        "sft", tmp_path, base, CONVERSATIONS, {"max_steps": 1}, per_device_train_batch_size=per_device
    ).history
    with torch.no_grad():
        model = double(base)
        total, count = sft_sum_and_count(model, base, CONVERSATIONS)
        means = [sft_sum_and_count(model, base, [row]) for row in CONVERSATIONS]
    assert history[0]["loss"] == pytest.approx(float(total) / count, **CLOSE)
    assert float(sum(one / number for one, number in means)) / len(means) != pytest.approx(
        float(total) / count, **CLOSE
    )


def tulu_gradient(base: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], int]:
    """Gradient of Tulu's sum loss, in float64, and the number of supervised tokens."""
    model = double(base)
    total, count = sft_sum_and_count(model, base, rows)
    total.backward()
    return {name: value.grad for name, value in model.named_parameters()}, count


def first_adam_update(gradient: torch.Tensor, rate: float, epsilon: float) -> torch.Tensor:
    """m / (1 - b1) = g and v / (1 - b2) = g^2 after one step from zero: the update is rate g / (|g| + epsilon)."""
    return -rate * gradient / (gradient.abs() + epsilon)


def test_sft_first_update_is_that_of_tulus_sum_loss(base: Path, tmp_path: Path) -> None:
    """Adam divides by the gradient's own size: the factor between sum and mean goes, but for epsilon.

    The stage trains with the mean over N tokens; the update predicted here is that of the sum. With g the sum's
    gradient they differ by rate x |1/(1 + eps/|g|) - 1/(1 + N eps/|g|)| at most.
    """
    settings = {"max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    trained = load_file(run("sft", tmp_path, base, CONVERSATIONS, settings).model / "model.safetensors")
    gradient, count = tulu_gradient(base, CONVERSATIONS)
    before = load_file(base / "model.safetensors")
    compared = 0
    for name, start in before.items():
        expected = first_adam_update(gradient[name], 1e-3, 1e-8)
        bound = 1e-3 * (count * 1e-8 / (gradient[name].abs() + count * 1e-8))
        # Elements whose gradient float32 itself cannot tell from zero have no sign to compare.
        sure = gradient[name].abs() > 1e-2
        difference = (trained[name].double() - start.double() - expected).abs()
        assert (difference <= bound + 2e-7)[sure].all(), name
        compared += int(sure.sum())
    assert count > 50 and compared > 10_000


def test_sum_and_mean_loss_differ_by_one_factor_in_a_step(base: Path) -> None:
    """Whose consequence is exact after clipping: open-instruct's sum is practically always clipped to norm 1."""
    gradient, count = tulu_gradient(base, CONVERSATIONS)
    total = torch.cat([value.flatten() for value in gradient.values()])
    mean = total / count
    assert total.norm() > mean.norm() > 1  # so max_grad_norm 1 clips both
    clipped_sum, clipped_mean = total / total.norm(), mean / mean.norm()
    torch.testing.assert_close(clipped_sum, clipped_mean, rtol=1e-12, atol=0)
    updates = [first_adam_update(value, 1.0, 1e-8) for value in (total, mean)]
    assert (updates[0] - updates[1]).abs().max() > 1e-3  # tiny gradients: epsilon matters
    large = mean.abs() > 1e-4
    assert (updates[0] - updates[1])[large].abs().max() < 1e-4


def test_sum_and_mean_part_where_steps_have_other_token_counts() -> None:
    """The factor is per step, and Adam's moments mix steps: with b1 = 0.9, b2 = 0.999 by hand for two steps.

    Gradients of the mean 1 and 1; steps of 100 and 400 tokens make them 100 and 400 for the sum. Mean: both updates 1.
    Sum: m = (0.9 x 100 + 400) x 0.1 / (1 - 0.81), v = (0.999 x 100^2 + 400^2) x 0.001 / (1 - 0.998001).
    """
    for gradients, expected in (((1.0, 1.0), 1.0), ((100.0, 400.0), 0.884376)):
        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        adam = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        positions = []
        for gradient in gradients:
            weight.grad = torch.tensor(gradient, dtype=torch.float64)
            adam.step()
            positions.append(float(weight.detach()))
        assert positions[0] == pytest.approx(-1.0, abs=1e-7)
        assert positions[1] - positions[0] == pytest.approx(-expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- reward model


def reference_reward(model: Any, ids: list[int]) -> torch.Tensor:
    """w . h at the last token of one unpadded sequence."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return hidden @ model.score.weight[0]


def test_reward_model_loss_is_bradley_terry_at_the_last_token(base: Path, tmp_path: Path) -> None:
    finished = run("reward_model", tmp_path, base, PAIRS, TWO_STEPS)
    with torch.no_grad():
        model = double(base, AutoModelForSequenceClassification, finished.checkpoints / "checkpoint-1")
        margins = torch.stack(
            [
                reference_reward(model, encoded(base, row["prompt"] + row["chosen"])[0])
                - reference_reward(model, encoded(base, row["prompt"] + row["rejected"])[0])
                for row in PAIRS
            ]
        )
    logged = finished.history[1]
    assert logged["loss"] == pytest.approx(float(torch.log1p(torch.exp(-margins)).mean()), **CLOSE)
    assert logged["margin"] == pytest.approx(float(margins.mean()), rel=1e-5, abs=1e-6)
    assert logged["accuracy"] == pytest.approx(float((margins > 0).double().mean()))


def test_reward_is_read_at_the_closing_eos_whatever_the_padding(base: Path, tmp_path: Path) -> None:
    """And not where pad = eos would put it: on the token before."""
    trainer = trainer_of("reward_model", tmp_path, base, PAIRS, {}, packing=False)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(PAIRS))])
    pad, eos = trainer.processing_class.pad_token_id, trainer.processing_class.eos_token_id
    assert trainer.model.config.pad_token_id == pad != eos and (batch["input_ids"] == pad).any()
    lengths = batch["attention_mask"].sum(dim=1)
    assert (batch["input_ids"][torch.arange(len(lengths)), lengths - 1] == eos).all()
    model = trainer.model.double().eval()
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
        alone = [
            reference_reward(model, ids[:length].tolist())
            for ids, length in zip(batch["input_ids"], lengths, strict=True)
        ]
        torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-9, atol=1e-12)
        model.config.pad_token_id = eos
        wrong = model(batch["input_ids"].where(batch["attention_mask"].bool(), eos), batch["attention_mask"]).logits[
            :, 0
        ]
    assert (wrong - scores).abs().min() > 1e-6


def test_score_head_is_drawn_with_variance_one_over_d_plus_one(tmp_path: Path) -> None:
    """2,048 draws; a standard deviation of n normals has a relative standard error of 1/sqrt(2n) = 1.6 %."""
    base = build_tiny_model(tmp_path / "wide", hidden_size=2048, num_hidden_layers=1)
    trainer = trainer_of("reward_model", tmp_path, base, PAIRS, {"seed": 5})
    draws = trainer.model.score.weight.detach().double().flatten()
    assert draws.numel() == 2048 and trainer.model.score.bias is None
    standardised = draws * math.sqrt(2048 + 1)
    assert abs(float(standardised.std()) - 1) < 5 / math.sqrt(2 * 2048)
    assert abs(float(standardised.mean())) < 5 / math.sqrt(2048)
    # Normal, not uniform (kurtosis 1.8): the kurtosis of n normals is 3 with a standard error of sqrt(24/n) = 0.11.
    assert abs(float((standardised**4).mean()) / float(standardised.var()) ** 2 - 3) < 0.55
    assert trainer.args.adam_epsilon == 1e-5
    assert all(module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))


def test_score_head_stays_in_float32_under_bfloat16_autocast(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of("reward_model", tmp_path, base, PAIRS, {}, packing=False)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    inputs: list[torch.Tensor] = []
    trainer.model.score.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = trainer.model(**batch).logits
    assert scores.dtype == torch.float32
    exact = inputs[0].double() @ trainer.model.score.weight.double().T
    assert (exact[torch.arange(8), batch["attention_mask"].sum(dim=1) - 1] - scores).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------- DPO


def log_ratios(policy: Any, reference: Any, base: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each side of PAIRS: sum over the completion of log pi - log pi_ref, and its number of tokens."""
    sides = {}
    for side in ("chosen", "rejected"):
        sums, counts = [], []
        for row in PAIRS:
            ids, supervised = encoded(base, row["prompt"] + row[side])
            # The completion is the last turn alone: earlier turns of the assistant belong to the prompt.
            start = max(i for i in range(1, len(ids)) if supervised[i] and not supervised[i - 1])
            difference = token_log_probs(policy, ids) - token_log_probs(reference, ids)
            sums.append(difference[start - 1 :].sum())
            counts.append(len(ids) - start)
        sides[side] = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    return sides


@pytest.mark.parametrize(("loss_type", "beta"), [("sigmoid_norm", 5.0), ("sigmoid", 0.1)])
def test_dpo_loss(base: Path, tmp_path: Path, loss_type: str, beta: float) -> None:
    """sigmoid_norm: -log sigmoid(beta (mean log-ratio of chosen - of rejected)); sigmoid: the same of the sums.

    At the second step, whose policy is the first checkpoint: at the first it is its own reference, and every loss ln 2.
    """
    finished = run("dpo", tmp_path, base, PAIRS, TWO_STEPS | {"loss_type": loss_type, "beta": beta})
    with torch.no_grad():
        sides = log_ratios(double(base, checkpoint=finished.checkpoints / "checkpoint-1"), double(base), base)
    (chosen, num_chosen), (rejected, num_rejected) = sides["chosen"], sides["rejected"]
    summed, normalised = beta * (chosen - rejected), beta * (chosen / num_chosen - rejected / num_rejected)
    margins = normalised if loss_type == "sigmoid_norm" else summed
    first, second = finished.history
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert second["loss"] == pytest.approx(float(torch.log1p(torch.exp(-margins)).mean()), rel=2e-5)
    assert abs(second["loss"] - math.log(2)) > 0.1  # it moved, so that the comparison says something

    # What TRL logs is made of sums whatever the loss; ours is what sigmoid_norm optimises.
    assert second["rewards/margins"] == pytest.approx(float(summed.mean()), rel=1e-4)
    assert second["rewards/margins_normalised"] == pytest.approx(float(normalised.mean()), rel=1e-4)
    assert second["rewards/accuracies_normalised"] == pytest.approx(float((normalised > 0).double().mean()))
    assert finished.metrics["rewards/margins_normalised"] == pytest.approx(
        (first["rewards/margins_normalised"] + second["rewards/margins_normalised"]) / 2
    )


def test_dpo_norm_of_open_instruct_is_sigmoid_norm(base: Path, tmp_path: Path) -> None:
    """dpo_norm as published takes averages first, then (pi_c - pi_r) - (ref_c - ref_r): the same number, by hand.

    Policy averages -1.0 and -2.0, reference -1.5 and -1.9: beta 5 gives a margin of 5 (1.0 - 0.4) = 3 and
    -log sigmoid(3) = 0.048587.
    """
    margin = 5 * ((-1.0 - -2.0) - (-1.5 - -1.9))
    assert margin == pytest.approx(3.0)
    trainer = trainer_of("dpo", tmp_path, base, PAIRS, {})
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    with torch.no_grad():
        policy = [
            token_log_probs(trainer.model, row["prompt_ids"] + row[side])[-len(row[side]) :].sum()
            for side in ("chosen_ids", "rejected_ids")
        ]
        # A reference that makes the two averaged log-ratios 0.5 and -0.1.
        batch["reference_chosen"] = policy[0] - 0.5 * torch.tensor([len(row["chosen_ids"])])
        batch["reference_rejected"] = policy[1] + 0.1 * torch.tensor([len(row["rejected_ids"])])
        loss = float(trainer.compute_loss(trainer.model, batch))
    assert loss == pytest.approx(0.0485874, rel=1e-4)
    assert trainer.settings.loss_type == "sigmoid_norm" and trainer.settings.beta == 5.0


def test_dpo_counts_the_last_turn_and_its_eos_only(base: Path, tmp_path: Path) -> None:
    """Row 0 has two turns: the assistant's first belongs to the prompt. Not so in Tulu 3, see docs/stages/dpo.md."""
    trainer = trainer_of("dpo", tmp_path, base, PAIRS, {})
    row, decode = trainer.train_dataset[0], trainer.processing_class.decode
    assert decode(row["prompt_ids"]) == rendered([*PAIRS[0]["prompt"]])[0] + "<|assistant|>\n"
    assert decode(row["chosen_ids"]) == PAIRS[0]["chosen"][0]["content"] + EOS
    assert decode(row["rejected_ids"]) == PAIRS[0]["rejected"][0]["content"] + EOS
