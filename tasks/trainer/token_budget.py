"""Micro-batches by tokens (`compute.tokens_per_device`): as many rows as fit into a budget, not a fixed number.

A batch of the loader is all rows that a process has of an optimizer step, and the collator cuts them. So steps, their
rows and the point at which a training resumes are those of every other cut. The trainers divide sums over a step's
micro-batches by counts over the step: the cut changes nothing but rounding.

    packed    rows in their order, up to the sum of their tokens
    padded    longest first, which saves padding; rows times the longest of them, as padding is computed too

A row above the budget is a micro-batch of its own. Of several processes, all make as many micro-batches as the one with
most: blank ones follow (tasks/trainer/even_rows.py).
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.process import is_out_of_memory
from smoltulu.tasks.trainer.even_rows import BlankCollator, blank_row, is_blank
from smoltulu.tasks.trainer.waits import of_all_ranks

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer

logger = logging.getLogger("smoltulu")

Row = dict[str, Any]
Batch = dict[str, Any]
_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


# --------------------------------------------------------------------------------------------------------- the cut


def micro_batches(costs: Sequence[int], budget: int, packing: bool) -> list[list[int]]:
    """Places of the rows of each micro-batch. `costs`: tokens of each row, see `row_cost`."""
    made: list[list[int]] = []
    order = range(len(costs)) if packing else sorted(range(len(costs)), key=lambda place: -costs[place])
    for place in order:
        if made and batch_cost([costs[other] for other in (*made[-1], place)], packing) <= budget:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def batch_cost(costs: Sequence[int], packing: bool) -> int:
    """Tokens that the model computes for a micro-batch of rows with these costs, padding included."""
    return sum(costs) if packing else len(costs) * max(costs)


def costliest(costs: Sequence[int], budget: int, most_rows: int, packing: bool) -> list[int]:
    """Places of the rows of the costliest micro-batch that a budget allows, the longest of them first.

    Packed: the longest rows, each that still fits. Padded: rows of such a length that the most places are filled.
    """
    order = sorted(range(len(costs)), key=lambda place: -costs[place])
    if not packing:

        def num_rows(first: int) -> int:
            return max(min(budget // costs[order[first]], most_rows, len(order) - first), 1)

        first = max(range(len(order)), key=lambda first: num_rows(first) * costs[order[first]], default=0)
        return order[first : first + num_rows(first)] if order else []
    chosen: list[int] = []
    for place in order:
        if len(chosen) < most_rows and (not chosen or costs[place] <= budget):
            chosen.append(place)
            budget -= costs[place]
    return chosen


def row_cost(row: Mapping[str, Sequence[int]], packing: bool) -> int:
    """Tokens that the model computes for a row alone."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return _pair_cost(packing, *(len(row[name]) for name in _PAIR))


def _pair_cost(packing: bool, prompt: int, chosen: int, rejected: int) -> int:
    """A packed pair costs its prompt once, a padded one twice its longer side."""
    return prompt + chosen + rejected if packing else 2 * (prompt + max(chosen, rejected))


def row_costs(table: Any, packing: bool) -> list[int]:
    """`row_cost` of every row of an Arrow table or batch, from lengths alone: the tokens stay on disk."""
    import pyarrow.compute as pc

    def lengths(name: str) -> list[int]:
        values: list[int] = pc.list_value_length(table.column(name)).to_pylist()
        return values

    if "input_ids" in table.schema.names:
        return lengths("input_ids")
    return [_pair_cost(packing, *sides) for sides in zip(*map(lengths, _PAIR), strict=True)]


@dataclass(frozen=True)
class TokenBudget:
    """Tokens that a micro-batch may hold on one device."""

    num_tokens: int
    packing: bool

    def cut(self, costs: Sequence[int]) -> list[list[int]]:
        return micro_batches(costs, self.num_tokens, self.packing)


def budget_of(compute: ComputeSettings, costs: Sequence[int]) -> int:
    """Tokens of `compute.tokens_per_device`; auto: those of the `per_device_train_batch_size` costliest rows.

    So auto takes no more memory than fixed rows take at their worst, which is what the dry run of the preflight tries.
    """
    if isinstance(compute.tokens_per_device, int):
        return compute.tokens_per_device
    longest = heapq.nlargest(compute.per_device_train_batch_size, costs)
    return batch_cost(longest, compute.packing) if longest else 1


# ------------------------------------------------------------------------------------------------------ the trainer


