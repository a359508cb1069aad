"""Who writes a training's rollouts: the same texts whatever the cut, the ranks and the engine; a stale one ends it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings
from smoltulu.tasks.generation.engines import CopyEngine
from smoltulu.tasks.generation.freshness import StaleEngineError
from smoltulu.tasks.generation.importance import importance_weights
from smoltulu.tasks.generation.interface import Request, Written
from smoltulu.tasks.training import grpo, ppo
from smoltulu.tasks.training.rlvr import train_rlvr
from smoltulu.tasks.training.rollouts import Backend
from tests import small_ppo
from tests.ranks import Case, run_in_ranks
from tests.tasks.training.test_grpo import arguments_of, prompts
from tests.tiny_model import build_tiny_model

#: Three batches of rollouts, two groups of four each.
GRPO: dict[str, Any] = {
    "num_steps": 3, "effective_batch_size": 8, "num_generations": 4, "held_out": {"num_prompts": 3, "every_steps": 2},
    "max_rollouts_without_signal": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def log(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / f"{name}.jsonl").open()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path, atol: float = 1e-4) -> None:
    """Same texts, same held-out answers, same weights but for rounding."""
    assert log(one, "samples") == log(other, "samples") and log(one, "samples")
    assert log(one, "held_out") == log(other, "held_out")
    expected = weights(one)
    for name, weight in weights(other).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_generation_does_not_depend_on_micro_batches_or_on_random_state(
    model: Path, tmp_path: Path, algorithm: str
) -> None:
    """The second run goes on from step 1, cut otherwise, and writes with a copy of the policy."""
    settings = GRPO | {"algorithm": algorithm}
    train_rlvr(*arguments_of(tmp_path / "one", model, settings, prompts(16)))
    first = arguments_of(tmp_path / "two", model, settings, prompts(16), save_steps=1)
    second = {"per_device_train_batch_size": 2, "save_steps": 1, "generation_device": "cpu"}
    train_rlvr(*first)
    checkpoints = tmp_path / "two" / "work" / "checkpoints"
    for step in (2, 3):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "two" / "out")
    torch.manual_seed(99)
    train_rlvr(*arguments_of(tmp_path / "two", model, settings, prompts(16), **second))
    assert_same_run(tmp_path / "one" / "out", tmp_path / "two" / "out")


def test_ppo_writes_the_same_with_a_copy_of_the_policy(tmp_path: Path) -> None:
    """With an adapter, which the copy gets added to its weights."""
    inputs = small_ppo.world(tmp_path)
    settings = {"lora": {"r": 4}, "num_episodes": 16, "held_out": {"num_prompts": 3, "every_steps": 4}}
    one = small_ppo.run(inputs, tmp_path / "one", settings)
    other = small_ppo.run(inputs, tmp_path / "other", settings, generation_device="cpu")
    assert one.log("prompts") == other.log("prompts")
    assert_same_run(one.folder / "out", other.folder / "out", atol=2e-4)
    assert all(line["sampling_difference"] < 1e-4 for line in other.log("history") if "sampling_difference" in line)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_sync_that_is_lost_ends_the_training_at_the_first_probe(
    algorithm: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rollouts are of the model that both were loaded from; before the second ones, the policy moved."""
    monkeypatch.setattr(CopyEngine, "sync", lambda engine, weights: None)
    with pytest.raises(StaleEngineError, match=r"moved by .* and the engine's by"):
        if algorithm == "ppo":
            small_ppo.run(small_ppo.world(tmp_path), tmp_path, generation_device="cpu")
        else:
            settings = GRPO | {"held_out": None, "learning_rate": 1e-2}
            train_rlvr(*arguments_of(tmp_path, model, settings, prompts(16), generation_device="cpu", save_steps=1))
    samples = [json.loads(line) for line in (tmp_path / "work" / "logs" / "samples.jsonl").open()]
    assert {line["step"] for line in samples} == {0}


# ------------------------------------------------------------------------------------------ a sampler that differs


def test_importance_weights_by_hand() -> None:
    logps, sampled = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.0 - math.log(4), -3.0 + math.log(2)])
    made, ratio = importance_weights(logps, sampled, 2.0)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 4.0, 0.5]))
    torch.testing.assert_close(made, torch.tensor([1.0, 2.0, 0.5]))
    assert importance_weights(logps, sampled, None)[0].tolist() == [1.0, 1.0, 1.0]


