"""A training's checkpoint: read by any number of ranks, whatever shards the model, and written beside the training.

    shards/rank-1-of-2.safetensors   what rank 1 of 2 wrote: its shards of weights and optimizer state, by name
    state.json                       schedules, and the optimizers' numbers (Adam's steps)
    trainer_state.json, ...          what transformers' trainer and the callbacks keep
    .complete                        last (artifacts/checkpoints.py): every file, with size and digest

A tensor's name says whose it is: `model.weights.NAME`, `model.optimizer.NAME.exp_avg`. Each shard has its place in the
whole tensor, as torch writes it into the header of a safetensors file, and torch's reader
(`torch.distributed.checkpoint.HuggingFaceStorageReader`) lays together what a rank needs. Of a tensor that all ranks
have (DDP), one rank writes it; they share the tensors by size. Nothing is pickled, unlike in a checkpoint of
`torch.distributed.checkpoint` (`.metadata`) or of the trainer (`optimizer.pt`).

A thread copies the tensors to the host's memory while the next step goes forward and backward, and the optimizer waits
for the copy, as in CheckFreq (Mohan et al., FAST 2021). Then the thread writes, syncs and hashes it; rank 0's waits for
the shards of all ranks and writes the marker. The next save and the end of the training wait for that. Where the host
has no room for a copy, the optimizer waits for the write.

There is no state of random generators: what a step draws follows from seed, step and rows (tasks/trainer/dropout.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from accelerate import PartialState
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from smoltulu.artifacts.checkpoints import mark_complete, prune
from smoltulu.artifacts.files import read_plain, remove_tree, sync, write_atomically
from smoltulu.artifacts.keys import file_digest
from smoltulu.schemas.artifact import FileRecord
from smoltulu.schemas.common import StrictModel

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import Trainer

logger = logging.getLogger("smoltulu")
SHARDS_FOLDER, STATE_FILE = "shards", "state.json"
#: Prefixes of parameter names that wrappers put there, and that are no part of the model.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
#: Seconds between two looks at whether the other ranks have written their shards.
_LOOK_SECONDS = 0.05
#: Seconds that a failing rank waits for the shards of others, which may be dead.
_LAST_WAIT_SECONDS = 30.0
#: A part of a checkpoint below this is waited for at the end of the next step, for so long: a kill after that step
#: then loses no more than it did when trainings waited for their checkpoints.
_SMALL_BYTES, _SMALL_WAIT_SECONDS = 64 << 20, 0.5
#: Of the memory that is free, a copy for the writer takes no more than this share.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Trained:
    """A model in training, with what trains it. `weights`: by name, as its optimizer moves them."""

    weights: dict[str, torch.Tensor]
    optimizer: Optimizer
    schedule: LRScheduler


class SavedState(StrictModel):
    """`state.json`. `numbers`: of the optimizers' states, by name like the tensors. `schedules`: model -> its state."""

    version: Literal[1] = 1
    num_ranks: int
    numbers: dict[str, float]
    schedules: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """What a rank writes of a tensor, and where in it that begins, a number for each dimension."""

    name: str
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


