"""No field of a trainer's config that changes what is trained stands at a library's default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, RewardConfig, RLOOConfig, SFTConfig

import smoltulu.tasks.training.dpo
import smoltulu.tasks.training.grpo
import smoltulu.tasks.training.reward_model
import smoltulu.tasks.training.sft
from smoltulu.tasks.trainer.arguments import FIXED, LEFT_ALONE, LEFT_ALONE_IN, config_of
from tests.small_runs import conversations, pairs, trainer_of
from tests.tasks.training.test_grpo import trainer_of_rollouts
from tests.tiny_model import build_tiny_model

CONFIGS: dict[str, tuple[type, Any]] = {
    "sft": (SFTConfig, smoltulu.tasks.training.sft),
    "reward_model": (RewardConfig, smoltulu.tasks.training.reward_model),
    "dpo": (TrainingArguments, smoltulu.tasks.training.dpo),
    "grpo": (GRPOConfig, smoltulu.tasks.training.grpo),
    "rloo": (RLOOConfig, smoltulu.tasks.training.grpo),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("stage", list(CONFIGS))
def test_every_field_is_set_or_known_to_change_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of the real trainer: a field that another version adds makes this fail, and its trainings are refused."""
    kind, module = CONFIGS[stage]
    seen: list[tuple[Any, dict[str, Any]]] = []

    def spy(config: Callable[..., Any], **arguments: Any) -> Any:
        seen.append((config, arguments))
        return config_of(config, **arguments)

    monkeypatch.setattr(module, "config_of", spy)
    if stage in ("grpo", "rloo"):
        trainer = trainer_of_rollouts(tmp_path, model, {"algorithm": stage})
    else:
        trainer = trainer_of(stage, tmp_path, model, conversations(4) if stage == "sft" else pairs(4), {})
    ((config, arguments),) = seen
    left = LEFT_ALONE | LEFT_ALONE_IN[kind.__name__]
    assert config is kind and type(trainer.args) is kind
    assert not left.keys() & arguments.keys(), "set, and said to change nothing"
    assert left.keys() | arguments.keys() == {field.name for field in fields(kind) if field.init}
    assert all(left.values())
    # What is set is what the trainer works with. The library writes both as objects of its own.
    for name in FIXED.keys() - {"optim", "accelerator_config", "fsdp"}:
        assert getattr(trainer.args, name) == arguments[name], name
    assert trainer.args.optim.value == "adamw_torch_fused" and not trainer.args.fsdp


def test_fixed_values_are_those_that_finished_trainings_had() -> None:
    """Of transformers 5.23, which wrote them before they were set: keys and losses stay."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    assert {name: defaults[name] for name in FIXED.keys() - {"accelerator_config"}} == {
        name: value for name, value in FIXED.items() if name != "accelerator_config"
    }
    args = TrainingArguments(use_cpu=True)
    given = TrainingArguments(use_cpu=True, accelerator_config=FIXED["accelerator_config"])
    assert args.accelerator_config.to_dict() == given.accelerator_config.to_dict()


def test_a_config_of_another_version_is_refused() -> None:
    def named(*names: str) -> Any:
        return make_dataclass("RLOOConfig", [(name, float, 0.0) for name in names], namespace={"n_gpu": 4})

    assert config_of(named("beta", "pad_to_multiple_of"), beta=0.5).beta == 0.5
    assert config_of(named("beta"), beta=0.5)._n_gpu == 1  # transformers would spread a batch over four
    with pytest.raises(ValueError, match=r"trl 1\..* has fields .* does not know: entropy_bonus. The same recipe"):
        config_of(named("beta", "entropy_bonus"), beta=0.5)
    with pytest.raises(ValueError, match="lacks fields that decide what is trained: beta"):
        config_of(named("run_name"), beta=0.5)
