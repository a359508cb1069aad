"""Dropout that follows from seed, step, row and position, and from nothing else.

torch draws masks from a generator, in the order in which rows come: another cut into micro-batches, or another number
of ranks, drops other values, and a checkpoint must hold the state of each rank's generator. Here a value's number is a
hash of where it stands, so one process and four drop the same values, on any device, and a resume needs no state.

Dropout of attention weights (packing refuses it, docs/packing.md), what a model calls as a function, and all dropout
of rlvr (an adapter's, or that of a model trained by GRPO), whose batches name no rows, stay torch's:
each rank's generator is set before each step, from seed, step and rank. That repeats a run, after a resume too; with
another cut or another number of ranks, other values are dropped at the same rate.

A training that began before this module goes on with these values, under its key: their rate is the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from smoltulu.tasks.trainer.waits import put

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

#: Multipliers of splitmix64's finaliser (Steele, Lea, Flood 2014), as signed numbers.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_BITS = 53


def seed_of(*parts: object) -> int:
    """A seed (64 bits, signed) from anything whose `repr` says what it is."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def mixed(values: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser: int64 -> int64, each input bit changes half of the output bits."""
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _FIRST
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _SECOND
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def token_keys(seed: int, step: int, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A key for each token, int64. rows, positions: of one shape; the number of its row, and its place in it."""
    return mixed(mixed(rows + seed_of(seed, step)) + positions)


def kept(keys: torch.Tensor, place: int, num_channels: int, rate: float) -> torch.Tensor:
    """What stays: keys (...) -> bool (..., num_channels). `place`: of the dropout in the model."""
    channels = mixed(torch.arange(num_channels, device=keys.device) + seed_of(place))
    return ((mixed(keys[..., None] ^ channels) >> (64 - _BITS)) & ((1 << _BITS) - 1)) >= int(rate * (1 << _BITS))


def keys_of_batch(seed: int, step: int, batch: dict[str, Any]) -> torch.Tensor:
    """Keys of the tokens of a micro-batch, in the shape of its `input_ids`: padded (S, T) or packed (1, T).

    A row may be several sequences, as a pair is two. Their order: padded the first of each row, then the second of
    each; packed row by row. Where they share a prompt, a token of it is dropped alike, also if it is computed twice.
    """
    shape, device = batch["input_ids"].shape, batch["input_ids"].device
    rows = batch["row"].to(device)
    if "segments" in batch:
        parts = batch["segments"].parts
        rows = rows.repeat_interleave(len(parts) // len(rows), output_size=len(parts))
        lengths = put([part.num_queries for part in parts], device)
        rows = torch.repeat_interleave(rows, lengths, output_size=shape[1])[None]
        return token_keys(seed, step, rows, batch["position_ids"])
    rows = rows.repeat(shape[0] // len(rows))
    return token_keys(seed, step, rows[:, None].expand(shape), torch.arange(shape[1], device=device).expand(shape))


class _Keys:
    """Keys of the micro-batch that goes through the model; None: of no rows."""

    now: torch.Tensor | None = None


class RowDropout(torch.nn.Dropout):
    """A dropout over hidden states, (B, T, C) or (B T, C). Anything else is left to torch."""

    def __init__(self, rate: float, place: int, keys: _Keys) -> None:
        super().__init__(rate)
        self.place, self._keys = place, keys

    @torch.compiler.disable  # it would be compiled anew for each batch of keys
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        keys = self._keys.now
        if not self.training or not self.p or keys is None or input.numel() != keys.numel() * input.shape[-1]:
            return super().forward(input)
        stays = kept(keys, self.place, input.shape[-1], self.p).view(input.shape)
        return input * stays.to(input.dtype) / (1 - self.p)


def by_rows(trainer: Trainer) -> TrainerCallback:
    """Have a trainer's model drop by rows, and return the callback that sets torch's generator at every step."""
    from transformers import TrainerCallback

    model, seed, keys = trainer.accelerator.unwrap_model(trainer.model), trainer.args.seed, _Keys()
    dropouts = [(name, one) for name, one in model.named_modules() if isinstance(one, torch.nn.Dropout) and one.p > 0]
    for place, (name, one) in enumerate(dropouts):
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, RowDropout(one.p, place, keys).train(one.training))
    loss_of_trainer = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        keys.now = keys_of_batch(seed, trainer.state.global_step, inputs) if "row" in inputs else None
        return loss_of_trainer(model, inputs, *args, **kwargs)

    if dropouts:
        trainer.compute_loss = compute_loss

    class Draws(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # By rank: ranks with the same generator would drop the same places, and sample the same rollouts.
            torch.manual_seed(seed_of(seed, state.global_step, args.process_index))

    return Draws()