# --------------------------------------------------------------------------------------------------- what there is


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that are trained, by name; of a model with LoRA its adapter. The rest is as it was at the start."""
    named = {}
    for name, weight in model.named_parameters():
        for prefix in _WRAPPERS:
            name = name.replace(prefix, "")
        if weight.requires_grad:
            named[name] = weight
    return named


def trained_by(trainer: Trainer) -> dict[str, Trained]:
    """All that a trainer trains: `model`, and what its `also_trained` names (PPO's critic)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # accelerate wraps the optimizer.
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    own = Trained(trained_weights(model), optimizer, trainer.lr_scheduler)
    return {"model": own, **getattr(trainer, "also_trained", {})}


def tensors_and_numbers(trained: Mapping[str, Trained]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and optimizer states by name: tensors, and what is a single number."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for who, one in trained.items():
        for name, weight in one.weights.items():
            tensors[f"{who}.weights.{name}"] = weight.detach()
            for key, value in one.optimizer.state.get(weight, {}).items():
                place = tensors if isinstance(value, torch.Tensor) and value.dim() else numbers
                place[f"{who}.optimizer.{name}.{key}"] = value
    if numbers:
        # On a GPU each would be waited for alone.
        together = torch.stack([torch.as_tensor(value).double() for value in numbers.values()]).tolist()
        numbers = dict(zip(numbers, together, strict=True))
    return tensors, numbers


def owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank that writes each tensor: the largest first, each to a rank with the least so far."""
    loads = [0] * num_ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner


def own_pieces(tensors: Mapping[str, torch.Tensor], rank: int, num_ranks: int) -> list[Piece]:
    """What this rank writes: its shards, and its part of the tensors that all ranks have."""
    whole = {name: one for name, one in tensors.items() if not isinstance(one, DTensor)}
    owner = owners({name: one.numel() * one.element_size() for name, one in whole.items()}, num_ranks)
    pieces = [Piece(name, (0,) * one.dim(), one) for name, one in whole.items() if owner[name] == rank]
    for name, one in tensors.items():
        if not isinstance(one, DTensor):
            continue
        coordinates = one.device_mesh.get_coordinate() or ()
        # Along a dimension of the mesh that holds copies, the first has it.
        is_first = all(place.is_shard() or not at for place, at in zip(one.placements, coordinates, strict=True))
        for chunk in one.__create_chunk_list__():
            if is_first and math.prod(chunk.sizes):
                pieces.append(Piece(name, tuple(chunk.offsets), one.to_local()))
    return pieces


# ----------------------------------------------------------------------------------------------------- the shards


def shard_name(rank: int, num_ranks: int) -> str:
    """Path of a rank's shards in a checkpoint. Ranks count from 0."""
    return f"{SHARDS_FOLDER}/rank-{rank}-of-{num_ranks}.safetensors"


def write_pieces(pieces: Iterable[Piece], file: Path) -> FileRecord:
    """Write a rank's shards, on disk when this returns. After an error there is no file."""
    offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
    tensors = {piece.name: piece.tensor.cpu().contiguous() for piece in pieces}
    try:
        # As torch's own writer says it (torch/distributed/checkpoint/_hf_utils.py).
        save_file(tensors, file, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)})
        sync(file)
    except BaseException:
        file.unlink(missing_ok=True)  # on a full disk it would only make it fuller
        raise
    return FileRecord(size=file.stat().st_size, blake3=file_digest(file))


