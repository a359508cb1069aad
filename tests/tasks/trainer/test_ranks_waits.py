"""No optimizer step waits for its device, but where something is logged, evaluated or saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.tasks.trainer import guards
from smoltulu.tasks.trainer.loop import train
from smoltulu.tasks.trainer.stragglers import slow_ranks
from smoltulu.tasks.trainer.waits import HostCopy, of_all_ranks, places_of, put, sums_over_ranks
from smoltulu.tasks.training.ppo import build as build_ppo
from tests.small_ppo import SETTINGS, context, world
from tests.small_runs import MODULES, conversations, pairs, stage_arguments
from tests.tiny_model import build_tiny_model
from tests.waits import Waits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def test_the_ruler_sees_what_waits() -> None:
    """Each of these stops a process that feeds a GPU; the last three do not."""
    waits, values = Waits(), torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    mask, device = values > 0, torch.device("cpu")
    operations: dict[str, Any] = {
        "item": lambda: values.sum().item(),
        "bool": lambda: bool(values.sum() > 0),
        "tolist": lambda: values.tolist(),
        "numpy": lambda: values.detach().numpy(),
        "cpu": lambda: values.cpu(),
        "float": lambda: float(values.sum()),
        "nonzero": lambda: mask.nonzero(),
        "mask": lambda: values[mask],
        "backward": lambda: values[mask].sum().backward(),
        "tensor": lambda: torch.tensor([1, 2], device=device),
        "new_tensor": lambda: values.new_tensor(3.0),
        "index": lambda: values[torch.tensor([0, 2])],
        "index_select": lambda: values.index_select(0, torch.tensor([0, 2])).sum().backward(),
        "full": lambda: torch.full((), 3.0, device=device),
    }
    with waits.watching():
        for name, operation in operations.items():
            with waits.counted(name):
                operation()
    assert list(waits.seen) == list(operations)[:-3]


class _ByStep(TrainerCallback):
    """Has what waits noted by the step in which it does; what is logged or saved after it is noted apart."""

    def __init__(self, trainer: Any, waits: Waits) -> None:
        self.trainer, self.waits = trainer, waits
        after_step = trainer._maybe_log_save_evaluate

        def log_save_evaluate(*args: Any, **kwargs: Any) -> None:
            self.waits.where = f"after {trainer.state.global_step}"
            after_step(*args, **kwargs)
            self.waits.where = str(trainer.state.global_step + 1)

        trainer._maybe_log_save_evaluate = log_save_evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.where = "1"


def watched(
    trainer: Any, run_context: Any, monkeypatch: pytest.MonkeyPatch, waits: Waits | None = None, cycle: int = 1
) -> dict[str, list[str]]:
    """Train as the stages do; the guard reads what it reads of a GPU when it would of one. Step -> what waits in it."""
    monkeypatch.setattr(guards, "is_on_host", lambda tensor: False)
    waits = waits or Waits()
    trainer.add_callback(_ByStep(trainer, waits))
    with waits.watching():
        train(trainer, run_context, None, cycle=cycle)
    return waits.seen


@pytest.mark.parametrize(
    ("stage", "compute"),
    [
        ("sft", {"packing": True}),
        ("sft", {"packing": False}),
        ("sft", {"tokens_per_device": 150}),
        ("reward_model", {"packing": True}),
        ("reward_model", {"packing": False, "tokens_per_device": 300}),
        ("dpo", {"packing": True}),
        ("dpo", {"packing": False}),
        ("dpo", {"tokens_per_device": 300}),
    ],
)
def test_no_step_waits_but_the_one_that_is_logged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, compute: dict[str, Any]
) -> None:
    rows = conversations(8) if stage == "sft" else pairs(9)[1:]
    settings = {"effective_batch_size": 4, "num_train_epochs": 3}
    config, inputs, run_context = stage_arguments(
        stage, tmp_path, base, rows, settings, logging_steps=3, save_steps=100, report_to=(), **compute
    )
    trainer = MODULES[stage].build(config, inputs, run_context)
    seen = watched(trainer, run_context, monkeypatch)
    quiet = {step: seen.get(step, []) for step in ("1", "2", "4", "5", "after 1", "after 4")}
    assert quiet == {step: [] for step in quiet}
    # What is logged is read at once, not once a micro-batch: loss, norm, and the stage's own sums.
    assert 0 < len(seen["after 3"]) <= 4, seen["after 3"]
    assert trainer.state.global_step == 6


def test_no_step_of_ppo_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the update: rollouts are text, which is on the host."""
    inputs = world(tmp_path / "world")
    compute = {"logging_steps": 4, "save_steps": 100, "per_device_train_batch_size": 2, "report_to": ()}
    config = PPOSettings.model_validate(SETTINGS | {"num_episodes": 16, "critic": {"warmup_steps": 1}})
    run_context = context(tmp_path / "run", **compute)
    trainer, waits = build_ppo(config, inputs, run_context), Waits()
    rolled_out = trainer._roll_out

    def roll_out(batch: int) -> Any:
        with waits.counted(None):
            return rolled_out(batch)

    monkeypatch.setattr(trainer, "_roll_out", roll_out)
    seen = watched(trainer, run_context, monkeypatch, waits=waits, cycle=config.num_steps_per_rollout)
    quiet = {step: seen.get(step, []) for step in ("1", "2", "3", "5", "6", "7", "after 1", "after 5")}
    assert quiet == {step: [] for step in quiet}
    assert seen["after 4"] and trainer.state.global_step == 8


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_no_step_waits_on_this_gpu(base: Path, tmp_path: Path, stage: str) -> None:
    """torch itself looks for it, in every step that is neither the first nor logged."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    rows = conversations(8) if stage == "sft" else pairs(9)[1:]
    compute = {"device": "cuda", "logging_steps": 3, "save_steps": 100, "report_to": ()}
    settings = {"effective_batch_size": 4, "num_train_epochs": 3}
    config, inputs, run_context = stage_arguments(stage, tmp_path, base, rows, settings, **compute)
    trainer = MODULES[stage].build(config, inputs, run_context)
    after_step = trainer._maybe_log_save_evaluate

    def log_save_evaluate(*args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        after_step(*args, **kwargs)
        if trainer.state.global_step in (1, 3, 4):  # before steps 2, 4 and 5
            torch.cuda.set_sync_debug_mode("error")

    trainer._maybe_log_save_evaluate = log_save_evaluate
    trainer.add_callback(_NoSync())
    try:
        train(trainer, run_context, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _NoSync(TrainerCallback):
    """What is read at the end of a step that is logged is allowed."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.logging_steps == 0:
            torch.cuda.set_sync_debug_mode("default")