@dataclass(frozen=True)
class StepCollator:
    """The rows of an optimizer step -> its micro-batches. Without rows: one blank, which `collate` then makes."""

    collate: Callable[[Sequence[Row]], Batch]
    budget: TokenBudget

    def __call__(self, rows: Sequence[Row]) -> list[Batch]:
        cut = self.budget.cut([row_cost(row, self.budget.packing) for row in rows])
        return [self.collate([rows[place] for place in places]) for places in cut] or [self.collate([])]


class CutStep(list[Batch]):
    """The micro-batches of an optimizer step, and the loss of each, once it is computed."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(batches)
        self.losses: list[torch.Tensor] = []


def token_budget(trainer: Trainer) -> TokenBudget | None:
    """The budget of a trainer that cuts by tokens."""
    return getattr(trainer, "token_budget", None)


def cut_by_tokens(trainer: Trainer, compute: ComputeSettings) -> None:
    """Have a trainer cut its optimizer steps by tokens, where compute asks for it. After `even_out`.

    transformers' loop takes a fixed number of micro-batches a step, here one, which holds those of the cut.
    """
    if not compute.by_tokens:
        return
    from accelerate.utils import send_to_device

    accelerator, dataset = trainer.accelerator, trainer.train_dataset
    is_auto = compute.tokens_per_device == "auto"
    costs = row_costs(dataset.data, compute.packing) if is_auto else ()
    budget = TokenBudget(budget_of(compute, costs), compute.packing)
    trainer.token_budget = budget
    made_of = f" (auto: those of the {compute.per_device_train_batch_size:,} longest rows)" if is_auto else ""
    logger.info("micro-batches of up to %s tokens%s", f"{budget.num_tokens:,}", made_of)
    loader_of_trainer, samples_of_trainer = trainer.get_train_dataloader, trainer.get_batch_samples
    step_of_trainer, flops_of_trainer = trainer.training_step, trainer.floating_point_ops

    def get_train_dataloader() -> DataLoader:
        # The trainer's own collator makes single micro-batches: held-out rows go through it too.
        single = trainer.data_collator
        trainer.data_collator = StepCollator(single, budget)
        try:
            return loader_of_trainer()
        finally:
            trainer.data_collator = single

    @cache
    def blank() -> Batch:
        made: Batch = send_to_device(
            BlankCollator(trainer.data_collator, blank_row(dataset[0]))([]), accelerator.device
        )
        return made

    def with_blanks(batches: list[Batch]) -> list[Batch]:
        """As many micro-batches as the process with most has."""
        most = max(int(count) for (count,) in of_all_ranks(trainer, [len(batches)]))
        return batches + [dict(blank()) for _ in range(most - len(batches))]

    def get_batch_samples(epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[CutStep], Any]:
        assert num_batches <= 1, num_batches
        batches = next(epoch_iterator, None)
        if batches is None:
            return [], None
        batches = with_blanks(batches)
        batches, num_items = samples_of_trainer(iter(batches), len(batches), device)
        return [CutStep(batches)], num_items

    def training_step(model: Any, step: CutStep, *args: Any, **kwargs: Any) -> torch.Tensor:
        for number, batch in enumerate(step, start=1):
            # Gradients of several processes are exchanged once a step.
            with nullcontext() if number == len(step) else accelerator.no_sync(model):
                try:
                    step.losses.append(step_of_trainer(model, batch, *args, **kwargs))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or is_blank(batch):
                        raise
                    if len(batch["row"]) == 1:
                        raise ValueError(_one_row(batch, error)) from error
                    # A budget far above what a step holds would be halved many times before that changed anything.
                    error.num_tokens = batch["input_ids"].numel()  # type: ignore[union-attr]
                    raise
        return sum(step.losses[1:], start=step.losses[0])

    def floating_point_ops(step: CutStep) -> int:
        return sum(map(flops_of_trainer, step))

    trainer.get_train_dataloader, trainer.get_batch_samples = get_train_dataloader, get_batch_samples
    trainer.training_step, trainer.floating_point_ops = training_step, floating_point_ops


def _one_row(batch: Batch, error: Exception) -> str:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"out of memory with one row alone (row {int(batch['row'][0]):,}), which no smaller compute.tokens_per_device "
        "mends; set compute.activation_checkpointing, lower max_length, or take a machine with more memory. The "
        f"checkpoints are kept. It said: {said}"
    )
