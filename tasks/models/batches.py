"""Texts in batches of similar length, padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

#: Called with the number of texts that are done, and of all.
OnBatch = Callable[[int, int], None]


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions of texts in batches of similar length. What does not fit into memory fails in the first batch."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(
    texts: Sequence[Sequence[int]], side: Literal["left", "right"], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts, both (number of texts, tokens of the longest)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(text) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
