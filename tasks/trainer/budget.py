"""How many optimizer steps a training will take. Pure; asked before there is a trainer."""

from __future__ import annotations

import math


def optimizer_steps(
    num_rows: int, num_train_epochs: float, effective_batch_size: int, max_steps: int | None = None
) -> int:
    """Steps of transformers' Trainer: the last batch of an epoch may be short, and epochs are rounded up to steps.

    Exact, packed or not: packing lays the rows of a step end to end and adds none.
    """
    if max_steps is not None:
        return max_steps
    return math.ceil(num_train_epochs * steps_per_epoch(num_rows, effective_batch_size))


def steps_per_epoch(num_rows: int, effective_batch_size: int) -> int:
    """Optimizer steps in which every row is seen once."""
    return max(-(-num_rows // effective_batch_size), 1)


def tokens_of_steps(num_steps: int, num_rows: int, num_tokens: int, effective_batch_size: int) -> int:
    """Tokens of `num_steps` steps, where an epoch has `num_tokens`: exact for whole epochs, else in expectation."""
    whole, rest = divmod(num_steps, steps_per_epoch(num_rows, effective_batch_size))
    part = min(rest * effective_batch_size, num_rows) / max(num_rows, 1)
    return whole * num_tokens + round(part * num_tokens)
