"""One, two and four ranks, DDP and FSDP2: the losses, rows and weights of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltulu.schemas.rlvr import PPOSettings
from tests.ranks import Case, Ran, run_in_ranks
from tests.small_ppo import SETTINGS as PPO
from tests.small_ppo import world
from tests.small_runs import conversations, pairs, stage_arguments
from tests.tiny_model import build_tiny_model

#: Thirteen rows, four a step: epochs of four steps, whose last has one row.
SETTINGS: dict[str, Any] = {"max_steps": 6, "num_train_epochs": 2, "effective_batch_size": 4, "seed": 3}
RANKS = (2, 4)


def cases(folder: Path) -> list[Case]:
    base = build_tiny_model(folder / "base")

    def case(name: str, stage: str, settings: dict[str, Any], held_out: Any = None, **compute: Any) -> Case:
        rows = conversations(13) if stage == "sft" else pairs(13)
        config, inputs, _ = stage_arguments(
            stage, folder / "made" / name, base, rows, SETTINGS | settings, held_out=held_out, **compute
        )
        return Case(name, stage, config, inputs, compute)

    best = {"held_out": {"every_steps": 1, "keep": "best"}, "learning_rate": 3e-2}
    ppo = PPO | {"num_episodes": 16, "critic": {"warmup_steps": 1}}
    return [
        case("sft", "sft", {}),
        case("sft-tokens", "sft", {}, tokens_per_device=60, packing=False),
        case("sft-checkpointed", "sft", {"max_steps": 2}, activation_checkpointing=True),
        case("sft-held-out", "sft", best, held_out=conversations(20)[13:]),
        case("reward-model", "reward_model", {}),
        case("reward-model-padded", "reward_model", {"max_steps": 4}, packing=False, tokens_per_device=150),
        case("dpo", "dpo", {}, packing=False),
        case("dpo-tokens", "dpo", {"max_steps": 4}, tokens_per_device=150),
        Case("ppo", "rlvr", PPOSettings.model_validate(ppo), world(folder / "world")),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int, str], Ran]]:
    """Case, number of ranks, kind of parallelism -> what was trained."""
    root = tmp_path_factory.mktemp("ranks")
    asked = cases(root)
    made = {(name, 1, "ddp"): ran for name, ran in run_in_ranks(root, 1, asked).items()}
    for num_ranks in RANKS:
        both = [
            replace(case, name=f"{case.name}", compute=case.compute | {"parallel": parallel})
            for case in asked
            for parallel in ("ddp", "fsdp2")
        ]
        run_in_ranks(root, num_ranks, both)
        made |= {(case.name, num_ranks, case.compute["parallel"]): Ran(case.folder(root, num_ranks)) for case in both}
    return made


NAMES = (
    "sft", "sft-tokens", "sft-checkpointed", "sft-held-out", "reward-model", "reward-model-padded", "dpo", "dpo-tokens",
    "ppo",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_as_one_process(
    runs: dict[tuple[str, int, str], Ran], name: str, num_ranks: int, parallel: str
) -> None:
    one, other = runs[name, 1, "ddp"], runs[name, num_ranks, parallel]
    assert len(one.history) == len(other.history) > 1
    for expected, found in zip(one.history, other.history, strict=True):
        assert found.keys() == expected.keys()
        assert found["step"] == expected["step"] and found.get("num_tokens") == expected.get("num_tokens")
        for key in ("loss", "held_out/loss", "grad_norm"):
            assert found.get(key) == pytest.approx(expected.get(key), abs=1e-5), (expected["step"], key)
    assert other.rows == one.rows
    for model in ("model", "critic") if name == "ppo" else ("model",):
        weights = other.weights(model)
        assert weights.keys() == one.weights(model).keys()
        for key, value in one.weights(model).items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-4)
