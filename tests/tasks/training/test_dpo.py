"""DPO on tokenised pairs: both layouts give the same log-probabilities, gradients and trainings.

The losses are in test_preference_loss.py, the loss of a training against float64 in test_formulas.py.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smoltulu.schemas.training import DPOInputs, DPOSettings
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.packed_attention import pack
from smoltulu.tasks.training.dpo import train_dpo
from smoltulu.tasks.training.preference_batch import PairCollator, completion_logps, give_fused_head, num_tokens
from tests.small_runs import pairs, run, stage_arguments, trainer_of
from tests.tasks.trainer.test_packing import exact
from tests.tiny_model import build_tiny_model

PAIRS = pairs(7)[1:]  # of the first both sides are the same
PAD = 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def arguments(
    folder: Path, model: Path, rows: list[dict[str, Any]], settings: dict[str, Any], **compute: Any
) -> tuple[DPOSettings, DPOInputs, StageContext]:
    """What `train_dpo` is called with."""
    config, inputs, context = stage_arguments("dpo", folder, model, rows, settings, **compute)
    assert isinstance(inputs, DPOInputs)
    return config, inputs, context


def tokenised(trained_turns: str) -> list[dict[str, Any]]:
    """Pairs of random tokens and very different lengths; one side that is cut, one token, turns that do not count."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for row, (prompt, chosen, rejected) in enumerate([(7, 30, 4), (1, 3, 1), (40, 2, 60), (12, 12, 12)]):
        pair: dict[str, Any] = {"row": 10 + row}
        for name, length in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            pair[f"{name}_ids"] = torch.randint(2, 400, (length,), generator=generator).tolist()
            pair[f"{name}_mask"] = [1] * length if name != "prompt" else [0] * length
        if trained_turns == "all":
            # Also the first token, which nothing predicts.
            pair["prompt_mask"] = [int(place % 3 != 1) for place in range(prompt)]
        made.append(pair)
    made[3]["chosen_mask"] = [1] * 5 + [0] * 3 + [1] * 4
    return made


class FullLogits(torch.nn.Module):
    """A head in the model's own precision, in place of TRL's, which computes in float32 whatever it is given."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, shift_labels: torch.Tensor, fused_lm_head: bool, **arguments: Any) -> Any:
        assert fused_lm_head
        every = torch.log_softmax(self.model(**arguments).logits, dim=-1)
        taken = every.gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(log_probs=taken * (shift_labels != -100))


def by_definition(model: torch.nn.Module, pair: dict[str, Any], side: str) -> torch.Tensor:
    """Sum of log p(x_t | x_<t) over the tokens that count, of one sequence alone."""
    ids = pair["prompt_ids"] + pair[f"{side}_ids"]
    mask = pair["prompt_mask"] + pair[f"{side}_mask"]
    logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    return sum((logps[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]), torch.zeros((), dtype=logps.dtype))


@pytest.mark.parametrize("trained_turns", ["last", "all"])
def test_both_layouts_are_the_definition(base: Path, trained_turns: str) -> None:
    """Log-probabilities to 1e-10 and gradients of every parameter, in float64."""
    rows = tokenised(trained_turns)
    model = exact(AutoModelForCausalLM.from_pretrained(str(base)))
    pack(model)
    found = {}
    weights = torch.tensor([[0.3, -1.2, 0.8, 2.0], [-0.7, 1.1, 0.4, -0.9]], dtype=torch.float64)
    for layout in ("definition", "padded", "packed"):
        model.zero_grad()
        if layout == "definition":
            sides = ("chosen", "rejected")
            sums = torch.stack([torch.stack([by_definition(model, pair, side) for pair in rows]) for side in sides])
        else:
            batch = PairCollator(PAD, packing=layout == "packed")(rows)
            assert batch["input_ids"].shape[0] == (1 if layout == "packed" else 8)
            sums = torch.stack(completion_logps(FullLogits(model), batch))
        (sums * weights).sum().backward()
        found[layout] = sums.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}
    expected, gradients = found.pop("definition")
    for sums, others in found.values():
        torch.testing.assert_close(sums, expected, rtol=0, atol=1e-10)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("packing", [False, True])
def test_with_the_head_of_the_training(base: Path, packing: bool) -> None:
    """TRL's fused head, in float32."""
    rows = tokenised("all")
    exact = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float64).eval()
    model = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    pack(model)
    give_fused_head(model)
    with torch.no_grad():
        sums = torch.stack(completion_logps(model, PairCollator(PAD, packing)(rows)))
        expected = [[float(by_definition(exact, pair, side)) for pair in rows] for side in ("chosen", "rejected")]
    torch.testing.assert_close(sums.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-4)