def test_trls_own_loss_waits_five_times_a_micro_batch(base: Path, tmp_path: Path) -> None:
    """Why it is replaced; where a version of TRL no longer does, ours may go."""
    config, inputs, run_context = stage_arguments("sft", tmp_path, base, conversations(4), {}, packing=False)
    trainer = MODULES["sft"].build(config, inputs, run_context)
    trainer.model.train()
    batch = {name: value for name, value in trainer.data_collator(list(trainer.train_dataset)).items()}
    theirs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    waits = Waits()
    with waits.watching():
        with waits.counted("TRL"):
            expected = SFTTrainer.compute_loss(trainer, trainer.model, theirs, num_items_in_batch=torch.tensor(20))
        with waits.counted("ours"):
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=20)
    of_loss = [where for where in waits.seen["TRL"] if "compute_loss" in where]
    assert len(of_loss) == 5 and "ours" not in waits.seen
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ by hand


def test_places_are_those_of_labels_row_after_row() -> None:
    labels = torch.tensor([[-100, 5, -100], [7, -100, 9]])
    assert places_of(labels).tolist() == [1, 3, 5]
    assert places_of(torch.full((2, 2), -100)).shape == (0,)


def test_numbers_of_one_process_are_its_own() -> None:
    alone: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), args=SimpleNamespace(world_size=1))
    assert of_all_ranks(alone, [1.5, 2]) == [[1.5, 2]] and sums_over_ranks(alone, [3, 4]) == [3, 4]
    assert HostCopy(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert put([1, 2], "cpu", torch.float32).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.0, 1.6, 1.0], [2]),
        ([1.0, 1.6], [1]),
        ([1.6, 1.0], [0]),
        ([1.0, 1.49], []),
        ([0.001, 0.010], []),  # ten times, and nothing
        ([1.0, 2.0, 2.0, 1.0, 1.0], [1, 2]),
        ([1.0, 3.0, 3.0], []),  # most are slow: they are the measure
    ],
)
def test_a_rank_is_slow_against_the_median_of_the_others(seconds: list[float], slow: list[int]) -> None:
    assert slow_ranks(seconds) == slow
