"""SIGKILL in the middle of PPO, in a process of its own, in each of its phases; what goes on ends as if unbroken."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.schemas.rlvr import RLVRInputs
from tests.small_ppo import Run, differing, killed, run, world

#: Four steps a rollout batch: two epochs of two. The critic is alone for the first five.
SETTINGS: dict[str, Any] = {"critic": {"warmup_steps": 5}, "num_episodes": 32}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_generation() -> None:
    from smoltulu.tasks.generation import loop

    number, real = [0], loop._next

    def next_tokens(*args: Any) -> Any:
        number[0] += 1
        return die() if number[0] == 15 else real(*args)  # six tokens a batch: in the third

    loop._next = next_tokens


def killed_in_scoring() -> None:
    from smoltulu.tasks.training import ppo

    number, real = [0], ppo.scores_of

    def scores(*args: Any) -> Any:
        number[0] += 1
        return die() if number[0] == 2 else real(*args)

    ppo.scores_of = scores


def _killed_at_step(step: int) -> None:
    from smoltulu.tasks.training.ppo_trainer import PPOTrainer

    real = PPOTrainer.training_step

    def training_step(trainer: Any, *args: Any) -> Any:
        return die() if trainer.state.global_step == step else real(trainer, *args)

    PPOTrainer.training_step = training_step  # type: ignore[method-assign]


def killed_in_warm_up() -> None:
    _killed_at_step(4)


def killed_in_the_second_epoch() -> None:
    _killed_at_step(10)


def killed_while_a_checkpoint_is_written() -> None:
    """Half of the shards of policy and critic are there."""
    from smoltulu.tasks.trainer import checkpoint

    real = checkpoint.save_file

    def save(tensors: Any, file: Path, *args: Any) -> None:
        real(tensors, file, *args)
        if "checkpoint-8" in str(file):
            os.truncate(file, file.stat().st_size // 2)
            die()

    checkpoint.save_file = save


#: What kills -> the step of the newest checkpoint that is left (0: none). The last may still be being written then.
KILLS: dict[Callable[[], None], tuple[int, ...]] = {
    killed_in_generation: (4, 8),
    killed_in_scoring: (0, 4),
    killed_in_warm_up: (0, 4),
    killed_in_the_second_epoch: (8,),
    killed_while_a_checkpoint_is_written: (4,),
}


def child(kill: Callable[[], None], inputs: RLVRInputs, folder: Path) -> None:
    kill()
    run(inputs, folder, SETTINGS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLVRInputs:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(inputs: RLVRInputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(inputs, tmp_path_factory.mktemp("whole"), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_killed_run_goes_on_to_the_same_policy_and_critic(
    inputs: RLVRInputs, whole: Run, tmp_path: Path, kill: Callable[[], None]
) -> None:
    killed(child, kill, inputs, tmp_path)
    newest = newest_checkpoint(tmp_path / "work" / "checkpoints", full=True)
    step = newest[0] if newest else 0
    assert step in KILLS[kill]

    resumed = run(inputs, tmp_path, SETTINGS)
    told = tmp_path / "work" / "resumed.jsonl"
    assert told.read_text() == f"{step}\n" if step else not told.exists()
    assert differing(whole.policy, resumed.policy) == differing(whole.critic, resumed.critic) == []
    for name in ("prompts", "samples"):
        assert resumed.log(name) == whole.log(name)
    # Losses and all else, but for time and memory, are those of the unbroken run.
    measured = {"tokens_per_second", "peak_memory_gb"}
    for one, other in zip(whole.log("history"), resumed.log("history"), strict=True):
        assert {name: one[name] for name in one.keys() - measured} == {
            name: other[name] for name in other.keys() - measured
        }
