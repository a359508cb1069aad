"""The training stages on a real two-layer model: they train, micro-batching changes nothing, resume changes nothing."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.cache_utils import DynamicLayer

import smoltulu.tasks.engine.launch
from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER, newest_checkpoint
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import GRPOSettings, RLOOSettings
from smoltulu.schemas.training import (
    DPOSettings,
    GateSettings,
    RewardModelSettings,
    SFTSettings,
    TrainingInputs,
)
from smoltulu.tasks import stages
from smoltulu.tasks.engine.launch import _child_environment
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.arguments import on_one_gpu
from smoltulu.tasks.trainer.prepare import _check_num_gpus, _check_same_gpus, prepare_torch
from smoltulu.tasks.training.dpo import train_dpo
from smoltulu.tasks.training.grpo import build as build_rlvr
from smoltulu.tasks.training.reward_model import train_reward_model
from smoltulu.tasks.training.rewards import VerifiableReward
from smoltulu.tasks.training.rlvr import train_rlvr
from smoltulu.tasks.training.sft import train_sft
from tests.small_runs import training_inputs
from tests.tiny_model import build_tiny_model

NUM_ROWS = 48
SUPERVISED: dict[str, Any] = {
    "learning_rate": 1e-3, "effective_batch_size": 8, "max_length": 128, "precision": "float32", "warmup_ratio": 0.1,
}  # fmt: skip
NO_GATE: dict[str, Any] = {"gate": {"num_prompts": 0}}
STAGES: dict[str, tuple[Callable, Any, str]] = {
    "sft": (train_sft, SFTSettings(**SUPERVISED, **NO_GATE), "sft.jsonl"),
    "reward_model": (train_reward_model, RewardModelSettings(**SUPERVISED), "pairs.jsonl"),
    "dpo": (train_dpo, DPOSettings(**SUPERVISED, **NO_GATE), "pairs.jsonl"),
    "rlvr": (
        train_rlvr,
        GRPOSettings(learning_rate=1e-3, effective_batch_size=8, num_generations=4, num_steps=6, max_prompt_length=100,
                     max_completion_length=6, precision="float32", num_iterations=2, beta=0.05, **NO_GATE),
        "prompts.jsonl",
    ),
}  # fmt: skip
STAGES["rlvr, rloo"] = (
    train_rlvr,
    RLOOSettings(learning_rate=1e-3, effective_batch_size=8, num_generations=4, num_steps=6, max_prompt_length=100,
                 max_completion_length=6, precision="float32", num_iterations=2, **NO_GATE),
    "prompts.jsonl",
)  # fmt: skip
# An epoch is four steps, which are two of the pairs of prompts: the checkpoint of step 4 is at its end.
STAGES["rlvr, five prompts"] = (*STAGES["rlvr"][:2], "five_prompts.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a file of rows of each kind."""
    folder = tmp_path_factory.mktemp("world")
    build_tiny_model(folder / "model")

    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    files: dict[str, list[dict[str, Any]]] = {"sft.jsonl": [], "pairs.jsonl": [], "prompts.jsonl": []}
    for i in range(NUM_ROWS):
        question = turn("user", f"What is {i} plus {i % 7}?" + " Think." * (i % 5))
        good, bad = turn("assistant", f"{'so ' * (i % 4)}#### {i + i % 7}"), turn("assistant", f"#### {i} or more")
        files["sft.jsonl"].append({"id": f"0:{i}", "messages": question + good})
        files["pairs.jsonl"].append({"id": f"0:{i}", "prompt": question, "chosen": good, "rejected": bad})
        # A random model sometimes writes exactly two words: so there is an advantage and something to learn.
        truth = json.dumps({"kind": "word_count", "count": 2})
        files["prompts.jsonl"].append(
            {"id": f"0:{i}", "prompt": question, "verifier": "constraint", "ground_truth": truth}
        )
    files["five_prompts.jsonl"] = files["prompts.jsonl"][:5]
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def context(folder: Path, **compute: Any) -> StageContext:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "work" / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = {"device": "cpu", "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2} | compute
    return StageContext(folder / "out", folder / "work", ComputeSettings(**settings), lambda *args, **kwargs: None)


def inputs_of(stage: str, world: Path, folder: Path) -> TrainingInputs:
    """What the stage takes: the rows of its file, gone through the stages before it."""
    _, settings, file = STAGES[stage]
    rows = [json.loads(line) for line in (world / file).open()]
    before = folder / "before"
    before.mkdir(parents=True, exist_ok=True)
    return training_inputs(stage.partition(",")[0], before, world / "model", rows, settings, context(folder).compute)


def run(stage: str, world: Path, folder: Path, **compute: Any) -> tuple[Any, dict[str, float], dict[str, torch.Tensor]]:
    function, settings, _ = STAGES[stage]
    outputs, metrics = function(settings, inputs_of(stage, world, folder), context(folder, **compute))
    return outputs, metrics, load_file(folder / "out" / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_ends_with_bitwise_the_same_weights(stage: str, world: Path, tmp_path: Path) -> None:
    """Killed after its last checkpoint, its newest checkpoint torn: goes on from the one before and ends the same."""
    _, _, unbroken = run(stage, world, tmp_path / "unbroken")
    kept = tmp_path / "unbroken" / "work" / "checkpoints"
    steps = sorted(int(path.name.split("-")[1]) for path in kept.glob("checkpoint-*"))
    assert steps[-2:] == [4, 6] and len(steps) <= 3  # the newest two, and the best

    work = tmp_path / "resumed" / "work"
    work.mkdir(parents=True)
    shutil.copytree(tmp_path / "unbroken" / "work", work, dirs_exist_ok=True)
    (work / "checkpoints" / "checkpoint-6" / CHECKPOINT_MARKER).unlink()
    newest = newest_checkpoint(work / "checkpoints")
    assert newest is not None and newest[0] == 4
    outputs, _, resumed = run(stage, world, tmp_path / "resumed")

    assert (work / "resumed.jsonl").read_text() == "4\n" and outputs.num_steps == 6
    base = load_file(world / "model" / "model.safetensors")
    assert any(not torch.equal(base[name], value) for name, value in unbroken.items() if name in base)
    assert unbroken.keys() == resumed.keys()
    assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []
    history = [json.loads(line)["step"] for line in (tmp_path / "resumed" / "out" / "logs" / "history.jsonl").open()]
    assert history == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "rlvr", "rlvr, rloo"])
