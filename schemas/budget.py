"""How long a training is: optimizer steps, epochs, tokens, micro-batches. The one place for this arithmetic.

It lies on the lowest floor, because the settings' own validators need it. Validators, plan, preflight and trainers use
the same functions. Pure; imports no contract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Batches(Protocol):
    """What `ComputeSettings` says of batches; they import this module."""

    @property
    def per_device_train_batch_size(self) -> int: ...
    @property
    def num_processes(self) -> int: ...


@dataclass(frozen=True)
class Budget:
    """How long a training is to be: `max_steps` where given, else `max_tokens`, else epochs."""

    effective_batch_size: int
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    max_tokens: int | None = None

    def num_steps(self, num_rows: int | None, num_tokens: int | None) -> int | None:
        """Optimizer steps on so many rows with so many tokens (None: not known); None where that does not say it.

        As transformers' Trainer counts them: epochs are rounded up to steps. Exact, packed or not: packing lays the
        rows of a step end to end and adds none.
        """
        if self.max_steps is not None:
            return self.max_steps
        if not num_rows:
            return None
        if self.max_tokens is None:
            return math.ceil(self.num_train_epochs * steps_per_epoch(num_rows, self.effective_batch_size))
        if not num_tokens:
            return None
        return steps_for_tokens(self.max_tokens, num_rows, num_tokens, self.effective_batch_size)


def steps_per_epoch(num_rows: int, effective_batch_size: int) -> int:
    """Optimizer steps in which every row is seen once: the last batch may be short."""
    return max(-(-num_rows // effective_batch_size), 1)


def steps_for_tokens(max_tokens: int, num_rows: int, num_tokens: int, effective_batch_size: int) -> int:
    """Optimizer steps that see `max_tokens` tokens, rounded up, where `num_rows` rows have `num_tokens`.

    In whole numbers: rounding of a mean must not add a step where the budget is whole steps.
    """
    return -(-max_tokens * num_rows // (num_tokens * effective_batch_size))


def tokens_of_steps(num_steps: int, num_rows: int, num_tokens: int, effective_batch_size: int) -> int:
    """Tokens of `num_steps` steps, where an epoch has `num_tokens`: exact for whole epochs, else in expectation."""
    whole, rest = divmod(num_steps, steps_per_epoch(num_rows, effective_batch_size))
    part = min(rest * effective_batch_size, num_rows) / max(num_rows, 1)
    return whole * num_tokens + round(part * num_tokens)


def share_of(ratio: float, num_steps: int) -> int:
    """`ratio` of `num_steps` steps, rounded up; 7 % of 100 is 7, though 100 * 0.07 is 7.000000000000001."""
    return math.ceil(num_steps * ratio - 1e-9)


def accumulation_steps(effective_batch_size: int, compute: Batches) -> int:
    """gradient_accumulation_steps = effective / (per device x processes).

    ValueError where they do not divide: a silently different effective batch would be another experiment.
    `ComputeSettings.of` gives a per-device batch that divides.
    """
    per_step = compute.per_device_train_batch_size * compute.num_processes
    if effective_batch_size % per_step:
        allowed = [size for size in range(1, effective_batch_size + 1) if effective_batch_size % size == 0]
        raise ValueError(
            f"effective_batch_size {effective_batch_size} is not a multiple of per_device_train_batch_size "
            f"{compute.per_device_train_batch_size} x num_processes {compute.num_processes}; "
            f"their product must be one of {allowed}"
        )
    return effective_batch_size // per_step


def rows_of_process(effective_batch_size: int, num_processes: int) -> int:
    """Rows of an optimizer step that each process takes, where its micro-batches are cut by tokens.

    ValueError where they do not divide, as in `accumulation_steps`.
    """
    if effective_batch_size % num_processes:
        raise ValueError(
            f"effective_batch_size {effective_batch_size} is not a multiple of num_processes {num_processes}: each "
            "process takes equally many rows of an optimizer step; set compute.num_processes to one that divides it"
        )
    return effective_batch_size // num_processes


def most_ranks(most: int, effective_batch_size: int) -> int:
    """The largest number of ranks, at most `most`, that divides the effective batch: each takes equally many rows."""
    return next(number for number in range(most, 0, -1) if effective_batch_size % number == 0)


def largest_batch(most: int, effective_batch_size: int, num_processes: int) -> int | None:
    """The largest per-device batch of at most `most` rows that divides the effective batch; None if there is none."""
    most = min(most, effective_batch_size)
    return next((size for size in range(most, 0, -1) if effective_batch_size % (size * num_processes) == 0), None)


def smaller_batch(size: int, effective_batch_size: int, num_processes: int) -> int | None:
    """The largest per-device batch of at most half the size that divides the effective batch; None below one row."""
    return largest_batch(size // 2, effective_batch_size, num_processes)
