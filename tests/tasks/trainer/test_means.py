"""Logged metrics of a training do not depend on how its batches are cut into micro-batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.means import weigh
from smoltulu.tasks.training.rlvr import train_rlvr
from tests.small_runs import conversations, pairs, run, training_inputs, turn
from tests.tiny_model import build_tiny_model

#: What a run at another time logs otherwise; and the epoch, which transformers counts in micro-batches.
TIMED = ("tokens_per_second", "step_time", "peak_memory_gb", "epoch")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def same(histories: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The first of these histories, all of which are equal but for rounding."""
    for history in histories[1:]:
        for one, other in zip(histories[0], history, strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - set(TIMED):
                assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name
    return histories[0]


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_sft(base: Path, tmp_path: Path, packing: bool, logging_steps: int) -> None:
    settings = {"max_steps": 6, "num_train_epochs": 3, "effective_batch_size": 8, "learning_rate": 1e-2}
    compute = {"packing": packing, "logging_steps": logging_steps, "save_steps": 6}
    first = same(
        [
            run("sft", tmp_path / str(size), base, conversations(22), settings, **compute,
                per_device_train_batch_size=size).history
            for size in (8, 2, 1)
        ]
    )  # fmt: skip
    assert len(first) == 6 // logging_steps and first[-1]["mean_token_accuracy"] > 0 and first[-1]["entropy"] > 0


def test_reward_model(base: Path, tmp_path: Path) -> None:
    """The second step of an epoch has three pairs, which lie in micro-batches of two and of one."""
    settings = {"num_train_epochs": 2, "effective_batch_size": 8, "learning_rate": 1e-3}
    first = same(
        [
            run("reward_model", tmp_path / str(size), base, pairs(11), settings,
                per_device_train_batch_size=size).history
            for size in (8, 4, 2)
        ]
    )  # fmt: skip
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"} <= first[0].keys()
    assert first[1]["min_reward"] < first[1]["mean_reward"] < first[1]["max_reward"]


def test_dpo(base: Path, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "effective_batch_size": 8}
    same(
        [
            run("dpo", tmp_path / str(size), base, pairs(11), settings, per_device_train_batch_size=size).history
            for size in (8, 4, 2)
        ]
    )


@pytest.mark.parametrize("changes", [
    {}, {"loss_type": "bnpo"}, {"loss_type": "bnpo", "steps_per_generation": 2},
    {"importance_sampling_level": "sequence", "mask_truncated_completions": True},
    {"top_entropy_quantile": 0.3, "steps_per_generation": 2, "kl_form": "k3"},
    {"algorithm": "rloo"}, {"algorithm": "rloo", "steps_per_generation": 2},
])  # fmt: skip
def test_rlvr(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Answers of several lengths; the second pass over them is no longer on the policy, and clips."""
    settings = RLVRSettings.model_validate({
        "learning_rate": 3e-3, "effective_batch_size": 8, "num_generations": 4, "num_iterations": 2, "beta": 0.05,
        "seed": 4, "num_steps": 2 * changes.get("steps_per_generation", 1), "epsilon": 0.02, "max_prompt_length": 100,
        "max_completion_length": 10, "precision": "float32", "gate": {"num_prompts": 0},
    } | changes)  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"id": f"0:{i}", "prompt": [turn("user", f"What is {i}?")], "verifier": "constraint",
         "ground_truth": json.dumps({"kind": "word_count", "count": 2})}
        for i in range(24)
    ]  # fmt: skip
    histories = []
    for size in (8, 2, 1):
        folder = tmp_path / str(size)
        for name in ("out", "work/checkpoints", "before"):
            (folder / name).mkdir(parents=True)
        compute = ComputeSettings(device="cpu", per_device_train_batch_size=size, logging_steps=1, num_threads=1)
        inputs = training_inputs("rlvr", folder / "before", base, rows, settings, compute)
        context = StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)
        train_rlvr(settings, RLVRInputs(**inputs.model_dump()), context)
        histories.append([json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()])
    first = same(histories)
    assert first[0]["completions/min_length"] < first[0]["completions/max_length"]
    assert first[0]["reward_std"] > 0 and first[-1]["clip_ratio/region_mean"] > 0 and first[0]["grad_norm"] > 0
    assert 0 < first[0]["groups_with_signal"] <= 1
    # RLOO's KL is of the rollouts as they are written: none before the first step, and logged once a generation.
    assert abs(first[0]["kl"]) < 1e-5 if settings.algorithm == "rloo" else first[-1]["kl"] > 0


@given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=5), min_size=1, max_size=6))
def test_any_cut_gives_the_mean_and_the_extremes_of_all(parts: list[list[float]]) -> None:
    metrics = {
        "mean": [math.fsum(part) / len(part) for part in parts],
        "low": [min(part) for part in parts],
        "high": [max(part) for part in parts],
        "other": [1.0, 2.0],
    }
    weigh(metrics, [len(part) for part in parts], ("mean", "absent"), "low", "high")
    every = [value for part in parts for value in part]
    assert metrics["mean"] == [pytest.approx(math.fsum(every) / len(every), abs=1e-9)]
    assert (metrics["low"], metrics["high"], metrics["other"]) == ([min(every)], [max(every)], [1.0, 2.0])


def test_a_micro_batch_that_is_masked_out_has_no_extremes() -> None:
    """TRL gives NaN there, whose order among numbers is chance."""
    metrics = {"low": [math.nan, 2.0, 1.0], "high": [1.0, math.nan, 2.0]}
    weigh(metrics, [0, 3, 1], (), "low", "high")
    assert metrics == {"low": [1.0], "high": [2.0]}
    metrics = {"low": [math.nan]}
    weigh(metrics, [0], (), "low", "high")
    assert math.isnan(metrics["low"][0])


def test_nothing_to_weigh() -> None:
    metrics = {"mean": [0.0, 0.0]}
    weigh(metrics, [0, 0], ("mean",))
    assert metrics == {"mean": [0.0]}