class HostCopy:
    """Copies of pieces in the host's memory, in buffers that are used again: new memory is slow to get."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def has_room(self, pieces: Iterable[Piece]) -> bool:
        """Whether there is memory for copies of these."""
        missing = sum(one.num_bytes for one in pieces if one.name not in self._buffers)
        return missing <= _MEMORY_SHARE * psutil.virtual_memory().available

    def of(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Done when this returns."""
        copies = []
        for one in pieces:
            buffer = self._buffers.get(one.name)
            if buffer is None or buffer.shape != one.tensor.shape or buffer.dtype != one.tensor.dtype:
                buffer = torch.empty(one.tensor.shape, dtype=one.tensor.dtype, pin_memory=one.tensor.is_cuda)
                self._buffers[one.name] = buffer
            copies.append(Piece(one.name, one.offsets, buffer.copy_(one.tensor, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies


@contextmanager
def beside_the_step(updated: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    """On a GPU a stream of its own, for a thread: it starts once `updated` has passed, and holds up no other."""
    if updated is None:
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda.current_stream().wait_event(updated)
        yield


# -------------------------------------------------------------------------------------------------------- the reader


def is_older(checkpoint: Path) -> bool:
    """Whether the trainer itself wrote a checkpoint (before this module was); its own functions read it."""
    return not (checkpoint / SHARDS_FOLDER).is_dir()


def load_into(trained: Mapping[str, Trained], checkpoint: Path) -> None:
    """Weights, optimizers and schedules of a checkpoint, whoever wrote its shards. Needs no other rank.

    Raises:
        ValueError: it holds other tensors than are trained, or is of a later version.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    try:
        state = SavedState.model_validate_json(read_plain(checkpoint / STATE_FILE))
    except ValidationError as error:
        raise ValueError(
            f"{checkpoint} cannot be read by this version of smoltulu ({error.errors()[0]['msg']}): go on with the one "
            "that wrote it, or remove the folder to go on from the checkpoint before"
        ) from None
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS_FOLDER))
    stored: dict[str, TensorStorageMetadata] = reader.read_metadata().state_dict_metadata
    weights = {f"{who}.weights.{name}": one for who, its in trained.items() for name, one in its.weights.items()}
    moments = _empty_moments(trained, stored)
    wanted = {**weights, **moments}
    others = [name for name in (stored.keys() | wanted.keys()) if not _is_same(wanted.get(name), stored.get(name))]
    if others or state.schedules.keys() != trained.keys():
        raise ValueError(
            f"{checkpoint} holds other tensors than this training moves ({len(others):,}, as {sorted(others)[:3]}): it "
            "is of another model. Remove the folder to begin anew"
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this rank reads alone
        load({name: one.detach() for name, one in wanted.items()}, storage_reader=reader, no_dist=True)
    for who, one in trained.items():
        _set_optimizer(who, one, moments, state.numbers)
        one.schedule.load_state_dict(state.schedules[who])
        for group, rate in zip(one.optimizer.param_groups, one.schedule.get_last_lr(), strict=True):
            group["lr"] = rate


def _is_same(tensor: torch.Tensor | None, stored: TensorStorageMetadata | None) -> bool:
    return tensor is not None and stored is not None and tensor.shape == stored.size


def _split(name: str) -> tuple[str, str, str]:
    """A name of an optimizer's state -> model, parameter, key."""
    who, _, rest = name.partition(".optimizer.")
    parameter, _, key = rest.rpartition(".")
    return who, parameter, key


def _empty_moments(
    trained: Mapping[str, Trained], stored: Mapping[str, TensorStorageMetadata]
) -> dict[str, torch.Tensor]:
    """Tensors for the optimizers' states that are stored, each sharded like its parameter."""
    moments = {}
    for name, one in stored.items():
        who, parameter, _ = _split(name)
        if who in trained and (weight := trained[who].weights.get(parameter)) is not None:
            alike = weight.shape == one.size
            dtype = one.properties.dtype
            moments[name] = (
                torch.zeros_like(weight, dtype=dtype, requires_grad=False)
                if alike
                else torch.zeros(one.size, dtype=dtype, device=weight.device)
            )
    return moments


def _set_optimizer(who: str, one: Trained, moments: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> None:
    states: dict[str, dict[str, Any]] = {}
    for name, value in (*moments.items(), *numbers.items()):
        whose, parameter, key = _split(name)
        if whose == who:
            states.setdefault(parameter, {})[key] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    names = {id(weight): name for name, weight in one.weights.items()}
    moved = [weight for group in one.optimizer.param_groups for weight in group["params"]]
    numbered = {place: states[names[id(weight)]] for place, weight in enumerate(moved) if names[id(weight)] in states}
    # Its settings are those of today's optimizer; torch puts each value on the device where it belongs.
    groups = one.optimizer.state_dict()["param_groups"]
    one.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


# -------------------------------------------------------------------------------------------------------- the writer


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
                    read(checkpoint, *args)

            return reads

        def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            if is_older(Path(checkpoint)):
                if any(isinstance(one, DTensor) for one in trainer.model.parameters()):
                    raise ValueError(
                        f"{checkpoint} was written by an earlier version of smoltulu, which a sharded model cannot go "
                        "on from: set compute.parallel to ddp, or remove the folder to begin anew"
                    )
                read_optimizer(checkpoint)
            else:
                # Here, not where the trainer reads weights: now the model is wrapped, and each rank has its shards.
                load_into(trained_by(trainer), Path(checkpoint))

        trainer.save_model = lambda folder=None, _internal_call=False: self.begin(Path(folder))
        trainer._save_optimizer_and_scheduler = lambda folder: self.take(Path(folder))
        trainer._save_rng_state = lambda folder: None
        trainer._load_from_checkpoint = of_older(read_model)
        trainer._load_rng_state = of_older(read_random_state)
        trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler

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
        trained = trained_by(self.trainer)
        tensors, numbers = tensors_and_numbers(trained)
        if self.ranks.is_main_process:
            schedules = {who: one.schedule.state_dict() for who, one in trained.items()}
            state = SavedState(num_ranks=self.ranks.num_processes, numbers=numbers, schedules=schedules)
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
                if self._host.has_room(pieces):
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
