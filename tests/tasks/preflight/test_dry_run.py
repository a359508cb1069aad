"""The dry run's step is the training's own: see docs/preflight.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import smoltulu.tasks.training.dpo
import smoltulu.tasks.training.grpo
import smoltulu.tasks.training.reward_batch
import smoltulu.tasks.training.sft
from smoltulu.tasks.preflight import dry_run
from tests import small_runs
from tests.tasks.preflight.test_preflight import KINDS, Flight, fly, rows_for, training_of
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def flown(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, subject: str, rows: list[dict[str, Any]],
    compute: dict[str, Any] | None = None, **settings: Any,
) -> tuple[Flight, dry_run.Step]:  # fmt: skip
    """A preflight whose dry run has all rows in one micro-batch, and the step of that."""
    steps: list[dry_run.Step] = []
    real = dry_run._measured

    def measured(train: Any, device: str) -> tuple[dry_run.Step, int]:
        step, peak = real(train, device)
        steps.append(step)
        return step, peak

    with monkeypatch.context() as patch:
        patch.setattr(dry_run, "_measured", measured)
        machinery = {"per_device_train_batch_size": len(rows)} | (compute or {})
        checks = {"dry_run": True, "max_faulty_share": 1}
        flight = fly(folder, model, rows, compute=machinery, checks=checks, **training_of(subject, **settings))
    assert not flight.error and len(steps) == 1
    return flight, steps[0]


def first_step_of_training(
    folder: Path, model: Path, subject: str, rows: list[dict[str, Any]], settings: dict[str, Any], **compute: Any
) -> dict[str, float]:
    machinery = {"per_device_train_batch_size": len(rows)} | compute
    return small_runs.run(subject, folder, model, rows, {"max_steps": 1} | settings, **machinery).history[0]


@pytest.mark.parametrize(
    ("subject", "packing", "settings"),
    [
        ("sft", True, {"lora": {"r": 4, "lora_alpha": 64}}),
        ("sft", False, {}),
        ("reward_model", True, {}),
        ("reward_model", False, {"seed": 7}),
        ("dpo", True, {"loss_type": "apo_zero", "beta": 0.5}),
        ("dpo", False, {"lora": {"r": 4}}),
    ],
)
def test_the_step_is_the_first_of_the_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str, packing: bool, settings: Any
) -> None:
    """Loss, gradient norm and tokens: with the training's own loss, adapter, score head and reference."""
    rows = rows_for(subject, 4)
    compute = {"packing": packing, "activation_checkpointing": not packing}
    _, step = flown(monkeypatch, tmp_path / "dry", model, subject, rows, compute, **settings)
    trained = first_step_of_training(tmp_path / "real", model, subject, rows, settings, **compute)
    assert step.loss == pytest.approx(trained["loss"], rel=1e-5)
    assert step.grad_norm == pytest.approx(trained["grad_norm"], rel=1e-4)
    assert step.num_tokens == trained["num_tokens"]


