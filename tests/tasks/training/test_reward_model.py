"""The reward model on tokenised pairs: the batches of TRL, packed = padded, where the score is read, what it logs.

Its loss, its head and its invariants are with those of the other stages, in `test_formulas.py` and `test_training.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import preflight_config
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.preflight import PreflightSettings
from smoltulu.schemas.training import RewardModelSettings
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.packed_attention import pack
from smoltulu.tasks.training.reward_batch import PairCollator
from tests.small_runs import pairs, run, stage_arguments, trainer_of, turn, weights_of_checkpoint
from tests.tiny_model import build_tiny_model

PAIRS = pairs(9)[1:]  # the first has the same answer twice
LONG = PAIRS[3] | {"rejected": [turn("assistant", "so " * 200)]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def test_batches_are_those_that_trl_makes_of_the_messages(base: Path, tmp_path: Path) -> None:
    """And a pair with one side that is too long is left out, as there."""
    rows = [*PAIRS[:5], LONG, *PAIRS[5:]]
    ours = trainer_of("reward_model", tmp_path / "ours", base, rows, {"effective_batch_size": 2}, packing=False)
    trl = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1),
        args=RewardConfig(output_dir=str(tmp_path / "trl"), max_length=128, use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(str(base)),
    )
    assert len(ours.train_dataset) == len(trl.train_dataset) == 8
    assert ours.train_dataset["row"][:] == [0, 1, 2, 3, 4, 6, 7, 8]
    for lines in (range(8), range(3), [5]):
        batches = [trainer.data_collator([trainer.train_dataset[line] for line in lines]) for trainer in (ours, trl)]
        assert batches[0].keys() - {"row", "num_tokens"} == batches[1].keys() == {"input_ids", "attention_mask"}
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


BY_HAND = [
    {"row": 3, "prompt_ids": [5, 6], "chosen_ids": [7, 0], "rejected_ids": [0]},
    {"row": 8, "prompt_ids": [5], "chosen_ids": [0], "rejected_ids": [8, 9, 0]},
]


def test_a_padded_batch_by_hand() -> None:
    batch = PairCollator(pad_token_id=1, packing=False)(BY_HAND)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 0, 1, 1], [5, 6, 0, 1], [5, 8, 9, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 2, 3, 4]


def test_a_packed_batch_by_hand() -> None:
    batch = PairCollator(pad_token_id=1, packing=True)(BY_HAND)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 5, 0, 8, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]]
    assert batch["row"].tolist() == [3, 8]
    assert batch["last_tokens"].tolist() == [3, 6, 4, 9]  # chosen, chosen, rejected, rejected
    assert int(batch["num_tokens"]) == 4 + 2 + 3 + 4


def test_packed_and_padded_batches_have_the_same_loss_scores_and_gradient_in_float64(
    base: Path, tmp_path: Path
) -> None:
    found = []
    for packing in (True, False):
        trainer = trainer_of("reward_model", tmp_path / str(packing), base, PAIRS, {"seed": 3}, packing=packing)
        trainer.model.double().train()
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
        gradient = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
        trainer.log({})
        metrics = trainer.state.log_history[0]
        found.append((loss.detach(), outputs.logits.detach(), gradient, metrics))
    (loss, scores, gradient, metrics), (loss_padded, scores_padded, gradient_padded, metrics_padded) = found
    assert scores.shape == (2 * len(PAIRS), 1)
    torch.testing.assert_close(scores, scores_padded, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, loss_padded, rtol=1e-12, atol=0)
    # Norms are computed in float32 whatever the weights are.
    torch.testing.assert_close(gradient, gradient_padded, rtol=0, atol=1e-6 * float(gradient.abs().max()))
    assert metrics == pytest.approx(metrics_padded, rel=1e-9) and metrics["num_tokens"] > 0


def test_packed_padded_and_any_micro_batch_train_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    """Seven pairs in steps of four: the last step of an epoch has three, cut into 2 + 1 at two pairs a micro-batch."""
    settings = {"max_steps": 3, "num_train_epochs": 2, "effective_batch_size": 4}
    ways = [(True, 4), (True, 2), (True, 1), (False, 4), (False, 2)]
    models = [
        load_file(
            run("reward_model", tmp_path / f"{number}", base, PAIRS[:7], settings, packing=packing,
                per_device_train_batch_size=size, save_steps=10).model / "model.safetensors"
        )
        for number, (packing, size) in enumerate(ways)
    ]  # fmt: skip
    for other in models[1:]:
        for name, value in models[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=5e-5)


def test_a_model_that_keeps_segments_from_its_attention_is_not_packed(base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    forward = model.model.forward
    model.model.forward = lambda *args, segments=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification does not pass `segments` on"):
        pack(model)


def test_the_score_is_read_at_the_last_token_though_eos_stands_inside(base: Path, tmp_path: Path) -> None:
    """bos = eos here, and it closes every turn of the assistant: what looks for the first eos reads half the pair."""
    rows = [
        {"prompt": [turn("user", "cat"), turn("assistant", "dog"), turn("user", f"cow {i}")],
         "chosen": [turn("assistant", "12 " * i + "yes")], "rejected": [turn("assistant", "no")]}
        for i in range(4)
    ]  # fmt: skip
    trainer = trainer_of("reward_model", tmp_path, base, rows, {}, packing=False)
    eos = trainer.processing_class.eos_token_id
    model = trainer.model.eval()
    seen: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    for ids, mask, hidden, score in zip(batch["input_ids"], batch["attention_mask"], seen[0], scores, strict=True):
        length = int(mask.sum())
        places = (ids[:length] == eos).nonzero()[:, 0].tolist()
        assert len(places) == 2 and places[-1] == length - 1
        at_places = (hidden[places] @ model.score.weight[0]).tolist()
        assert float(score) == pytest.approx(at_places[1], abs=1e-6)
        assert abs(at_places[0] - at_places[1]) > 1e-3


def test_logs_accuracy_margin_and_rewards_of_the_step(base: Path, tmp_path: Path) -> None:
    """Two micro-batches of the first step, from the head that the step began with."""
    finished = run("reward_model", tmp_path, base, PAIRS, {"max_steps": 2, "num_train_epochs": 2})
    model = AutoModelForSequenceClassification.from_pretrained(str(finished.model), dtype=torch.float64)
    model.load_state_dict(weights_of_checkpoint(finished.checkpoints / "checkpoint-1"), strict=False)
    trainer = trainer_of("reward_model", tmp_path / "again", base, PAIRS, {}, packing=False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    logged = finished.history[1]
    assert logged["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))
    assert logged["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert logged["mean_reward"] == pytest.approx(float(torch.cat([chosen, rejected]).mean()), rel=1e-4)
    # Means of the micro-batches' extremes: inside of those of the whole step.
    scores = torch.cat([chosen, rejected])
    assert float(scores.min()) - 1e-5 <= logged["min_reward"] < logged["mean_reward"]
    assert logged["mean_reward"] < logged["max_reward"] <= float(scores.max()) + 1e-5
    assert finished.metrics["margin"] == pytest.approx((finished.history[0]["margin"] + logged["margin"]) / 2)


def test_a_budget_of_tokens_counts_both_sides_with_their_prompts(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of("reward_model", tmp_path / "built", base, PAIRS, {"effective_batch_size": 2})
    num_tokens = int(trainer.data_collator(list(trainer.train_dataset))["num_tokens"])
    settings = {"effective_batch_size": 2, "max_tokens": num_tokens + 1}
    finished = run("reward_model", tmp_path / "run", base, PAIRS, settings)
    assert finished.outputs.num_steps == 5  # an epoch of 8 pairs is 4 steps
    assert finished.history[3]["num_tokens"] == num_tokens


def test_pairs_too_long_are_dropped_whatever_dpo_does() -> None:
    settings = RewardModelSettings(learning_rate=1e-3, effective_batch_size=2, max_length=64)
    assert preflight_config("reward_model", settings, PreflightSettings()).overlong == "drop"


def test_two_processes_train_to_the_weights_of_one(base: Path, tmp_path: Path) -> None:
    """Over gloo, same effective batch; equal to float32 tolerance."""
    settings: dict[str, Any] = {"max_steps": 4, "num_train_epochs": 2, "effective_batch_size": 4, "learning_rate": 1e-4}
    finished = run("reward_model", tmp_path / "one", base, PAIRS, settings, per_device_train_batch_size=4)
    one = load_file(finished.model / "model.safetensors")
    config, inputs, context = stage_arguments("reward_model", tmp_path / "two", base, PAIRS, settings, num_processes=2)
    spec = Spec(stage="reward_model", version=2, config=scientific(config), inputs={}, externals={})
    compute = context.compute.model_copy(update={"min_free_disk_gb": 0.0, "launcher": "warm"})
    job = Job("reward-model", STAGES["reward_model"], config, compute, spec, inputs)
    reference = run_stage(job, Store(tmp_path / "store"), logging.getLogger("smoltulu"))
    two = load_file(Path(reference.path) / "model" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert all(not torch.equal(one[name], value) for name, value in before.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)


def test_presets_start_where_their_papers_do() -> None:
    """SmolTulu's card: from the DPO model; Tulu 3: from SFT. That 1130 and 1207 are alike in it: `test_recipe.py`."""
    starts = {}
    for name in ("smoltulu-1130", "smoltulu-1207", "tulu3-8b"):
        reward_model = load_recipe(name).reward_model
        assert reward_model is not None
        starts[name] = reward_model.start_from
    assert starts == {"smoltulu-1130": "dpo", "smoltulu-1207": "dpo", "tulu3-8b": "sft"}
