"""Writes a training's checkpoints (tasks/trainer/checkpoint.py) while it goes on.

A thread copies the tensors to the host's memory while the next step goes forward and backward, and the optimizer waits
for the copy, as in CheckFreq (Mohan et al., FAST 2021). Then the thread writes, syncs and hashes it; rank 0's waits for
the shards of all ranks and writes the marker. The next save and the end of the training wait for that. Where the host
has no room for a copy, the optimizer waits for the write.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from smoltulu.artifacts.checkpoints import mark_complete, prune
from smoltulu.artifacts.files import read_plain, remove_tree, write_atomically
from smoltulu.schemas.artifact import FileRecord
from smoltulu.tasks.limits import memory
from smoltulu.tasks.trainer.checkpoint import (
    SHARDS_FOLDER,
    STATE_FILE,
    Piece,
    SavedState,
    is_older,
    load_into,
    own_pieces,
    shard_name,
    tensors_and_numbers,
    trained_by,
    write_pieces,
)

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("smoltulu")
#: Seconds between two looks at whether the other ranks have written their shards.
_LOOK_SECONDS = 0.05
#: Seconds that a failing rank waits for the shards of others, which may be dead.
_LAST_WAIT_SECONDS = 30.0
#: A part of a checkpoint below this is waited for at the end of the next step, for so long: a kill after that step
#: then loses no more than it did when trainings waited for their checkpoints.
_SMALL_BYTES, _SMALL_WAIT_SECONDS = 64 << 20, 0.5
#: Of the memory that is free, a copy for the writer takes no more than this share.
_MEMORY_SHARE = 0.8
#: What Linux says of a process: its resident memory at the peak, and now.
_RSS = ("VmHWM", "VmRSS")


def given_back() -> int:
    """Bytes that this process had at its peak and has no more: the next step takes them again. 0 where nobody says."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = {
        name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in _RSS
    }
    return 1024 * max(kilobytes.get("VmHWM", 0) - kilobytes.get("VmRSS", 0), 0)


class HostCopy:
    """Copies of pieces in the host's memory, in buffers that are used again: new memory is slow to get."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def has_room(self, pieces: Iterable[Piece], num_ranks: int = 1) -> bool:
        """Whether there is memory for copies of these, while a step takes again what it took at most.

        num_ranks  of this machine, which all look at the same memory at the same time
        """
        missing = sum(_room(one) for one in pieces if one.name not in self._buffers)
        needed = num_ranks * (missing + given_back())
        return not missing or needed <= _MEMORY_SHARE * memory().available

    def of(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Done when this returns."""
        copies = []
        for one in pieces:
            buffer = self._buffers.get(one.name)
            if buffer is None or buffer.shape != one.tensor.shape or buffer.dtype != one.tensor.dtype:
                buffer = torch.empty(one.tensor.shape, dtype=one.tensor.dtype, pin_memory=one.tensor.is_cuda)
                self._buffers[one.name] = buffer
            copies.append(Piece(one.name, one.offsets, buffer.copy_(one.tensor, non_blocking=True)))
        if any(one.tensor.is_cuda for one in pieces):
            torch.cuda.current_stream().synchronize()
        return copies


def _room(piece: Piece) -> int:
    """Bytes of a copy. torch rounds page-locked memory, which copies of a GPU's tensors need, to a power of two."""
    return 1 << (piece.num_bytes - 1).bit_length() if piece.tensor.is_cuda and piece.num_bytes else piece.num_bytes


