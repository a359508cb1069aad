"""SFT on the two-layer model: packed is padded, the loss is Tulu's sum but for one factor, and tokens are a budget."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from smoltulu.tasks.trainer.packed_attention import segments_of_lengths
from smoltulu.tasks.training.sft import collate_packed
from tests.small_runs import conversations, pairs, run, trainer_of
from tests.tiny_model import build_tiny_model

CONVERSATIONS = conversations(24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


# ---------------------------------------------------------------------------------------------------- packed = padded


def test_rows_are_laid_end_to_end_and_a_first_token_is_predicted_by_nothing() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = collate_packed(rows)
    assert batch.pop("segments") == segments_of_lengths([3, 2])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, -100, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_loss_and_gradient_of_a_step_are_those_of_padded_rows(base: Path, tmp_path: Path) -> None:
    """Of the real trainer, each with its own collator and attention; and the tokens it counts.

    TRL's fused head computes in float32 whatever the model; the model itself is in float64 here.
    """
    made = []
    for packing in (False, True):
        trainer = trainer_of("sft", tmp_path / str(packing), base, CONVERSATIONS[:8], {}, packing=packing)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        assert ("segments" in batch) == packing and ("attention_mask" in batch) != packing
        model = trainer.model.double().train()
        trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        trainer.log({"loss": loss.item()})
        made.append((loss.detach(), {name: value.grad for name, value in model.named_parameters()}, trainer))
    (padded_loss, padded, padded_trainer), (packed_loss, packed, packed_trainer) = made
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-6, atol=0)  # the head computes in float32
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=0, atol=1e-6 * float(value.abs().max()))
    for metric in ("num_tokens", "mean_token_accuracy", "entropy"):
        values = [trainer.state.log_history[0][metric] for trainer in (padded_trainer, packed_trainer)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_packed_trainings_of_any_cut_are_the_padded_one(base: Path, tmp_path: Path) -> None:
    """Five steps of eight rows: losses, and every parameter to float32 tolerance and without bias."""
    settings = {"max_steps": 5, "num_train_epochs": 2, "effective_batch_size": 8}
    padded = run("sft", tmp_path / "padded", base, CONVERSATIONS, settings, packing=False, save_steps=5)
    before = load_file(base / "model.safetensors")
    expected = load_file(padded.model / "model.safetensors")
    assert max(float((expected[name] - value).abs().max()) for name, value in before.items()) > 1e-3
    for size in (8, 2, 1):
        compute = {"per_device_train_batch_size": size, "save_steps": 5}
        packed = run("sft", tmp_path / str(size), base, CONVERSATIONS, settings, packing=True, **compute)
        for one, other in zip(padded.history, packed.history, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["num_tokens"] == one["num_tokens"]
        trained = load_file(packed.model / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-4)
        residual = torch.cat([(trained[name] - value).flatten() for name, value in expected.items()])
        assert residual.mean().abs() < 5e-6


# ---------------------------------------------------------------------------------------------------------- fused loss


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor made inside it."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("packing", [False, True])
def test_logits_are_never_all_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    """Loss and gradient go through tiles of the logits, here of 64 x 128 instead of 4,096 x 32,768."""
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 128)
    trainer = trainer_of("sft", tmp_path, base, CONVERSATIONS, {}, packing=packing)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(CONVERSATIONS))])
    num_logits = batch["input_ids"].numel() * trainer.model.config.vocab_size
    with Sizes() as sizes:
        trainer.compute_loss(trainer.model, batch).backward()
    assert sizes.largest < num_logits / 4


# --------------------------------------------------------------------------------------------------------- machinery


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bfloat16_on_a_device_without_it(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """float32 with a warning; with `precision_fallback: false` an error before anything is trained."""
    rows = CONVERSATIONS[:4] if stage == "sft" else pairs(4)
    exact = run(stage, tmp_path / "exact", base, rows, {"max_steps": 2, "precision": "float32"})
    assert "no bfloat16" not in caplog.text
    fallen = run(stage, tmp_path / "fallen", base, rows, {"max_steps": 2, "precision": "bfloat16"})
    assert "no bfloat16 on this device: running in float32" in caplog.text
    assert [row["loss"] for row in fallen.history] == [row["loss"] for row in exact.history]
    with pytest.raises(ValueError, match=r"does not have, and compute\.precision_fallback is false; set the stage's"):
        trainer_of(stage, tmp_path / "refused", base, rows, {"precision": "bfloat16"}, precision_fallback=False)


def test_processes_that_load_rows_change_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A flow that ran in this process leaves hooks with which every forked child ends with status 1
    # (prefect/_internal/concurrency/services.py). Trainings have a process of their own, without Prefect.
    monkeypatch.setattr(threading, "_threading_atexits", [])
    settings = {"num_train_epochs": 2, "effective_batch_size": 4}
    alone, helped = (
        run("sft", tmp_path / str(workers), base, CONVERSATIONS[:8], settings, dataloader_num_workers=workers)
        for workers in (0, 2)
    )
    assert [row["loss"] for row in helped.history] == [row["loss"] for row in alone.history]
    assert (helped.model / "model.safetensors").read_bytes() == (alone.model / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------- Tulu's sum


def sum_loss(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """open-instruct's `--reduce_loss sum` of one micro-batch: cross entropy, summed over the trained tokens."""
    logits = model(input_ids=input_ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("per_device", [1, 4])
def test_gradient_of_a_step_is_that_of_tulus_sum_times_accumulation_steps_over_tokens(
    base: Path, tmp_path: Path, per_device: int
) -> None:
    """open-instruct adds up the sums of the micro-batches, each divided by the number of them, A. With N trained tokens
    in the step ours is A / N times that: one number for all parameters, and another number in every step.
    """
    settings = {"max_steps": 3, "effective_batch_size": 8, "learning_rate": 1e-12, "max_grad_norm": 1e9}
    trainer = trainer_of("sft", tmp_path, base, CONVERSATIONS, settings, per_device_train_batch_size=per_device)
    accumulation_steps = 8 // per_device
    batches: list[dict[str, Any]] = []
    steps: list[dict[str, torch.Tensor]] = []
    compute_loss = trainer.compute_loss

    def note_and_compute(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        batches.append(dict(inputs))
        return compute_loss(model, inputs, **kwargs)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append({name: value.grad.clone() for name, value in trainer.model.named_parameters()})

    trainer.compute_loss = note_and_compute
    trainer.add_callback(Gradients())
    trainer.train()

    assert len(steps) == 3 and len(batches) == 3 * accumulation_steps
    factors = []
    for number, ours in enumerate(steps):
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float64)
        num_tokens = 0
        for batch in batches[number * accumulation_steps : (number + 1) * accumulation_steps]:
            edges = [0, *(part.query[1] for part in batch["segments"].parts)]
            for start, end in pairwise(edges):
                labels = batch["labels"][0, start:end]
                num_tokens += int((labels[1:] != -100).sum())
                (sum_loss(model, batch["input_ids"][0, start:end], labels) / accumulation_steps).backward()
        factors.append(accumulation_steps / num_tokens)
        for name, value in model.named_parameters():
            assert value.grad is not None
            expected = value.grad * factors[-1]
            torch.testing.assert_close(ours[name].double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    assert len(set(factors)) == 3


# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("stage", "schedule"),
    [("sft", None), ("sft", {"kind": "wsd", "decay_ratio": 0.5}), ("reward_model", None), ("dpo", None)],
)
def test_tokens_are_a_budget(stage: str, base: Path, tmp_path: Path, schedule: Any) -> None:
    """Whole steps that see at least so many tokens of mean rows; over several epochs here."""
    rows = conversations(6) if stage == "sft" else pairs(7)[1:]
    length = trainer_of(stage, tmp_path / "one", base, rows, {})
    num_tokens = sum(
        len(row["input_ids"]) if stage == "sft" else
        sum(len(row["prompt_ids"]) + len(row[side]) for side in ("chosen_ids", "rejected_ids"))
        for row in length.train_dataset
    )  # fmt: skip
    settings = {"effective_batch_size": 2, "schedule": schedule, "max_tokens": 3 * num_tokens - 1}
    finished = run(stage, tmp_path / "run", base, rows, settings, save_steps=100)
    assert finished.outputs.num_steps == len(finished.history) == 9
    assert finished.history[-1]["num_tokens"] == 3 * num_tokens
