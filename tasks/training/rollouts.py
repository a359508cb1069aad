"""Which prompts a rollout batch takes. What is written after them: tasks/generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smoltulu.tasks.generation.interface import PROMPT_ORDER, Request, Written, random_words

#: Writes rollouts with the policy as it is now: an engine with the run's way of sampling.
Backend = Callable[[Sequence[Request]], list[Written]]


def shuffled(seed: int, purpose: int, counter: tuple[int, int, int], num: int) -> list[int]:
    """A permutation of `num` numbers that depends on the arguments alone."""
    import numpy as np

    order: list[int] = np.argsort(random_words(seed, purpose, counter, num), kind="stable").tolist()
    return order


def prompts_of_batch(seed: int, batch: int, num_prompts: int, num_rows: int) -> list[int]:
    """Which rows rollout batch `batch` takes: epochs over all rows, end to end, each in an order of its own.

    An epoch's order depends on seed and epoch alone. A batch may end one epoch and begin the next.
    """
    lines: list[int] = []
    for epoch in range(batch * num_prompts // num_rows, ((batch + 1) * num_prompts - 1) // num_rows + 1):
        start = epoch * num_rows
        first, last = max(batch * num_prompts - start, 0), min((batch + 1) * num_prompts - start, num_rows)
        lines += shuffled(seed, PROMPT_ORDER, (epoch, 0, 0), num_rows)[first:last]
    return lines