@contextmanager
def beside_the_step(updated: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    """On a GPU a stream of its own, for a thread: it starts once `updated` has passed, and holds up no other."""
    if updated is None:
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda.current_stream().wait_event(updated)
        yield


class CheckpointWriter:
    """Writes checkpoints of a training, one at a time, in a thread of its own.

    num_kept    newest checkpoints that are kept, beside the best
    when_whole  called by rank 0's thread with each checkpoint that is whole, before older ones go
    """

    def __init__(self, trainer: Trainer, num_kept: int) -> None:
        self.trainer, self.num_kept = trainer, num_kept
        self.when_whole: list[Callable[[Path], None]] = []
        self.ranks = PartialState()
        self._host = HostCopy()
        self._pieces: list[Piece] = []
        self._is_small = False
        self._unlogged: tuple[float, int] | None = None
        self._running: futures.Future[None] | None = None
        self._copied, self._given_up = threading.Event(), threading.Event()

    def attach(self) -> None:
        """Have the trainer write its checkpoints through this, and read them, or older ones as it does by itself.

        transformers' `_save_checkpoint` calls three functions for model, optimizer and random numbers.
        """
        trainer: Any = self.trainer
        read_model, read_optimizer = trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler
        read_random_state = trainer._load_rng_state

        def of_older(read: Callable[..., Any]) -> Callable[..., None]:
            def reads(checkpoint: str | None, *args: Any) -> None:
                if checkpoint is not None and is_older(Path(checkpoint)):
                    if any(isinstance(one, DTensor) for one in trainer.model.parameters()):
                        raise ValueError(
                            f"{checkpoint} was written by an earlier version of smoltulu, which a sharded model cannot "
                            "go on from: set compute.parallel to ddp, or remove the folder to begin anew"
                        )
                    read(checkpoint, *args)

            return reads

        def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            if is_older(Path(checkpoint)):
                read_optimizer(checkpoint)
            else:
                # Here, not where the trainer reads weights: now the model is wrapped, and each rank has its shards.
                self._unlogged = load_into(trained_by(trainer), Path(checkpoint)).unlogged_loss

        trainer.save_model = lambda folder=None, _internal_call=False: self.begin(Path(folder))
        trainer._save_optimizer_and_scheduler = lambda folder: self.take(Path(folder))
        trainer._save_rng_state = lambda folder: None
        trainer._load_from_checkpoint = of_older(read_model)
        trainer._load_rng_state = of_older(read_random_state)
        trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler

    def begin_training(self) -> None:
        """Once the trainer has begun to count anew: the loss that is logged next is of all steps since the last log."""
        if self._unlogged is not None:
            self.trainer._tr_loss += self._unlogged[0]
            self.trainer._globalstep_last_logged = self._unlogged[1]

    def begin(self, folder: Path) -> None:
        """An empty folder for a checkpoint, once the one before is written. Called by all ranks, as the next two.

        ValueError where ranks do not share it.
        """
        self.wait()
        if self.ranks.is_main_process:
            remove_tree(folder)
            (folder / SHARDS_FOLDER).mkdir(parents=True)
        self.ranks.wait_for_everyone()
        if not (folder / SHARDS_FOLDER).is_dir():
            raise ValueError(
                f"rank {self.ranks.process_index} does not see {folder}, which rank 0 made: all ranks must share the "
                "folder of compute.store"
            )

    def take(self, folder: Path) -> None:
        """Note what is trained; nothing may change it before `before_update`."""
        trainer, trained = self.trainer, trained_by(self.trainer)
        tensors, numbers = tensors_and_numbers(trained)
        loss = trainer.accelerator.reduce(trainer._tr_loss, "mean").item()
        if self.ranks.is_main_process:
            state = SavedState(
                num_ranks=self.ranks.num_processes,
                numbers=numbers,
                schedules={who: one.schedule.state_dict() for who, one in trained.items()},
                unlogged_loss=(loss, trainer._globalstep_last_logged),
            )
            (folder / STATE_FILE).write_text(json.dumps(state.model_dump()))  # the writer syncs it
        self._pieces = own_pieces(tensors, self.ranks.process_index, self.ranks.num_processes)
        self._is_small = sum(one.num_bytes for one in self._pieces) < _SMALL_BYTES

    def write(self, folder: Path, score: float | None) -> None:
        """Start to copy and write what was taken. All other files of the checkpoint must be there.

        score  higher is better, see `prune`
        """
        pieces, self._pieces = self._pieces, []
        device, updated = self.trainer.args.device, None
        if device.type == "cuda":
            updated = torch.cuda.Event()
            updated.record()
        done: futures.Future[None] = futures.Future()

        def run() -> None:
            try:
                self._copy_and_write(folder, pieces, score, updated)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._copied.set()

        self._copied.clear()
        self._running = done
        # A daemon: one that waits for the shards of a dead rank must not hold up the end of the process.
        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    def before_update(self) -> None:
        """Wait for the copy: now the weights change."""
        if self._running is not None:
            self._copied.wait()

    def check(self) -> None:
        """At the end of a step: raise the error of a write that failed; wait for a small one."""
        if self._running is None:
            return
        if self._is_small:
            futures.wait([self._running], _SMALL_WAIT_SECONDS)
        if self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is whole. Raises the writer's error."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def end(self) -> None:
        """Wait, and give back the memory of the copy."""
        self.wait()
        self._host = HostCopy()
        if torch.cuda.is_available():
            torch.accelerator.empty_host_cache()  # torch keeps page-locked memory that nobody uses

    def abandon(self) -> None:
        """The training fails: what is being written becomes whole if it can within a bound; its error is second."""
        if self._running is None:
            return
        if self.ranks.num_processes > 1:
            timer = threading.Timer(_LAST_WAIT_SECONDS, self._given_up.set)
            timer.daemon = True
            timer.start()
        try:
            self.wait()
        except Exception as error:
            logger.warning("the last checkpoint was not written: %s", error)

    def _copy_and_write(
        self, folder: Path, pieces: list[Piece], score: float | None, updated: torch.cuda.Event | None
    ) -> None:
        rank, num_ranks = self.ranks.process_index, self.ranks.num_processes
        name = shard_name(rank, num_ranks)
        try:
            with beside_the_step(updated, self.trainer.args.device):
                if self._host.has_room(pieces, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
                    pieces = self._host.of(pieces)
                    self._copied.set()
                else:
                    logger.warning("no memory for a copy of what is trained: the training waits for its checkpoint")
                record = write_pieces(pieces, folder / name)
            self._copied.set()
            if rank:
                write_atomically(_record_file(folder, rank, num_ranks), record.model_dump_json())
                return
            mark_complete(folder, score, {name: record, **self._records_of_others(folder, num_ranks)})
        except BaseException:
            if not rank:
                remove_tree(folder)
            raise
        for then in self.when_whole:
            then(folder)
        prune(folder.parent, self.num_kept)

    def _records_of_others(self, folder: Path, num_ranks: int) -> dict[str, FileRecord]:
        """Size and digest of the shards of ranks 1, 2, ..., once they are on disk."""
        records = {}
        for rank in range(1, num_ranks):
            file = _record_file(folder, rank, num_ranks)
            while not file.exists():
                if self._given_up.wait(_LOOK_SECONDS):
                    raise TimeoutError(f"rank {rank} did not write its part of {folder.name}")
            records[shard_name(rank, num_ranks)] = FileRecord.model_validate_json(read_plain(file))
            os.unlink(file)
        return records


def _record_file(folder: Path, rank: int, num_ranks: int) -> Path:
    return folder / f"{shard_name(rank, num_ranks)}.json"
