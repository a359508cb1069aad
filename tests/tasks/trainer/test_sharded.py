"""One, two and four ranks, DDP and FSDP2: the losses, rows and weights of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings, RLOOSettings
from tests.ranks import Case, Ran, run_in_ranks
from tests.small_ppo import SETTINGS as PPO
from tests.small_ppo import world
from tests.small_runs import conversations, pairs, stage_arguments
from tests.tiny_model import build_tiny_experts, build_tiny_model

#: Thirteen rows, four a step: epochs of four steps, whose last has one row.
SETTINGS: dict[str, Any] = {"max_steps": 6, "num_train_epochs": 2, "effective_batch_size": 4, "seed": 3}
GROUPS: dict[str, Any] = {
    "learning_rate": 1e-3, "effective_batch_size": 8, "num_generations": 2, "num_steps": 3, "max_prompt_length": 100,
    "max_completion_length": 6, "precision": "float32", "gate": {"num_prompts": 0}, "beta": 0.1,
}  # fmt: skip
KINDS = ("ddp", "fsdp2")
Runs = dict[tuple[str, int, str], Ran]
#: What four ranks train as well, and what two do alone: a training by four costs two cores three seconds.
BY_FOUR = ("sft", "sft-tokens", "reward-model", "dpo-tokens", "ppo")
BY_TWO = ("sft-experts", "sft-held-out", "reward-model-tokens", "dpo", "grpo", "rloo")
SAVED = ("sft-saved", "reward-model-saved")
#: Begun by one process, gone on with by two with FSDP2, ended by two with DDP: the steps after which the first two
#: fail. PPO has a checkpoint at the end of a rollout batch, four steps. (SFT: test_checkpoint_ranks.py.)
RESUMED = {"reward-model": (1, 3), "dpo-tokens": (1, 3), "ppo-long": (5, 9), "grpo": (1, 2)}


def all_cases(folder: Path) -> list[Case]:
    base, prompts = build_tiny_model(folder / "base"), world(folder / "world")

    def case(
        name: str, stage: str, settings: dict[str, Any], held_out: Any = None, model: Path = base, **compute: Any
    ) -> Case:
        rows = conversations(13) if stage == "sft" else pairs(13)
        config, inputs, _ = stage_arguments(
            stage, folder / "made" / name, model, rows, SETTINGS | settings, held_out=held_out, **compute
        )
        return Case(name, stage, config, inputs, compute)

    best = {"held_out": {"every_steps": 1, "keep": "best"}, "learning_rate": 3e-2}
    ppo = PPO | {"num_episodes": 16, "critic": {"warmup_steps": 1}, "reward_model_weight": 0.5}
    return [
        case("sft", "sft", {}),
        case("sft-tokens", "sft", {}, tokens_per_device=60, packing=False),
        case(
            "sft-experts",
            "sft",
            {"max_steps": 4},
            model=build_tiny_experts(folder / "experts"),
            activation_checkpointing=True,
        ),
        case("sft-held-out", "sft", best, held_out=conversations(20)[13:]),
        case("reward-model", "reward_model", {}),
        case("reward-model-tokens", "reward_model", {"max_steps": 4}, packing=False, tokens_per_device=150),
        case("dpo", "dpo", {}, packing=False),
        case("dpo-tokens", "dpo", {"max_steps": 4}, tokens_per_device=150),
        Case("ppo", "rlvr", PPOSettings.model_validate(ppo), prompts),
        Case("ppo-long", "rlvr", PPOSettings.model_validate(ppo | {"num_episodes": 24}), prompts),
        Case("grpo", "rlvr", GRPOSettings.model_validate(GROUPS), prompts),
        Case("rloo", "rlvr", RLOOSettings.model_validate(GROUPS | {"algorithm": "rloo"}), prompts),
        replace(case("sft-saved", "sft", {}), only_saves=True),
        replace(case("reward-model-saved", "reward_model", {}), only_saves=True),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Case, number of ranks, kind of parallelism -> what was trained."""
    root = tmp_path_factory.mktemp("ranks")
    cases = all_cases(root)
    made: Runs = {(name, 1, "ddp"): ran for name, ran in run_in_ranks(root, 1, cases).items()}
    for num_ranks in (2, 4):
        asked = [case for case in cases if case.name in (*BY_FOUR, *SAVED, *(BY_TWO if num_ranks == 2 else ()))]
        both = [replace(case, compute=case.compute | {"parallel": kind}) for case in asked for kind in KINDS]
        run_in_ranks(root, num_ranks, both)
        made |= {(case.name, num_ranks, case.compute["parallel"]): Ran(case.folder(root, num_ranks)) for case in both}
    return made