def test_bfloat16_as_on_a_gpu(stage: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast over float32 weights, on a CPU that can; the gate compares what is saved with what was trained."""
    _, _, exact = run(stage, world, tmp_path / "exact")
    for module in ("trainer.loop", "training.reference_logps"):
        monkeypatch.setattr(f"smoltulu.tasks.{module}.use_bfloat16", lambda precision, compute: True)
    inputs, (function, settings, _) = inputs_of(stage, world, tmp_path), STAGES[stage]
    if stage != "reward_model":
        gate = GateSettings(num_prompts=2, max_new_tokens=3, min_stopped_share=0)
        settings = settings.model_copy(update={"gate": gate})
    function(settings, inputs, context(tmp_path / "bfloat16"))
    trained = load_file(tmp_path / "bfloat16" / "out" / "model" / "model.safetensors")
    base = load_file(world / "model" / "model.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    # Near what float32 gives, and not the same: so it was bfloat16.
    assert any(not torch.equal(exact[name], value) for name, value in trained.items())
    for name, value in trained.items():
        assert torch.isfinite(value).all() and (name not in base or (value - base[name]).abs().max() < 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "rlvr", "rlvr, rloo"])
def test_every_stage_on_this_gpu(stage: str, world: Path, tmp_path: Path) -> None:
    """In bfloat16 to the end: trained, saved, compared, asked; then gone on with from the last checkpoint but one."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    inputs, (function, settings, _) = inputs_of(stage, world, tmp_path), STAGES[stage]
    changes: dict[str, Any] = {"precision": "bfloat16"}
    if stage != "reward_model":
        changes["gate"] = GateSettings(num_prompts=2, max_new_tokens=3, min_stopped_share=0)
    settings = settings.model_copy(update=changes)
    function(settings, inputs, context(tmp_path / "run", device="cuda"))
    weights = load_file(tmp_path / "run" / "out" / "model" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    (tmp_path / "run" / "work" / "checkpoints" / "checkpoint-6" / CHECKPOINT_MARKER).unlink()
    shutil.rmtree(tmp_path / "run" / "out")
    outputs, _ = function(settings, inputs, context(tmp_path / "run", device="cuda"))
    assert (tmp_path / "run" / "work" / "resumed.jsonl").read_text() == "4\n" and outputs.num_steps == 6
    again = load_file(tmp_path / "run" / "out" / "model" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("num_gpus", "num_processes", "message"), [
    (1, 1, None), (4, 4, None), (4, 2, None),
    (2, 4, "num_processes is 4 and there are 2 GPUs; set it to at most 2"),
    (4, 1, None),  # it uses the first
])  # fmt: skip
def test_every_process_has_a_gpu(num_gpus: int, num_processes: int, message: str | None) -> None:
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        _check_num_gpus(num_gpus, num_processes)


def test_ranks_on_mixed_cards_are_refused() -> None:
    _check_same_gpus([])
    _check_same_gpus(["NVIDIA H100"] * 3)
    said = r"num_processes is 2, and their GPUs are not alike \(0: NVIDIA H100, 1: NVIDIA L4\); set CUDA"
    with pytest.raises(ValueError, match=said):
        _check_same_gpus(["NVIDIA H100", "NVIDIA L4"])


def test_a_gpu_that_is_not_there_is_no_reason_to_train_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("smoltulu.tasks.trainer.prepare.NVIDIA_GPUS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ValueError, match=r"was given the GPU 7 .* torch finds none there"):
        prepare_torch(context(tmp_path, device="auto"))
    prepare_torch(context(tmp_path, device="cpu"))
    monkeypatch.setattr("smoltulu.tasks.trainer.prepare.NVIDIA_GPUS", tmp_path / "none")  # a machine without a card
    prepare_torch(context(tmp_path, device="auto"))


def test_a_stage_of_one_process_asks_for_one_gpu_whatever_trainings_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preflight's dry run of a recipe for eight GPUs sees one of them."""
    monkeypatch.setattr("smoltulu.tasks.trainer.prepare.device_of", lambda compute: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    eight = context(tmp_path, num_processes=8)
    prepare_torch(eight)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="num_processes is 8 and there are 1 GPUs"):
        prepare_torch(eight)


@pytest.mark.parametrize(("visible", "num_ranks", "device", "expected"), [
    (None, 1, "auto", "0"), ("2,3", 1, "cuda", "2"), ("", 1, "auto", ""), ("MIG-a,MIG-b", 1, "auto", "MIG-a"),
    ("2,3", 2, "auto", "2,3"), (None, 2, "auto", None), (None, 1, "cpu", None), ("3,2,1,0", 2, "auto", "3,2"),
    ("2,3", 3, "auto", "2,3"),
])  # fmt: skip
def test_a_stage_sees_as_many_gpus_as_it_has_ranks(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, num_ranks: int, device: str, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = _child_environment(ComputeSettings(device=device), num_ranks)
    assert made.get("CUDA_VISIBLE_DEVICES") == expected
    if expected == "2":  # a stage that runs beside it takes the next
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            monkeypatch.setattr(smoltulu.tasks.engine.launch, "_running", {process: "2"})
            assert _child_environment(ComputeSettings(), 1)["CUDA_VISIBLE_DEVICES"] == "3"
            # A training of two of four GPUs, and an evaluation beside it.
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
            monkeypatch.setattr(smoltulu.tasks.engine.launch, "_running", {process: "0,1"})
            assert _child_environment(ComputeSettings(), 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
            assert _child_environment(ComputeSettings(), 1)["CUDA_VISIBLE_DEVICES"] == "2"
            assert _child_environment(ComputeSettings(), 2, 3)["CUDA_VISIBLE_DEVICES"] == "0,2,3"


@pytest.mark.parametrize(("device", "stage", "num_processes", "expected"), [
    (None, "rlvr", 2, 2), ("cpu", "rlvr", 2, 2), ("cuda", "rlvr", 1, 1), ("cuda:1", "rlvr", 1, 2),
    ("cuda:3", "rlvr", 2, 4), ("cuda:1", "preflight", 8, 2), ("cuda:1", "sft", 1, 1), ("cuda:1", "dataset", 8, 0),
])  # fmt: skip
def test_rlvr_sees_the_gpu_of_its_copy_too(device: str | None, stage: str, num_processes: int, expected: int) -> None:
    compute = ComputeSettings(generation_device=device, num_processes=num_processes)
    assert stages.STAGES[stage].num_devices(compute) == expected


def test_a_trainer_uses_one_of_the_gpus_that_it_sees() -> None:
    several: Any = SimpleNamespace(n_gpu=4)
    assert on_one_gpu(several)._n_gpu == 1
    none: Any = SimpleNamespace(n_gpu=0)
    assert on_one_gpu(none)._n_gpu == 0


def test_rollouts_are_generated_as_before_with_half_the_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoltulu.tasks.trainer.loop.use_bfloat16", lambda precision, compute: True)
    dtypes: list[set[torch.dtype]] = []
    real = DynamicLayer.update

    def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
        made = real(layer, *args, **kwargs)
        dtypes[-1] |= {cached.dtype for cached in made}
        return made

    monkeypatch.setattr(DynamicLayer, "update", update)
    models = []
    for name in ("ours", "as TRL does it"):
        dtypes.append(set())
        models.append(run("rlvr", world, tmp_path / name)[2])
        monkeypatch.setattr("smoltulu.tasks.generation.engines.caches_as_attended", contextlib.nullcontext)
    assert dtypes == [{torch.bfloat16}, {torch.float32}] and DynamicLayer.update is update
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_micro_batching_changes_nothing(stage: str, world: Path, tmp_path: Path) -> None:
    """8x1 = 4x2 = 1x8, to float32 tolerance and without bias."""
    base = load_file(world / "model" / "model.safetensors")
    _, _, whole = run(stage, world, tmp_path / "8", per_device_train_batch_size=8)
    for size in (4, 1):
        _, _, cut = run(stage, world, tmp_path / str(size), per_device_train_batch_size=size)
        moved, residuals = [], []
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=0, atol=2e-4)
            residuals.append((cut[name] - value).flatten())
            if name in base:
                moved.append((value - base[name]).abs().max())
        assert max(moved) > 1e-3, "the stage did not train"
        residual = torch.cat(residuals)
        assert residual.mean().abs() < 5e-6


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_all_tokens_are_counted_whenever_they_are_logged(stage: str, world: Path, tmp_path: Path) -> None:
    """Of six steps the fourth is logged last; an artifact said its tokens."""
    each, _, _ = run(stage, world, tmp_path / "each", logging_steps=1)
    some, _, _ = run(stage, world, tmp_path / "some", logging_steps=4)
    assert some.num_tokens == each.num_tokens > 0


def test_every_parameter_of_sft_moves(world: Path, tmp_path: Path) -> None:
    base = load_file(world / "model" / "model.safetensors")
    outputs, metrics, trained = run("sft", world, tmp_path)
    assert [name for name in base if torch.equal(base[name], trained[name])] == []
    assert outputs.num_steps == 6
    assert metrics["loss"] < 6.0 and outputs.num_tokens > 0
    assert any((tmp_path / "out" / "logs" / "tensorboard").iterdir())


def test_reward_model_learns_pairs_and_keeps_its_own_pad_token(world: Path, tmp_path: Path) -> None:
    _, metrics, weights = run("reward_model", world, tmp_path)
    assert metrics["accuracy"] > 0.6 and weights["score.weight"].shape == (1, 32)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"]


def test_every_setting_of_rlvr_reaches_trls_trainer(world: Path, tmp_path: Path) -> None:
    """None at its default; steps per generation are of the optimizer here and micro-batches there."""
    changes: dict[str, Any] = {
        "num_steps": 5, "num_generations": 4, "num_iterations": 2, "max_completion_length": 11, "temperature": 0.7,
        "beta": 0.25, "epsilon": 0.3, "loss_type": "dr_grpo", "scale_rewards": "batch", "weight_decay": 0.125,
        "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "learning_rate": 0.02,
        "lr_scheduler_type": "cosine", "seed": 9,
    }  # fmt: skip
    settings = STAGES["rlvr"][1].model_copy(update=changes | {"effective_batch_size": 8, "steps_per_generation": 3})
    args = build_rlvr(settings, inputs_of("rlvr", world, tmp_path), context(tmp_path, save_steps=7)).args
    assert {name: getattr(args, "max_steps" if name == "num_steps" else name) for name in changes} == changes
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)
    assert (args.steps_per_generation, args.generation_batch_size) == (6, 24)
    assert args.save_steps == 12  # at the border of a generation's six steps


def test_VerifiableReward_sees_eos_in_the_tokens() -> None:
    settings = STAGES["rlvr"][1].model_copy(update={"reward_correct": 10.0, "non_stop_reward": -10.0})
    rewards = VerifiableReward(settings, eos_token_id=0)(
        completions=[[{"role": "assistant", "content": "#### 4"}]] * 3,
        completion_ids=[[5, 0], [5, 6], [5, 0]],
        verifier=["gsm8k"] * 3,
        ground_truth=["4", "4", "5"],
    )
    assert rewards == [10.0, -10.0, 0.0]