def shifted(backend: Backend, by: float) -> Backend:
    """A sampler that gives every token a log-probability that is `by` above the policy's."""

    def write(requests: Sequence[Request]) -> list[Written]:
        return [replace(one, logps=[logp + by for logp in one.logps]) for one in backend(requests)]

    return write


@pytest.mark.parametrize(("cap", "share"), [(None, 1.0), (2.0, 0.5), (0.25, 0.25)])
def test_ppo_weighs_tokens_by_the_ratio_up_to_its_cap(tmp_path: Path, cap: float | None, share: float) -> None:
    """Policy's over sampler's probability is a half: so are loss and gradient."""
    inputs = small_ppo.world(tmp_path)
    changes = {
        "num_episodes": 4, "num_minibatches": 1, "num_ppo_epochs": 1, "whiten_advantages": False, "beta": 0.0,
        "non_stop_reward": -10.0,
    }  # fmt: skip

    def first(name: str, **given: Any) -> tuple[float, float, dict[str, float]]:
        config = PPOSettings.model_validate(small_ppo.SETTINGS | changes | given)
        trainer = ppo.build(config, inputs, small_ppo.context(tmp_path / name))
        trainer.backend = shifted(trainer.backend, math.log(2))
        trainer.train()
        [logs] = [line for line in trainer.state.log_history if "policy_loss" in line]
        return logs["policy_loss"], logs["grad_norm"], logs

    loss, norm, _ = first("plain")
    weighed_loss, weighed_norm, logs = first("weighed", importance_sampling_cap=cap)
    assert weighed_loss == pytest.approx(share * loss, rel=1e-3) and weighed_norm == pytest.approx(
        share * norm, rel=1e-3
    )
    assert logs["sampler/ratio"] == pytest.approx(0.5, rel=1e-3) == logs["sampler/ratio_max"]


@pytest.mark.parametrize("cap", [2.0, 0.25])
def test_grpo_weighs_tokens_by_the_ratio_up_to_its_cap(model: Path, tmp_path: Path, cap: float) -> None:
    settings = GRPO | {"held_out": None, "num_steps": 1, "importance_sampling_cap": cap}
    trainer = grpo.build(*arguments_of(tmp_path, model, settings, prompts(8), per_device_train_batch_size=8))
    trainer.backend = shifted(trainer.backend, math.log(2))
    trainer.model.train()
    rows = [trainer.train_dataset[place // 4] for place in range(8)]
    made = trainer._generate_and_score_completions(rows)
    mask = made["completion_mask"].bool()
    torch.testing.assert_close(
        made["importance_sampling_ratio"][mask], torch.full((int(mask.sum()),), min(0.5, cap)), rtol=1e-3, atol=0
    )
    assert trainer._metrics["train"]["sampling/importance_sampling_ratio/max"] == pytest.approx(
        [min(0.5, cap)], rel=1e-3
    )


@pytest.mark.slow
def test_ranks_that_write_with_copies_of_a_divided_policy_train_as_one_process(tmp_path: Path) -> None:
    """FSDP2: each rank's copy gets whole weights. A group of four lies on two ranks: each writes some of it."""
    prompts = small_ppo.world(tmp_path / "world")
    groups = {
        "learning_rate": 1e-3, "effective_batch_size": 4, "num_generations": 4, "num_steps": 3,
        "max_prompt_length": 100, "max_completion_length": 6, "precision": "float32", "gate": {"num_prompts": 0},
    }  # fmt: skip
    cases = [
        Case("ppo", "rlvr", PPOSettings.model_validate(small_ppo.SETTINGS | {"num_episodes": 16}), prompts),
        Case("grpo", "rlvr", GRPOSettings.model_validate(groups), prompts),
    ]
    one = run_in_ranks(tmp_path, 1, cases)
    copies = {"parallel": "fsdp2", "generation_device": "cpu"}
    other = run_in_ranks(tmp_path, 2, [replace(case, compute=copies) for case in cases])
    for name, ran in one.items():
        assert other[name].log("samples") == ran.log("samples")
        for parameter, weight in ran.weights().items():
            torch.testing.assert_close(other[name].weights()[parameter], weight, rtol=0, atol=2e-4)
