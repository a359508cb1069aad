"""A training that is killed at five instants and goes on with other ranks: the curve and rows of an unbroken one.

Each rank is a process, forked from one that has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PhiConfig, PhiForCausalLM, Trainer

from smoltulu.artifacts.checkpoints import fault, newest_checkpoint
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.ranks import fork_ranks
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer import checkpoint, checkpoint_writer
from tests.ranks import noting, rows_of_steps
from tests.small_runs import FUNCTIONS, MODULES, conversations, stage_arguments
from tests.tiny_model import build_tokenizer

#: Thirteen rows, four a step: epochs of four steps, whose last has one row. A checkpoint at every second step.
ROWS = conversations(13)
SETTINGS: dict[str, Any] = {
    "max_steps": 14, "num_train_epochs": 4, "effective_batch_size": 4, "seed": 3, "warmup_ratio": 0.2,
}  # fmt: skip
Kill = Callable[[int], None]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ----------------------------------------------------------------------------------------------------- five instants


def in_a_step(rank: int) -> None:
    """Before the gradients of step 4 are there."""
    real = Trainer.training_step

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            while fault(Path(trainer.args.output_dir) / "checkpoint-2") is not None:
                time.sleep(0.01)  # it is written by a thread
            die()
        return real(trainer, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]


def in_the_write(rank: int) -> None:
    """Half of rank 1's shards of step 6 are on disk, and the training goes on."""
    real = checkpoint.save_file

    def save(tensors: Any, file: Path, *args: Any) -> None:
        real(tensors, file, *args)
        if rank == 1 and "checkpoint-6" in str(file):
            os.truncate(file, file.stat().st_size // 2)
            die()

    checkpoint.save_file = save


def before_the_marker(rank: int) -> None:
    """All shards of step 8 are on disk."""
    real = checkpoint_writer.mark_complete
    checkpoint_writer.mark_complete = lambda folder, *args: (
        die() if folder.name == "checkpoint-8" else real(folder, *args)
    )


def in_the_copy(rank: int) -> None:
    """Of step 10 half of the tensors are copied."""
    real, number = checkpoint_writer.HostCopy.of, [0]

    def of(self: Any, pieces: Any) -> Any:
        number[0] += 1
        return die() if real(self, pieces[: len(pieces) // 2]) and number[0] == 2 else real(self, pieces)

    checkpoint_writer.HostCopy.of = of  # type: ignore[method-assign]


def after_the_marker(rank: int) -> None:
    """Step 12 is whole; older ones are still there."""
    checkpoint_writer.prune = lambda folder, _: die() if (folder / "checkpoint-12").exists() else None


def never(rank: int) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Training:
    """A training that can be run again and again in one folder."""

    folder: Path
    stage: str
    config: Any
    inputs: Any

    @staticmethod
    def of(stage: str, folder: Path, base: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Training:
        return Training(folder, stage, *stage_arguments(stage, folder, base, rows, settings)[:2])

    def in_folder(self, folder: Path) -> Training:
        for name in ("out", "work/checkpoints"):
            (folder / name).mkdir(parents=True)
        return replace(self, folder=folder)

    def run(self, attempt: int, num_ranks: int, kill: Kill = never, **compute: Any) -> None:
        """Must end by SIGKILL, where `kill` is given."""
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([__name__, "trl.trainer.sft_trainer"])
        process = server.Process(target=_train, args=(self, attempt, num_ranks, kill, compute))
        process.start()
        process.join(timeout=300)
        log = "\n".join(file.read_text() for file in self.folder.glob(f"log-{attempt}-*"))
        assert process.exitcode is not None, log
        assert (process.exitcode == 0) == (kill is never), log

    @property
    def history(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "out" / "logs" / "history.jsonl").open()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / "model" / "model.safetensors")

    @property
    def resumed_from(self) -> list[int]:
        return [int(step) for step in (self.folder / "work" / "resumed.jsonl").read_text().split()]

    @property
    def rows(self) -> dict[int, Counter[int]]:
        return rows_of_steps(self.folder)


def _train(training: Training, attempt: int, num_ranks: int, kill: Kill, compute: dict[str, Any]) -> None:
    """In a process of its own: fork the ranks, each of which trains and notes which rows it takes."""
    status = fork_ranks(num_ranks) if num_ranks > 1 else None
    if status is not None:
        os._exit(status)
    rank, folder, module = int(os.environ.get("RANK", "0")), training.folder, MODULES[training.stage]
    log = (folder / f"log-{attempt}-{rank}").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    rows = (folder / f"rows-{attempt}-{rank}.jsonl").open("w", buffering=1)
    kill(rank)
    train = module.train
    module.train = lambda trainer, *args, **kwargs: train(noting(trainer, rows.write), *args, **kwargs)  # type: ignore[attr-defined]
    given = {"device": "cpu", "logging_steps": 1, "num_threads": 1, "save_steps": 2, "num_processes": num_ranks}
    machines = ComputeSettings(**given | {"per_device_train_batch_size": 4 // num_ranks} | compute)
    context = StageContext(folder / "out", folder / "work", machines, lambda *args, **kwargs: None)
    try:
        FUNCTIONS[training.stage](training.config, training.inputs, context)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Phi: it drops hidden states, which Llama does not."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), build_tokenizer()
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, resid_pdrop=0.2, embd_pdrop=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    PhiForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
def test_killed_at_five_instants_on_1_2_4_and_1_ranks_it_is_the_unbroken_training(base: Path, tmp_path: Path) -> None:
    """DDP, FSDP2 and DDP again; with dropout, whose masks follow the rows."""
    whole = Training.of("sft", tmp_path / "whole", base, ROWS, SETTINGS)
    whole.run(0, 1)
    broken = whole.in_folder(tmp_path / "killed")
    #: Ranks, parallelism, what kills, and the step of the checkpoint that is left.
    chain: list[tuple[int, str, Kill, int]] = [
        (1, "ddp", in_a_step, 2),
        (2, "ddp", in_the_write, 4),
        (4, "fsdp2", before_the_marker, 6),
        (2, "fsdp2", in_the_copy, 8),
        (1, "ddp", after_the_marker, 12),
    ]
    for attempt, (num_ranks, parallel, kill, left) in enumerate(chain):
        broken.run(attempt, num_ranks, kill, parallel=parallel)
        newest = newest_checkpoint(broken.folder / "work" / "checkpoints", full=True)
        assert newest is not None and newest[0] == left, (kill, newest)
    broken.run(len(chain), 1)
    assert broken.resumed_from == [2, 4, 6, 8, 12]
    same_training(whole, broken)
    rows = broken.rows
    for first in (1, 5, 9):
        assert sum((rows[step] for step in range(first, first + 4)), Counter()) == Counter(range(13))


def same_training(one: Training, other: Training) -> None:
    assert [row["step"] for row in other.history] == [row["step"] for row in one.history] == list(range(1, 15))
    for of_one, of_other in zip(one.history, other.history, strict=True):
        assert of_other["loss"] == pytest.approx(of_one["loss"], abs=1e-5)
        assert of_other["learning_rate"] == of_one["learning_rate"] and of_other["num_tokens"] == of_one["num_tokens"]
    assert other.rows == one.rows
    weights = other.weights
    for name, value in one.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)