@pytest.fixture(scope="module")
def resumed(runs: Runs) -> dict[str, Ran]:
    root = runs["sft", 1, "ddp"].folder.parent
    first = [replace(case, attempt=0) for case in all_cases(root / "resumed") if case.name in RESUMED]
    for attempt, (num_ranks, kind) in enumerate([(1, "ddp"), (2, "fsdp2"), (2, "ddp")]):
        cases = [replace(case, attempt=attempt, compute=case.compute | {"parallel": kind}) for case in first]
        run_in_ranks(
            root,
            num_ranks,
            [replace(case, fails_after=(*RESUMED[case.name], None)[attempt]) for case in cases],
        )
    return {case.name: Ran(case.folder(root, 1)) for case in first}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "num_ranks"), [*((name, ranks) for name in BY_FOUR for ranks in (2, 4)), *((name, 2) for name in BY_TWO)]
)
def test_ranks_train_as_one_process(runs: Runs, name: str, num_ranks: int, kind: str) -> None:
    same_training(runs[name, 1, "ddp"], runs[name, num_ranks, kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_what_one_began_ranks_end(runs: Runs, resumed: dict[str, Ran], name: str) -> None:
    again = resumed[name]
    steps = [int(step) for step in (again.folder / "work" / "resumed.jsonl").read_text().split()]
    assert steps == [step // 4 * 4 if name == "ppo-long" else step for step in RESUMED[name]]
    same_training(runs[name, 1, "ddp"], again)


def same_training(one: Ran, other: Ran) -> None:
    """Steps, losses, rows, rollouts and weights."""
    assert len(one.history) == len(other.history) > 1
    for expected, found in zip(one.history, other.history, strict=True):
        assert found["step"] == expected["step"] and found.get("num_tokens") == expected.get("num_tokens")
        for key in expected.keys() & {"loss", "held_out/loss", "grad_norm", "critic/grad_norm", "reward", "kl"}:
            assert found[key] == pytest.approx(expected[key], abs=1e-5), (expected["step"], key)
    assert other.rows == one.rows
    has_critic = (one.folder / "out" / "critic").exists()
    if has_critic:
        assert other.log("prompts") == one.log("prompts") and other.log("samples") == one.log("samples")
    for model in ("model", "critic") if has_critic else ("model",):
        weights = other.weights(model)
        assert weights.keys() == one.weights(model).keys()
        for key, value in one.weights(model).items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SAVED)
def test_a_sharded_model_is_saved_bit_for_bit_as_a_whole_one(runs: Runs, name: str, num_ranks: int) -> None:
    """One plain folder, before any step; tied weights are one tensor in it."""
    whole, sharded = (runs[name, num_ranks, kind].folder / "out" / "model" for kind in KINDS)
    assert sorted(file.name for file in whole.iterdir()) == sorted(file.name for file in sharded.iterdir())
    for file in whole.iterdir():
        assert (sharded / file.name).read_bytes() == file.read_bytes(), file.name
    if name == "sft-saved":
        model = AutoModelForCausalLM.from_pretrained(sharded)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        base = load_file(runs[name, 1, "ddp"].folder.parent / "base" / "model.safetensors")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