@pytest.mark.parametrize("subject", list(KINDS))
def test_a_loss_that_the_training_changes_is_changed_in_the_dry_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    def with_other_loss(trainer: type) -> type:
        class Other(trainer):  # type: ignore[misc]
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return super().compute_loss(*args, **kwargs) * 3 + 1

        return Other

    rows = rows_for(subject, 4)
    _, before = flown(monkeypatch, tmp_path / "before", model, subject, rows)
    if subject == "reward_model":
        batch = smoltulu.tasks.training.reward_batch
        monkeypatch.setattr(batch, "PairTrainer", with_other_loss(batch.PairTrainer))
    else:
        module = getattr(smoltulu.tasks.training, "grpo" if subject == "rlvr" else subject)
        own = module._trainer_class()
        monkeypatch.setattr(module, "_trainer_class", lambda: with_other_loss(own))
    _, after = flown(monkeypatch, tmp_path / "after", model, subject, rows)
    assert after.loss == pytest.approx(3 * before.loss + 1, rel=1e-5)
    assert after.grad_norm == pytest.approx(3 * before.grad_norm, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rlvr_trains_on_given_rollouts_as_long_as_allowed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Nothing is generated; rewards, reference and loss are the trainer's own, of one group of rollouts."""
    from transformers import GenerationMixin

    seen: list[tuple[int, ...]] = []
    own = smoltulu.tasks.training.grpo._trainer_class()

    class Watched(own):  # type: ignore[misc, valid-type]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            seen.append(tuple(inputs["completion_ids"].shape))
            assert "ref_per_token_logps" in inputs and bool(inputs["completion_mask"].all())
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr(smoltulu.tasks.training.grpo, "_trainer_class", lambda: Watched)
    monkeypatch.setattr(GenerationMixin, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    rows = rows_for("rlvr", 5)
    rows[3]["prompt"][0]["content"] += " Think." * 9
    compute = {"per_device_train_batch_size": size}
    settings = {"beta": 0.1, "steps_per_generation": 3, "num_iterations": 2, "max_completion_length": 17}
    flight, step = flown(monkeypatch, tmp_path, model, "rlvr", rows, compute, **settings)
    # A group has two rollouts at least: with one row at a time, two micro-batches.
    assert seen == [(size, 17)] * (4 if size == 1 else 2)
    assert step.num_tokens == max(size, 2) * (flight.outputs.longest + 17)


@pytest.mark.parametrize(("beta", "weight"), [(0.05, 0.0), (0.0, 0.5)])
def test_ppo_trains_policy_and_critic_on_given_rollouts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float, weight: float
) -> None:
    """All that a step holds is there: critic, both optimizers, reference or reward model; nothing is generated."""
    from smoltulu.tasks.generation import engines
    from smoltulu.tasks.training.ppo_trainer import PPOTrainer

    monkeypatch.setattr(engines, "write", lambda *args, **kwargs: pytest.fail("generated"))
    seen: list[tuple[int, int]] = []
    real = PPOTrainer.training_step

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        assert [len(one["ids"]) for one in inputs] == [17, 17] and inputs[0]["score"].verdict == "no_eos"
        assert (trainer.reference is not None) == (beta > 0)
        seen.append((len(trainer.optimizer.state), len(trainer.critic.optimizer.state)))
        return real(trainer, model, inputs, *args)

    monkeypatch.setattr(PPOTrainer, "training_step", training_step)
    settings = {
        "algorithm": "ppo", "beta": beta, "reward_model_weight": weight, "max_completion_length": 17,
        "num_episodes": 64, "num_minibatches": 4, "num_samples_per_prompt": 8,
        "critic": {"warmup_steps": 3},
    }  # fmt: skip
    flight, step = flown(monkeypatch, tmp_path, model, "rlvr", rows_for("rlvr", 2), None, **settings)
    assert seen == [(0, 0), (20, 21)]  # the first step makes both optimizers, the second has them
    assert step.num_tokens == 2 * (flight.outputs.longest + 17)
    assert flight.outputs.dry_run is not None and flight.outputs.dry_run.generation_bytes > 0


@pytest.mark.parametrize("subject", list(KINDS))
def test_a_base_model_without_embeddings_of_some_tokens_is_tried_as_sft_will_make_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    """Only SFT and reward model start from it; the others start from what SFT made of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smaller = tmp_path / "model"
    shutil.copytree(model, smaller)
    tokenizer, cut = AutoTokenizer.from_pretrained(smaller), AutoModelForCausalLM.from_pretrained(smaller)
    cut.resize_token_embeddings(len(tokenizer))
    cut.save_pretrained(smaller)
    tokenizer.add_special_tokens({"pad_token": "<|added|>"})
    tokenizer.save_pretrained(smaller)
    beta = {"beta": 0.1} if subject == "rlvr" else {}
    compute = {"packing": False}  # so that there is padding
    rows = rows_for(subject, 4)
    for row in rows:
        row.get("prompt", row.get("messages"))[0]["content"] += "<|added|>"
    _, step = flown(monkeypatch, tmp_path / "dry", smaller, subject, rows, compute, **beta)
    assert step.num_tokens > 0
