"""Rows that do not divide among processes: blanks in place of accelerate's repeated rows, and what they weigh."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader

from smoltulu.tasks.trainer.even_rows import (
    BlankCollator,
    EvenRows,
    EvenSampler,
    blank_row,
    even_out,
    is_blank,
    num_blanks,
)
from smoltulu.tasks.trainer.guards import LossRule, guard
from tests.small_runs import conversations, pairs, run, trainer_of, two_processes
from tests.tiny_model import build_tiny_model, build_tokenizer

STAGE_NAMES = ("sft", "reward_model", "dpo")
#: What a log holds besides results.
MEASURED = {"tokens_per_second", "peak_memory_gb"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def rows_of_stage(stage: str, count: int) -> list[dict[str, Any]]:
    # The first pair has the same answer twice.
    return conversations(count) if stage == "sft" else pairs(count + 1)[1:]


# ------------------------------------------------------------------------------------------------------ who gets what


def shards(sampler: Any, batch_size: int, num_processes: int = 2) -> list[list[list[int]]]:
    """The batches of each process, as accelerate deals them."""
    return [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), num_processes, process))
        for process in range(num_processes)
    ]


def test_five_rows_and_two_processes_by_hand() -> None:
    order: Any = [3, 1, 4, 0, 2]
    assert shards(EvenSampler(order, 5, 1), 1) == [[[3], [4], [2]], [[1], [0], [5]]]
    assert shards(EvenSampler(order, 5, 3), 2) == [[[3, 1], [2, 5]], [[4, 0], [6, 7]]]
    # What it is there for: accelerate alone begins the epoch again.
    assert shards(order, 1) == [[[3], [4], [2]], [[1], [0], [3]]]
    assert shards(order, 2) == [[[3, 1], [2, 3]], [[4, 0], [1, 4]]]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_every_epoch_has_the_order_of_one_process_and_each_row_once(batch_size: int, num_processes: int) -> None:
    blanks = -5 % (batch_size * num_processes)
    alone = SeedableRandomSampler(range(5), data_seed=11)
    even = EvenSampler(SeedableRandomSampler(range(5), data_seed=11), 5, blanks)
    orders = []
    for epoch in (0, 1, 2, 1):
        alone.set_epoch(epoch)
        even.set_epoch(epoch)
        orders.append(list(alone))
        assert list(even) == [*orders[-1], *range(5, 5 + blanks)]
        of_processes = shards(EvenSampler(orders[-1], 5, blanks), batch_size, num_processes)  # type: ignore[arg-type]
        assert len({len(batches) for batches in of_processes}) == 1
        # Round after round, process by process: the order again.
        dealt = [index for batches in zip(*of_processes, strict=True) for batch in batches for index in batch]
        assert dealt == [*orders[-1], *range(5, 5 + blanks)]
    assert orders[1] == orders[3] != orders[0]


def test_batches_lose_their_blanks_and_one_of_blanks_only_is_blank() -> None:
    rows = EvenRows(Dataset.from_dict({"input_ids": [[index, 8, 9] for index in range(5)]}), 3)
    collate = BlankCollator(lambda rows: {"rows": [row["input_ids"][0] for row in rows]}, {"input_ids": [0, 8]})
    loader = DataLoader(rows, sampler=EvenSampler([3, 1, 4, 0, 2], 5, 3), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    assert list(loader) == [{"rows": [3, 1]}, {"rows": [4, 0]}, {"rows": [2]}, {"rows": [0], "is_blank": True}]
    assert len(rows) == 8


def trainer_like(num_rows: int, batch_size: int, num_processes: int) -> Any:
    return SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=num_processes),
        args=SimpleNamespace(train_batch_size=batch_size),
        train_dataset=Dataset.from_dict({"row": range(num_rows)}),
        data_collator=len,
    )


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_processes", "expected"),
    [(5, 1, 2, 1), (5, 2, 2, 3), (7, 2, 2, 1), (8, 2, 2, 0), (5, 2, 1, 0), (1, 4, 8, 31)],
)
def test_number_of_blanks_and_nothing_is_touched_without_them(
    num_rows: int, batch_size: int, num_processes: int, expected: int
) -> None:
    trainer = trainer_like(num_rows, batch_size, num_processes)
    assert num_blanks(trainer) == expected
    before = dict(vars(trainer))
    even_out(trainer)
    assert (vars(trainer) == before) == (expected == 0)


def test_a_blank_is_short_and_unsupervised() -> None:
    assert blank_row({"row": 4, "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}) == {
        "row": 4, "input_ids": [1, 2], "labels": [-100, -100],
    }  # fmt: skip
    assert blank_row({"input_ids": [1], "labels": [1]}) == {"input_ids": [1], "labels": [-100]}
    assert blank_row({"prompt_ids": [1, 2, 3], "reference_chosen": 0.5}) == {
        "prompt_ids": [1, 2], "reference_chosen": 0.5,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what it weighs


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_blank_batch_has_a_gradient_of_zeros_and_counts_nothing(
    base: Path, tmp_path: Path, stage: str, packing: bool
) -> None:
    """Zeros for every parameter, not None: the other processes would wait for a gradient that never comes."""
    trainer = trainer_of(stage, tmp_path, base, rows_of_stage(stage, 4), {}, packing=packing)
    trainer.model.train()
    batch = BlankCollator(trainer.data_collator, blank_row(trainer.train_dataset[0]))([])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(3))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name  # NaN would be "any", too
    assert trainer.get_batch_samples(iter([batch]), 1, "cpu")[1] == 0
    assert trainer._total_train_tokens == 0
    if stage == "reward_model":
        # The sums of another process: one pair, right, with scores of 0.5 and 0.25.
        other = torch.tensor([[1, 1, 0.25, 0.75, -0.25, 0.5]], dtype=torch.float64)
        with mock.patch.object(trainer.accelerator, "gather", lambda own: torch.cat([own, other])):
            trainer.log({})
        metrics = {"min_reward": 0.25, "mean_reward": 0.375, "max_reward": 0.5, "accuracy": 1.0, "margin": 0.25}
        assert trainer.state.log_history[0].items() >= metrics.items()


def test_guards_neither_ring_for_blanks_nor_name_them() -> None:
    dataset = Dataset.from_dict({"row": [7, 8], "input_ids": [[5, 6, 7], [8, 9]]})
    real = {"input_ids": torch.tensor([[8, 9]]), "attention_mask": torch.ones(1, 2), "row": torch.tensor([8])}
    blank = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2), "row": torch.tensor([7])}
    blank["is_blank"] = True
    assert is_blank(blank) and not is_blank(real) and not is_blank([{"prompt": "GRPO"}])

    def step(batches: list[Any], losses: list[float], other_process: list[float], norm: float = 1.0) -> None:
        trainer = SimpleNamespace(
            training_step=lambda model, inputs: torch.tensor(losses[len(seen)]),
            _get_grad_norm=lambda: torch.tensor(norm),
            accelerator=SimpleNamespace(gather=lambda own: torch.cat([own, torch.tensor([other_process])])),
            train_dataset=dataset,
            processing_class=build_tokenizer(),
        )
        seen: list[Any] = []
        rings = guard(trainer, LossRule(), lambda _: 0)  # type: ignore[arg-type]
        for batch in batches:
            trainer.training_step(None, batch)
            seen.append(batch)
        trainer._get_grad_norm()
        rings.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None)

    other = [0.7, 1.0, 1.0]
    step([blank], [0.0], other)
    step([real, blank], [0.7, 0.0], other)
    step([real], [0.7], [0.0, 1.0, 0.0])
    for batches, losses, norm in (([real, blank], [0.0, 0.0], 1.0), ([real, blank], [0.7, 0.0], float("nan"))):
        with pytest.raises(ValueError, match="Its rows: row 8 ") as caught:
            step(batches, losses, other, norm)
        assert "row 7" not in str(caught.value)
    with pytest.raises(ValueError, match="loss is exactly 0"):
        step([blank], [0.0], [0.0, 1.0, 1.0])


# ------------------------------------------------------------------------------------------------------- the real thing


#: Rows of two epochs, rows of a micro-batch, packed. With steps of 4 rows, an epoch's last step is
#:   5, 1    a row in one process, nothing in the other
#:   7, 1    two rows and one, and the other's second micro-batch is blank
#:   7, 2    two rows and one in micro-batches of two
#:   5, 2    one row, and nothing
CASES = [(5, 1, True), (7, 1, False), (7, 2, True), (5, 2, False)]


@pytest.mark.parametrize(
    ("stage", "num_rows", "batch_size", "packing"),
    [
        pytest.param(stage, *case, marks=[] if (stage, case) == ("dpo", CASES[0]) else pytest.mark.slow)
        for stage in STAGE_NAMES
        for case in CASES
    ],
)
def test_two_processes_train_as_one_where_rows_do_not_divide(
    base: Path, tmp_path: Path, stage: str, num_rows: int, batch_size: int, packing: bool
) -> None:
    rows = rows_of_stage(stage, num_rows)
    settings = {"effective_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3}
    # As many micro-batches: some of TRL's metrics are means over them.
    one = run(
        stage, tmp_path / "one", base, rows, settings, packing=packing, per_device_train_batch_size=2 * batch_size
    )
    two = two_processes(stage, tmp_path, base, rows, settings, packing=packing, per_device_train_batch_size=batch_size)(
        "two"
    )
    logged = [json.loads(line) for line in (two / "output" / "logs" / "history.jsonl").open()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for expected, found in zip(one.history, logged, strict=True):
        names = set(expected) - MEASURED
        assert names >= {"loss", "grad_norm", "num_tokens"} and names <= set(found)
        for name in names:
            # Rewards are differences of sums over many tokens, whose rounding depends on the padding beside them.
            is_sum = name.startswith(("rewards/", "logps/"))
            expected_value = pytest.approx(expected[name], rel=1e-5, abs=5e-5 if is_sum else 1e-6)
            assert found[name] == expected_value, name
        assert found["num_tokens"] == expected["num_tokens"]
    before = load_file(base / "model.safetensors")
    weights = load_file(two / "output" / "model" / "model.safetensors")
    assert max((value - before[name]).abs().max() for name, value in weights.items() if name in before) > 1e-4
    for name, value in load_file(one.model / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_resume_in_the_second_epoch_goes_on_to_the_same_bytes(base: Path, tmp_path: Path, stage: str) -> None:
    """Step 3 of 4 is the first of the second epoch, whose order the loader must be told again."""
    settings = {"effective_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3}
    made = two_processes(stage, tmp_path, base, rows_of_stage(stage, 7), settings, per_device_train_batch_size=1)
    unbroken = made("unbroken")
    shutil.copytree(unbroken / "checkpoints", tmp_path / "resumed" / "work" / "checkpoints")
    shutil.rmtree(tmp_path / "resumed" / "work" / "checkpoints" / "checkpoint-4")
    resumed = made("resumed")
    assert (resumed / "resumed.jsonl").read_text() == "3\n"
    model = Path("output") / "model" / "model.safetensors"
    assert (unbroken / model).read_bytes() == (resumed / model).read_bytes()
    last = [
        json.loads((work / "output/logs/history.jsonl").read_text().splitlines()[-1]) for work in (unbroken, resumed)
    ]
    assert last[0]["num_tokens"] == last[1]["num_tokens"] and last[0]["loss"] == last[1]["loss"]
