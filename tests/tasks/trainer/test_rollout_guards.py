"""What ends RLVR as collapsed: rules by hand, and a run that each of them ends, after a resume too."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.common import scientific
from smoltulu.schemas.held_out import RolloutGuards
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.tasks.trainer.rollout_guards import WindowMean, rollout_guards, rules_of, said_of
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.small_ppo import SETTINGS, run, world
from tests.tasks.training.test_grpo import arguments_of, prompts
from tests.tiny_model import build_tiny_model


def test_mean_of_a_window_by_hand() -> None:
    mean = WindowMean(4)
    mean.add(1, 10.0)
    mean.add(3, 1.0)  # of steps 2 and 3
    assert mean.mean() is None
    mean.add(4, 5.0)
    assert mean.mean() == (10 + 2 * 1 + 5) / 4
    mean.add(5, 0.0)  # step 1 is out
    assert mean.mean() == (2 * 1 + 5 + 0) / 4
    mean.add(6, math.nan)
    mean.add(8, 3.0)
    assert mean.mean() == (5 + 0 + 2 * 3) / 4, "what is no number is left out"


def test_an_infinite_kl_is_above_every_limit() -> None:
    """exp of a difference of 89 nats is no float32 any more: then the policy is as far away as can be."""
    mean = WindowMean(2)
    mean.add(1, 0.1)
    mean.add(2, math.inf)
    [rule] = rules_of(RolloutGuards(max_kl=10.0))
    assert rule.is_broken(mean.mean() or 0.0)


def test_a_window_begins_after_the_warm_up() -> None:
    mean = WindowMean(2, first=3)
    for step, value in ((2, 9.0), (4, 9.0), (5, 1.0), (6, 3.0)):
        mean.add(step, value)
    assert mean.mean() == 2.0, "steps 3 and 4 are one mean, half of it warm-up"


def test_an_entry_may_stand_for_more_steps_than_the_window_has() -> None:
    mean = WindowMean(3)
    mean.add(10, 2.5)
    assert mean.mean() == 2.5


def test_rules() -> None:
    assert rules_of(RolloutGuards()) == [] and rollout_guards(RolloutGuards()) is None
    most, least = rules_of(RolloutGuards(max_kl=0.5, min_entropy=0.1))
    assert most.is_broken(0.6) and not most.is_broken(0.5) and not most.is_broken(-1.0)
    assert least.is_broken(0.05) and not least.is_broken(0.1)
    said = said_of(least, 0.0123, 2000, 20)
    assert "at step 2,000 the entropy of the policy, a token, is 0.0123 in the mean of the last 20 steps, below" in said
    names = [name for name in RolloutGuards.model_fields if name != "window"]
    every = RolloutGuards(**dict.fromkeys(names, 0.5) | {"max_mean_length": 9})
    assert [rule.name for rule in rules_of(every)] == names, "every limit has a rule"


@pytest.mark.parametrize(("changes", "said"), [
    ({"guards": {"window": 13, "min_entropy": 0.1}}, r"guards\.window 13 is more than the run's 12 optimizer steps"),
    ({"guards": {"max_kl": 1.0}, "beta": 0.0}, "needs the reference model, which beta 0 does without"),
    ({"guards": {"max_mean_length": 6.0}}, r"guards\.max_mean_length 6 is not below max_completion_length 6"),
    ({"guards": {"min_mean_length": 5.0, "max_mean_length": 4.0}}, "min_mean_length 5 is not below max_mean_length 4"),
    ({"guards": {"min_groups_with_signal": 0.1}, "reward": "constant"}, "would end every run with reward constant"),
    ({"guards": {"min_groups_with_signal": 0.1}, "reward_model_weight": 0.5}, "would never end a run with rew"),
    ({"guards": {"window": 8, "min_explained_variance": 0.0}, "critic": {"warmup_steps": 5}},
     r"guards\.window 8 is more than the 7 optimizer steps after the critic's warm-up"),
    ({"guards": {"max_klx": 1.0}}, "Extra inputs"),
])  # fmt: skip
def test_guards_that_do_not_fit_a_run_are_refused(changes: dict[str, Any], said: str) -> None:
    short = {} if "window" in changes["guards"] else {"window": 4}
    with pytest.raises(ValidationError, match=said):
        RLVRSettings.model_validate(SETTINGS | changes | {"guards": short | changes["guards"]})


def test_guards_are_in_no_key() -> None:
    guarded = RLVRSettings.model_validate(SETTINGS | {"guards": {"window": 4, "min_entropy": 0.1}})
    assert scientific(guarded) == scientific(RLVRSettings.model_validate(SETTINGS))


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_guard_of_the_critic_is_refused_where_there_is_none(algorithm: str) -> None:
    settings = {
        "algorithm": algorithm, "learning_rate": 1e-5, "effective_batch_size": 8, "num_generations": 2, "num_steps": 40,
        "max_prompt_length": 64, "max_completion_length": 8, "guards": {"min_explained_variance": 0.0},
    }  # fmt: skip
    with pytest.raises(ValidationError, match=rf"is about a critic, and {algorithm} has none"):
        RLVRSettings.model_validate(settings)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLVRInputs:
    return world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("guards", "said"), [
    ({"max_kl": 1e-9}, "the KL to the starting model, a token, is"),
    ({"min_entropy": 9.0}, "explores nothing: lower learning_rate"),
    ({"max_truncated_share": 0.01}, "share of completions without their end is"),
    ({"max_mean_length": 1.0}, "above guards.max_mean_length 1"),
    ({"min_explained_variance": 0.99}, "raise critic.warmup_steps or set critic.gae_lambda to 1"),
])  # fmt: skip
def test_each_ends_a_run_of_ppo(inputs: RLVRInputs, tmp_path: Path, guards: dict[str, float], said: str) -> None:
    settings = {"guards": {"window": 6, **guards}, "critic": {"warmup_steps": 2}, "learning_rate": 0.05}
    if "max_kl" in guards:
        settings |= {"num_episodes": 48}
    with pytest.raises(ValueError, match=r"the policy collapses: at step \d+ the ") as caught:
        run(inputs, tmp_path, settings)
    assert said in str(caught.value) and "is kept" not in str(caught.value)
    step = int(str(caught.value).partition("at step ")[2].partition(" ")[0])
    assert step >= 8, "six steps after the warm-up"
    saved = [path.name for path in (tmp_path / "work" / "checkpoints").glob("checkpoint-*")]
    assert saved and f"checkpoint-{step}" not in saved


def test_limits_that_are_never_looked_at_are_refused(inputs: RLVRInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging_steps 100 is more than the run's 12 steps: no limit .*min_entropy"):
        run(inputs, tmp_path, {"guards": {"window": 6, "min_entropy": 9.0}}, logging_steps=100)


def test_a_resumed_run_stops_at_the_same_step(inputs: RLVRInputs, tmp_path: Path) -> None:
    """The window began before the checkpoint that it goes on from."""
    settings = {"guards": {"window": 6, "min_entropy": 9.0}}
    said = []
    for _ in range(2):
        with pytest.raises(ValueError, match="the policy collapses") as caught:
            run(inputs, tmp_path, settings)
        said.append(str(caught.value))
    assert said[0] == said[1] and "at step 6 " in said[0]
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "4\n"
    shutil.rmtree(tmp_path / "out")
    made = run(inputs, tmp_path, {"guards": {"window": 6, "min_entropy": 0.1}})
    assert made.outputs.num_steps == 12, "with another limit it goes on"


def test_grpo_too(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    settings = {"num_steps": 5, "guards": {"window": 3, "max_truncated_share": 0.01}}
    config, given, context = arguments_of(tmp_path, model, settings, prompts(20), save_steps=1)
    with pytest.raises(ValueError, match=r"at step 3 the share of completions without their end is"):
        train_rlvr(config, RLVRInputs(**given.model_dump()), context)
    history = [json.loads(line) for line in (tmp_path / "work" / "logs" / "history.jsonl").open()]
    assert [one["step"] for one in history] == [1, 2, 3]