def test_packed_pairs_hold_their_prompt_once() -> None:
    """By hand: a prompt of three tokens, whose last predicts both answers and so is there twice."""
    pair = {
        "row": 4,
        "prompt_ids": [5, 6, 7], "prompt_mask": [0, 1, 0],
        "chosen_ids": [8, 9], "chosen_mask": [1, 1],
        "rejected_ids": [10, 11, 12], "rejected_mask": [1, 0, 1],
    }  # fmt: skip
    batch = PairCollator(PAD, packing=True)([pair])
    no = -100
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 7, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch["shift_labels"].tolist() == [[6, no, 8, 9, 10, no, 12]]
    assert batch["pieces"] == [2, 2, 3]
    assert (batch["num_chosen"].tolist(), batch["num_rejected"].tolist()) == ([1 + 2], [1 + 2])
    assert batch["row"].tolist() == [4] and batch["num_tokens"] == num_tokens(pair) == (3 + 2) + (3 + 3)

    padded = PairCollator(PAD, packing=False)([pair])
    assert padded["input_ids"].tolist() == [[5, 6, 7, 8, PAD], [5, 6, 7, 10, 11]]
    assert padded["shift_labels"].tolist() == [[6, no, 8, 9, no], [6, no, 10, no, 12]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert padded["num_tokens"] == batch["num_tokens"]


def test_a_pair_without_prompt_is_refused() -> None:
    pair = tokenised("last")[0] | {"prompt_ids": [], "prompt_mask": []}
    for packing in (False, True):
        with pytest.raises(ValueError, match="row 10: the pair has no prompt token"):
            PairCollator(PAD, packing)([pair])


# ------------------------------------------------------------------------------------------------------ whole trainings

FIVE_STEPS = {"max_steps": 5, "num_train_epochs": 5, "effective_batch_size": 3, "learning_rate": 2e-3}


@pytest.mark.parametrize("trained_turns", ["last", "all"])
def test_packed_trainings_are_padded_ones(base: Path, tmp_path: Path, trained_turns: str) -> None:
    finished = [
        run("dpo", tmp_path / str(packing), base, PAIRS, FIVE_STEPS | {"trained_turns": trained_turns},
            packing=packing, per_device_train_batch_size=3, save_steps=5)
        for packing in (False, True)
    ]  # fmt: skip
    for padded, packed in zip(finished[0].history, finished[1].history, strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
        assert packed["num_tokens"] == padded["num_tokens"]
    assert abs(finished[0].history[-1]["loss"] - math.log(2)) > 0.1
    before = load_file(base / "model.safetensors")
    one, other = (load_file(training.model / "model.safetensors") for training in finished)
    for name, value in one.items():
        moved = (value - before[name]).abs().max()
        assert moved > 1e-3 and (other[name] - value).abs().max() < 2e-3 * moved, name


def test_trained_turns_of_the_prompt_count_in_both_sums(base: Path, tmp_path: Path) -> None:
    """Row 2 has an assistant's turn in its prompt: "Good morning." and its eos."""
    counted = {}
    for turns in ("last", "all"):
        trainer = trainer_of("dpo", tmp_path / turns, base, PAIRS, {"trained_turns": turns})
        row = trainer.train_dataset[2]
        counted[turns] = trainer.data_collator([row])
        assert sum(row["prompt_mask"]) == (0 if turns == "last" else 5)
    for side in ("num_chosen", "num_rejected"):
        assert int(counted["all"][side]) == int(counted["last"][side]) + 5


def test_the_short_last_step_of_an_epoch_weighs_every_pair_the_same(base: Path, tmp_path: Path) -> None:
    """Seven pairs, four a step: 4x1 = 2x2 = 1x4, where the second step has three.

    transformers averages micro-batches: of those three, as 2 + 1, the odd one would count double.
    """
    rows = pairs(8)[1:]
    settings = {"num_train_epochs": 2, "effective_batch_size": 4, "learning_rate": 2e-3}
    histories, weights = [], []
    for size in (4, 2, 1):
        finished = run(
            "dpo", tmp_path / str(size), base, rows, settings, per_device_train_batch_size=size, save_steps=4
        )
        histories.append(finished.history)
        weights.append(load_file(finished.model / "model.safetensors"))
    assert [row["step"] for row in histories[0]] == [1, 2, 3, 4]
    for other in histories[1:]:
        for name in (
            "loss",
            "grad_norm",
            "rewards/margins",
            "rewards/accuracies_normalised",
            "logps/chosen",
            "num_tokens",
        ):
            assert [row[name] for row in other] == pytest.approx(
                [row[name] for row in histories[0]], rel=2e-5, abs=1e-7
            )
    for other_weights in weights[1:]:
        residual = torch.cat([(other_weights[name] - value).flatten() for name, value in weights[0].items()])
        assert residual.abs().max() < 2e-4 and residual.mean().abs() < 5e-6


def test_nan_stops_the_training_and_names_its_rows(base: Path, tmp_path: Path) -> None:
    """Weights that go bad after the reference's pass."""
    config, inputs, context = arguments(tmp_path, base, PAIRS, {"max_steps": 1}, packing=False)
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"loss is nan at step 1; .* row \d"):
        train_dpo(config, inputs.model_copy(update={"model": str(model)}), context)


def test_reference_of_other_rows_is_refused(base: Path, tmp_path: Path) -> None:
    config, inputs, context = arguments(tmp_path / "one", base, PAIRS, {})
    _, others, _ = arguments(tmp_path / "other", base, PAIRS[:4], {})
    mixed = inputs.model_copy(update={"reference_logps": others.reference_logps})
    with pytest.raises(ValueError, match=r"has 4 lines and .* 6 pairs: the reference's .*refresh reference-logps"):
        train_dpo(config, mixed, context)
