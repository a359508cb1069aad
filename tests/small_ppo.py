"""PPO on the two-layer model and a handful of prompts, through the stage's own function."""

from __future__ import annotations

import json
import multiprocessing
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import PPOSettings, RLVRInputs
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.small_runs import training_inputs, turn
from tests.tiny_model import build_tiny_model

#: Three rollout batches of two optimizer steps and two epochs: twelve steps.
SETTINGS: dict[str, Any] = {
    "algorithm": "ppo", "learning_rate": 1e-3, "effective_batch_size": 4, "num_minibatches": 2, "num_ppo_epochs": 2,
    "num_episodes": 24, "max_prompt_length": 100, "max_completion_length": 6, "precision": "float32",
    "gate": {"num_prompts": 0},
}  # fmt: skip


def prompts(count: int) -> list[dict[str, Any]]:
    """A random model sometimes writes exactly two words, so some completions are right."""
    truth = json.dumps({"kind": "word_count", "count": 2})
    return [
        {
            "id": f"0:{i}",
            "prompt": [turn("user", f"What is {i} plus {i % 7}?" + " Think." * (i % 5))],
            "verifier": "constraint",
            "ground_truth": truth,
        }
        for i in range(count)
    ]


def world(folder: Path, num_prompts: int = 20) -> RLVRInputs:
    """A policy, a reward model, and rows as the preflight leaves them."""
    build_tiny_model(folder / "model")
    build_tiny_model(folder / "reward_model", seed=1, num_labels=1)
    (folder / "before").mkdir()
    made = training_inputs(
        "rlvr",
        folder / "before",
        folder / "model",
        prompts(num_prompts),
        PPOSettings.model_validate(SETTINGS),
        ComputeSettings(device="cpu", num_threads=1),
    )
    return RLVRInputs(**made.model_dump() | {"reward_model": str(folder / "reward_model")})


def context(folder: Path, **compute: Any) -> StageContext:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "work" / "checkpoints").mkdir(parents=True, exist_ok=True)
    given = {"device": "cpu", "num_threads": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 1}
    return StageContext(
        folder / "out", folder / "work", ComputeSettings(**given | compute), lambda *args, **kwargs: None
    )


@dataclass(frozen=True)
class Run:
    """A finished training."""

    outputs: Any
    metrics: dict[str, float]
    folder: Path

    @property
    def policy(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / "model" / "model.safetensors")

    @property
    def critic(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / "critic" / "model.safetensors")

    def log(self, name: str) -> list[dict[str, Any]]:
        """Lines of history, prompts or samples."""
        return [json.loads(line) for line in (self.folder / "out" / "logs" / f"{name}.jsonl").open()]


def run(inputs: RLVRInputs, folder: Path, settings: dict[str, Any] | None = None, **compute: Any) -> Run:
    config = PPOSettings.model_validate(SETTINGS | (settings or {}))
    outputs, metrics = train_rlvr(config, inputs, context(folder, **compute))
    return Run(outputs, metrics, folder)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def killed(target: Any, *arguments: Any) -> None:
    """Call it in a process of its own, which must end by SIGKILL.

    Children begin as copies of a process that has imported everything.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.small_ppo", "trl", "smoltulu.tasks.training.ppo_trainer"])
    process = server.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
