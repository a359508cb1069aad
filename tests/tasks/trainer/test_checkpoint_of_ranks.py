"""A checkpoint by hand: who writes what, what a resume reads, what the training waits for, and what ends it."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER, fault, mark_complete, newest_checkpoint
from smoltulu.artifacts.files import remove_tree
from smoltulu.tasks.stage import StageStopped
from smoltulu.tasks.trainer import checkpoint, checkpoint_writer
from smoltulu.tasks.trainer.best_weights import BestWeights
from smoltulu.tasks.trainer.checkpoint import (
    STATE_FILE,
    Piece,
    SavedState,
    Trained,
    load_into,
    own_pieces,
    owners,
    shard_name,
    tensors_and_numbers,
    write_pieces,
)
from tests.small_runs import Run, conversations, run
from tests.tiny_model import build_tiny_model

SETTINGS: dict[str, Any] = {"max_steps": 4, "effective_batch_size": 2, "num_train_epochs": 4, "warmup_ratio": 0.5}


def weights_of(sizes: dict[str, tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.randn(size)) for name, size in sizes.items()}


def trained(weights: dict[str, torch.nn.Parameter], num_steps: int, rate: float = 0.5) -> Trained:
    """After so many steps, the last of which leaves out the last weight."""
    optimizer = AdamW(list(weights.values()), lr=rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(num_steps):
        for name, weight in weights.items():
            weight.grad = None if step == num_steps - 1 and name == list(weights)[-1] else torch.randn(weight.shape)
        optimizer.step()
        schedule.step()
    return Trained(dict(weights), optimizer, schedule)


def written(folder: Path, one: Trained, shards: list[list[Piece]]) -> None:
    (folder / "shards").mkdir(parents=True)
    for rank, pieces in enumerate(shards):
        write_pieces(pieces, folder / shard_name(rank, len(shards)))
    _, numbers = tensors_and_numbers({"model": one})
    state = SavedState(num_ranks=len(shards), numbers=numbers, schedules={"model": one.schedule.state_dict()})
    (folder / STATE_FILE).write_text(json.dumps(state.model_dump()))


def same(one: Trained, other: Trained) -> None:
    for (name, weight), loaded in zip(one.weights.items(), other.weights.values(), strict=True):
        assert torch.equal(weight, loaded), name
        state, of_loaded = one.optimizer.state.get(weight, {}), other.optimizer.state.get(loaded, {})
        assert state.keys() == of_loaded.keys() and all(torch.equal(state[key], of_loaded[key]) for key in state)
    assert [group["lr"] for group in one.optimizer.param_groups] == [
        group["lr"] for group in other.optimizer.param_groups
    ]
    assert one.schedule.state_dict() == other.schedule.state_dict()


# ------------------------------------------------------------------------------------------------------ who writes what


def test_ranks_share_whole_tensors_by_size() -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 0}
    assert owners(sizes, 1) == dict.fromkeys(sizes, 0)
    assert owners(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert owners({"a": 1}, 3) == {"a": 0}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 3))
def test_what_some_ranks_wrote_one_reads(lengths: list[int], num_ranks: int, num_steps: int) -> None:
    import tempfile

    sizes = {f"layer.{number}.weight": (length, 2) for number, length in enumerate(lengths)}
    one = trained(weights_of(sizes), num_steps)
    tensors, numbers = tensors_and_numbers({"model": one})
    assert len(numbers) == (len(lengths) - (num_steps == 1) if num_steps else 0)
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "c", one, [own_pieces(tensors, rank, num_ranks) for rank in range(num_ranks)])
        other = trained(weights_of(sizes), 1)
        other.optimizer.state.clear()
        load_into({"model": other}, Path(folder) / "c")
    same(one, other)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 4))
def test_shards_of_ranks_lie_together_again(length: int, num_ranks: int) -> None:
    """As FSDP2 divides: rows, in order, the last ranks with fewer or none."""
    import tempfile

    one = trained(weights_of({"w": (length, 3), "b": (length,)}), 2)
    tensors, _ = tensors_and_numbers({"model": one})
    shards: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for name, value in tensors.items():
        start = 0
        for rank, part in enumerate(value.chunk(num_ranks)):
            shards[rank].append(Piece(name, (start, *(0,) * (value.dim() - 1)), part))
            start += len(part)
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "c", one, shards)
        other = trained(weights_of({"w": (length, 3), "b": (length,)}), 0)
        load_into({"model": other}, Path(folder) / "c")
    same(one, other)


def test_a_checkpoint_of_another_model_or_version_is_refused(tmp_path: Path) -> None:
    one = trained(weights_of({"a": (2, 2), "b": (3,)}), 1)
    written(tmp_path / "c", one, [own_pieces(tensors_and_numbers({"model": one})[0], 0, 1)])
    for sizes in ({"a": (2, 2)}, {"a": (2, 3), "b": (3,)}, {"a": (2, 2), "b": (3,), "c": (1,)}):
        with pytest.raises(ValueError, match=r"holds other tensors than this training moves .* Remove the folder"):
            load_into({"model": trained(weights_of(sizes), 0)}, tmp_path / "c")
    state = json.loads((tmp_path / "c" / STATE_FILE).read_text())
    (tmp_path / "c" / STATE_FILE).write_text(json.dumps(state | {"version": 2}))
    with pytest.raises(
        ValueError, match=r"cannot be read by this version of smoltulu .*go on with the one that wrote it"
    ):
        load_into({"model": one}, tmp_path / "c")


# ----------------------------------------------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("sft", tmp_path_factory.mktemp("unbroken"), base, conversations(4), SETTINGS)


def resumed(base: Path, folder: Path, **compute: Any) -> Run:
    return run("sft", folder, base, conversations(4), SETTINGS, **compute)


def same_run(one: Run, other: Run) -> None:
    for name in ("loss", "grad_norm", "learning_rate", "num_tokens", "step"):
        assert [row[name] for row in other.history] == [row[name] for row in one.history], name
    of_one, of_other = (load_file(each.model / "model.safetensors") for each in (one, other))
    assert [name for name in of_one if not torch.equal(of_one[name], of_other[name])] == []


def test_steps_go_on_while_ranks_write_and_nothing_half_counts(
    base: Path, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 1 ends when step 2 is computed; a checkpoint that is being written is passed over."""
    step_2, seen = threading.Event(), []
    write, loss = checkpoint_writer.write_pieces, Trainer.training_step

    def write_pieces(pieces: Any, file: Path) -> Any:
        if "checkpoint-1" in str(file):
            seen.append(newest_checkpoint(tmp_path / "work" / "checkpoints"))
            assert step_2.wait(60)
        return write(pieces, file)

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            seen.append(fault(tmp_path / "work" / "checkpoints" / "checkpoint-1"))
            step_2.set()
        return loss(trainer, *args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", write_pieces)
    monkeypatch.setattr(Trainer, "training_step", training_step)
    same_run(unbroken, resumed(base, tmp_path))
    assert len(seen) == 2 and None in seen and "it was not written to its end" in seen


def fails_at(step: int, error: Exception) -> Callable[..., Any]:
    real = checkpoint.save_file

    def save(tensors: Any, file: Path, *args: Any) -> None:
        real(tensors, file, *args)
        if f"checkpoint-{step}" in str(file):
            os.truncate(file, 100)
            raise error

    return save


@pytest.mark.parametrize("step", [2, 4])
def test_a_writer_of_ranks_that_fails_ends_the_training_with_its_error(
    base: Path, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A full disk, also at the last step; what was half written is gone, the checkpoint before is whole."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fails_at(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(OSError, match="No space left on device"):
            resumed(base, tmp_path)
    left = sorted(path.name for path in (tmp_path / "work" / "checkpoints").glob("*checkpoint*"))
    assert left == [f"checkpoint-{number}" for number in range(max(1, step - 2), step)]
    same_run(unbroken, resumed(base, tmp_path))
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == f"{step - 1}\n"


def test_a_training_of_ranks_that_fails_leaves_its_last_checkpoint_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 2 is slow, and step 3 fails meanwhile: with its own error."""
    write, loss = checkpoint_writer.write_pieces, Trainer.training_step
    failed = threading.Event()

    def write_pieces(pieces: Any, file: Path) -> Any:
        assert "checkpoint-2" not in str(file) or failed.wait(60)
        return write(pieces, file)

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            failed.set()
            raise ArithmeticError("step 3")
        return loss(trainer, *args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", write_pieces)
    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(ArithmeticError, match="step 3"):
        resumed(base, tmp_path)
    newest = newest_checkpoint(tmp_path / "work" / "checkpoints", full=True)
    assert newest is not None and newest[0] == 2


def test_sigterm_waits_for_what_is_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks or one: the stage has stopped when its checkpoint is whole."""
    real, at_stop = checkpoint.save_file, []

    def save(tensors: Any, file: Path, *args: Any) -> None:
        if "checkpoint-2" in str(file):
            at_stop.append(threading.current_thread().name)
            threading.Event().wait(1.0)
        real(tensors, file, *args)

    loss = Trainer.training_step

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(trainer, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save)
    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(StageStopped, match="stopped as asked at step 2 of 4"):
        resumed(base, tmp_path, save_steps=1000)
    assert at_stop == ["checkpoint"]
    assert newest_checkpoint(tmp_path / "work" / "checkpoints", full=True) is not None


def test_without_memory_for_a_copy_ranks_wait_for_the_write(
    base: Path, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_MEMORY_SHARE", 0)
    with caplog.at_level(logging.WARNING, "smoltulu"):
        same_run(unbroken, resumed(base, tmp_path))
    assert "no memory for a copy of what is trained" in caplog.text
    newest = newest_checkpoint(tmp_path / "work" / "checkpoints", full=True)
    assert newest is not None and newest[0] == 4


def torn(unbroken: Run, folder: Path) -> Path:
    """The work of a training that was killed after step 3."""
    shutil.copytree(unbroken.checkpoints.parent, folder / "work")
    (folder / "work" / "checkpoints" / "checkpoint-4" / CHECKPOINT_MARKER).unlink()
    return folder


def test_what_is_logged_after_a_resume_counts_the_steps_of_other_ranks_before(base: Path, tmp_path: Path) -> None:
    """Logged at steps 3 and 6, gone on with from step 2: the loss of step 3 is the mean of three."""
    given = {"logging_steps": 3, "save_steps": 2, "save_total_limit": 9}
    whole = run("sft", tmp_path / "whole", base, conversations(4), SETTINGS | {"max_steps": 6}, **given)
    folder = tmp_path / "again"
    shutil.copytree(whole.checkpoints.parent, folder / "work")
    for step in (4, 6):
        (folder / "work" / "checkpoints" / f"checkpoint-{step}" / CHECKPOINT_MARKER).unlink()
    again = run("sft", folder, base, conversations(4), SETTINGS | {"max_steps": 6}, **given)
    assert (folder / "work" / "resumed.jsonl").read_text() == "2\n"
    assert [(row["step"], row["loss"]) for row in again.history] == [
        (row["step"], row["loss"]) for row in whole.history
    ]
    assert [row["step"] for row in whole.history] == [3, 6]


def test_a_resume_on_ranks_loads_no_pickle(
    base: Path, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, load)
    same_run(unbroken, resumed(base, torn(unbroken, tmp_path)))
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "3\n"


def test_a_checkpoint_from_before_ranks_is_gone_on_from(
    base: Path, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers writes it, which is what this project had."""

    def attach(writer: Any) -> None:
        writer.write = lambda folder, score: mark_complete(folder, score)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.CheckpointWriter, "attach", attach)
        resumed(base, tmp_path)
    older = tmp_path / "work" / "checkpoints" / "checkpoint-3"
    assert (older / "optimizer.pt").exists() and not (older / "shards").exists()
    (tmp_path / "work" / "checkpoints" / "checkpoint-4" / CHECKPOINT_MARKER).unlink()
    shutil.rmtree(tmp_path / "out")
    same_run(unbroken, resumed(base, tmp_path))
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "3\n"


def test_a_sharded_model_does_not_go_on_from_a_checkpoint_from_before(tmp_path: Path) -> None:
    """Before its weights are read, which torch would refuse in words of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2)
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        trainer: Any = Trainer(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
        checkpoint_writer.CheckpointWriter(trainer, 1).attach()
        with pytest.raises(ValueError, match=r"was written by an earlier version .* set compute.parallel to ddp"):
            trainer._load_from_checkpoint(str(tmp_path))
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_of_a_machine_share_its_memory_with_the_next_step() -> None:
    """A copy of three tenths of what is free fits once, not four times; a peak is reckoned with."""
    one = torch.empty(1, dtype=torch.uint8)
    pieces = [Piece("w", (0,), one.expand(int(0.3 * psutil.virtual_memory().available)))]
    assert checkpoint_writer.HostCopy().has_room(pieces) and not checkpoint_writer.HostCopy().has_room(pieces, 4)
    before = checkpoint_writer.given_back()
    del one, pieces
    large = torch.ones(1 << 28, dtype=torch.uint8)
    del large
    assert before < 1 << 40 and checkpoint_writer.given_back() >= (1 << 28) * 0.9


def test_the_best_weights_are_listed_while_ranks_remove_checkpoints(tmp_path: Path) -> None:
    """By the writer's thread."""
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / f"checkpoint-{number}").mkdir()
            for number in range(20):
                remove_tree(tmp_path / f"checkpoint-{number}")

    thread = threading.Thread(target=churn)
    thread.start()
    trainer: Any = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), is_world_process_zero=lambda: True)
    try:
        for step in range(60):
            BestWeights(trainer, tmp_path, {"model": torch.nn.Linear(1, 1)}, ("loss", "sft")).write(step)
    finally:
        done.set()
        thread.join()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-59"]


def test_equal_shards_are_equal_files_in_whatever_order_they_come(tmp_path: Path) -> None:
    """An extension's checkpoint is kept in the artifact: the same training makes the same bytes."""
    pieces = [Piece(name, (0,), torch.arange(4.0)) for name in ("a", "b", "c", "d")]
    records = [write_pieces(order, tmp_path / "x") for order in (pieces, pieces[::-1], pieces, pieces, pieces)]
    assert len({record.blake3 for record in records}) == 1
