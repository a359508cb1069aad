"""PPO by two processes: the rollouts, prompts and weights of one, but for rounding; a resume changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.stages import STAGES
from tests.small_ppo import SETTINGS, context, differing, run, world

#: Three samples of each prompt: a process has some of one. Of the five held-out prompts one process has three.
CHANGES: dict[str, Any] = {
    "effective_batch_size": 6, "num_minibatches": 1, "num_samples_per_prompt": 3, "num_episodes": 12,
    "non_stop_reward": None, "critic": {"warmup_steps": 1},
    "held_out": {"num_prompts": 5, "num_samples": 2, "every_steps": 2},
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    inputs = world(tmp_path / "world")
    alone = run(inputs, tmp_path / "alone", CHANGES, per_device_train_batch_size=6)
    config = PPOSettings.model_validate(SETTINGS | CHANGES)
    compute = context(tmp_path / "two", num_processes=2, launcher="warm", per_device_train_batch_size=3).compute
    spec = Spec(stage="rlvr", version=1, config=scientific(config), inputs={}, externals={})
    work = tmp_path / "two" / "work"
    job = Job("rlvr", STAGES["rlvr"], config, compute, spec, inputs)

    def by_two(name: str) -> Path:
        (work / name).mkdir()
        run_child(job, work, work / name, logging.getLogger("test"))
        return work / name

    out = by_two("output")

    def log(folder: Path, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "logs" / f"{name}.jsonl").open()]

    assert log(out, "prompts") == alone.log("prompts") and log(out, "samples") == alone.log("samples")
    history = log(out, "history")
    for one, other in zip(alone.log("history"), history, strict=True):
        for name in one.keys() - {"tokens_per_second", "peak_memory_gb", "sampling_difference"}:
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name
    assert len(history) == 4 + 3 and history[-1]["learning_rate"] > 0
    assert log(out, "held_out") == alone.log("held_out") and len(alone.log("held_out")) == 3
    for folder, expected in (("model", alone.policy), ("critic", alone.critic)):
        for name, value in load_file(out / folder / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4)

    # Gone on with from the first rollout batch, by two processes again.
    for step in (3, 4):
        (work / "checkpoints" / f"checkpoint-{step}" / CHECKPOINT_MARKER).unlink(missing_ok=True)
    again = by_two("again")
    assert (work / "resumed.jsonl").read_text() == "2\n"
    assert log(again, "prompts") == log(out, "prompts") and log(again, "samples") == log(out, "samples")
    for folder in ("model", "critic"):
        one, other = (load_file(made / folder / "model.safetensors") for made in (out, again))
        assert differing(one, other) == []
