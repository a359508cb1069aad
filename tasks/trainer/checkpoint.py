"""What a training's checkpoint holds: read by any number of ranks, whatever shards the model.

    shards/rank-1-of-2.safetensors   what rank 1 of 2 wrote: its shards of weights and optimizer state, by name
    state.json                       schedules, and the optimizers' numbers (Adam's steps)
    trainer_state.json, ...          what transformers' trainer and the callbacks keep
    .complete                        last (artifacts/checkpoints.py): every file, with size and digest

A tensor's name says whose it is: `model.weights.NAME`, `model.optimizer.NAME.exp_avg`. Each shard has its place in the
whole tensor, as torch writes it into the header of a safetensors file, and torch's reader
(`torch.distributed.checkpoint.HuggingFaceStorageReader`) lays together what a rank needs. Of a tensor that all ranks
have (DDP), one rank writes it; they share the tensors by size. Nothing is pickled, unlike in a checkpoint of
`torch.distributed.checkpoint` (`.metadata`) or of the trainer (`optimizer.pt`).

There is no state of random generators: what a step draws follows from seed, step and rows (tasks/trainer/dropout.py).
When all this is written: tasks/trainer/checkpoint_writer.py.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from smoltulu.artifacts.files import read_plain, sync
from smoltulu.artifacts.keys import file_digest
from smoltulu.schemas.artifact import FileRecord
from smoltulu.schemas.common import StrictModel, first_problem

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import Trainer

SHARDS_FOLDER, STATE_FILE = "shards", "state.json"
#: Prefixes of parameter names that wrappers put there, and that are no part of the model.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Trained:
    """A model in training, with what trains it. `weights`: by name, as its optimizer moves them."""

    weights: dict[str, torch.Tensor]
    optimizer: Optimizer
    schedule: LRScheduler


class SavedState(StrictModel):
    """`state.json`.

    numbers        of the optimizers' states, by name like the tensors
    schedules      model -> its state
    unlogged_loss  sum over the steps since the last logged one, and the step of that one
    """

    version: Literal[1] = 1
    num_ranks: int
    numbers: dict[str, float]
    schedules: dict[str, dict[str, Any]]
    unlogged_loss: tuple[float, int] | None = None


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
    return tensors, _read(numbers)


def _read(numbers: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """Numbers that may lie on devices: all of a device at once, as each would be waited for alone."""
    by_device: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in numbers.items():
        one = torch.as_tensor(value).double()
        by_device[one.device][name] = one
    read: dict[str, float] = {}
    for of_device in by_device.values():  # an offloaded optimizer's lie on the host, the policy's on its GPU
        read |= zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True)
    return {name: read[name] for name in numbers}


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
        # As torch's own writer says it (torch/distributed/checkpoint/_hf_utils.py), but in one field: safetensors
        # writes several in another order each time, and equal checkpoints are to be equal files.
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(offsets, sort_keys=True)})
        sync(file)
    except BaseException:
        file.unlink(missing_ok=True)  # on a full disk it would only make it fuller
        raise
    return FileRecord(size=file.stat().st_size, blake3=file_digest(file))


# -------------------------------------------------------------------------------------------------------- the reader


def is_older(checkpoint: Path) -> bool:
    """Whether the trainer itself wrote a checkpoint (before this module was); its own functions read it."""
    return not (checkpoint / SHARDS_FOLDER).is_dir()


def load_into(trained: Mapping[str, Trained], checkpoint: Path) -> SavedState:
    """Weights, optimizers and schedules of a checkpoint, whoever wrote its shards. Needs no other rank.

    Raises:
        ValueError: it holds other tensors than are trained, or is of a later version.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    try:
        state = SavedState.model_validate_json(read_plain(checkpoint / STATE_FILE))
    except ValidationError as error:
        raise ValueError(
            f"{checkpoint} cannot be read by this version of smoltulu ({first_problem(error)}): go on with the one "
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
    return state


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
