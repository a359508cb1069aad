"""Weights of rows, or of their turns and steps, in the loss of SFT.

The loss of an optimizer step is sum_t w_t CE_t / sum_t w_t over the supervised tokens t of all its micro-batches and
processes: the weights are normalised to mean 1 over these tokens, and the rest is the unweighted loss. So equal
weights, whatever they are, give the unweighted loss bit for bit, and neither cut, packing nor number of processes
changes a step beyond rounding. It follows that only ratios *within* a step count: in a step of one row, a row weight
changes nothing.

A token of weight 0 is not supervised: it counts neither in the mean nor in the metrics. A row all of whose supervised
tokens have weight 0 leaves its batch and is not computed: the step is that of the other rows, bit for bit where these
lie in the same micro-batches. A step without any weight is passed over: no parameter moves, Adam's moments neither.

weights.parquet (the stage `selection` writes it), one line a row of the rows file that the preflight read:
  row         int64, number in that rows file
  num_tokens  int32, of the rendered row, before it is cut
  weight      float64, of its tokens outside of spans
  spans       list<struct<first int32, last int32, weight float64>>, weights of the tokens [first, last); in order,
              none over another
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.tokens import IGNORED
from smoltulu.tasks.trainer.even_rows import BLANK, blank_row

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback

logger = logging.getLogger("smoltulu")
#: Key of a batch: the weight of each label, (B, T).
WEIGHTS = "weights"
#: No sum of weights overflows.
_MAX_WEIGHT = 1e100


# ---------------------------------------------------------------------------------------------------------- the file


def with_weights(rows: Dataset, file: str, max_length: int) -> Dataset:
    """Tokenised rows with the columns `weight` and `spans` of their lines in a weights file.

    ValueError where the file is malformed, has a weight that is negative or no number, is of another row set, or has
    no weight above 0 on a supervised token.
    """
    import numpy as np
    import pyarrow.compute as pc
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    table = read_weights(file)
    numbers, known = rows.data.column("row").to_numpy(), table["row"].to_numpy()
    order = np.argsort(known)
    lines = order[np.searchsorted(known[order], numbers).clip(max=len(known) - 1)]
    without = known[lines] != numbers
    if without.any():
        raise _of_another_set(file, f"there is none of row {numbers[without][0]:,}")
    lengths = pc.list_value_length(rows.data.column("input_ids")).to_numpy()
    rendered = table["num_tokens"].to_numpy()[lines]
    wrong = np.flatnonzero(lengths != rendered.clip(max=max_length))
    if len(wrong):
        row, there, said = numbers[wrong[0]], lengths[wrong[0]], rendered[wrong[0]]
        raise _of_another_set(file, f"row {row:,} has {there:,} tokens (max_length {max_length:,}), there {said:,}")
    joined = table.select(["weight", "spans"]).take(lines)
    together = concatenate_datasets([rows, Dataset(InMemoryTable(joined))], axis=1)
    if not any(any(token_weights(row)) for row in together):  # ends at the first row with a weight
        raise ValueError(
            f"{file}: no supervised token of any row has a weight above 0, so nothing would be trained; give weights "
            "to tokens that the assistant says"
        )
    return together


def read_weights(file: str) -> pa.Table:
    """The table of a weights file. ValueError names the first line that is not as this module's head says."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    span = pa.struct([("first", pa.int32()), ("last", pa.int32()), ("weight", pa.float64())])
    schema = pa.schema(
        [("row", pa.int64()), ("num_tokens", pa.int32()), ("weight", pa.float64()), ("spans", pa.list_(span))]
    )
    try:
        table = parquet.read_table(file, columns=schema.names).select(schema.names).cast(schema).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is no weights file, whose columns are {', '.join(map(str, schema))}: {error}"
        ) from None
    # Spans one below the other, and the line of each.
    spans = table["spans"].combine_chunks()
    line = pc.list_parent_indices(spans).to_numpy()
    parts = [pc.struct_field(spans.flatten(), name) for name in ("first", "last", "weight")]
    if not len(table) or any(column.null_count for column in [*table.columns, spans.flatten(), *parts]):
        raise ValueError(f"{file} is no weights file: it has no line, or a value is missing in it")
    rows, num_tokens, of_rows = (table[name].to_numpy() for name in ("row", "num_tokens", "weight"))
    first, last, of_spans = (part.to_numpy(zero_copy_only=False) for part in parts)
    different, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{file} has {counts.max():,} lines of row {different[counts.argmax()]:,}; allowed is one a row"
        )
    for numbers, weights in ((rows, of_rows), (rows[line], of_spans)):
        wrong = np.flatnonzero(~((weights >= 0) & (weights <= _MAX_WEIGHT)))
        if len(wrong):
            raise ValueError(
                f"{file}: row {numbers[wrong[0]]:,} has the weight {weights[wrong[0]]}; allowed are numbers from 0 to "
                f"{_MAX_WEIGHT:g}, and 0 leaves the row out"
            )
    same_row = np.append(False, line[1:] == line[:-1])[: len(line)]
    end_before = np.where(same_row, np.append(0, last[:-1])[: len(line)], 0)
    wrong = np.flatnonzero((first < end_before) | (first >= last) | (last > num_tokens[line]))
    if len(wrong):
        one = wrong[0]
        raise ValueError(
            f"{file}: row {rows[line[one]]:,} of {num_tokens[line[one]]:,} tokens has a span of its tokens "
            f"[{first[one]:,}, {last[one]:,}); allowed are spans inside of the row, in order, none over another"
        )
    if not of_rows.any() and not of_spans.any():
        raise ValueError(f"{file}: every weight is 0, so there is nothing to train on; give some row a weight above 0")
    return table


def _of_another_set(file: str, what: str) -> ValueError:
    return ValueError(
        f"{file}: weights of another row set: {what}. They must be of the rows file that the preflight read; make "
        "them again (refresh the stage that wrote them)"
    )


# ----------------------------------------------------------------------------------------------------------- batches


def token_weights(row: dict[str, Any]) -> list[float]:
    """The weight of each label of a row, cut or whole; 0 where it is not supervised: (T,).

    The first token has no prediction. Tokens that a cut took are gone from the spans as from the row.
    """
    weights = [row["weight"]] * len(row["labels"])
    for span in row["spans"]:
        first, last = span["first"], min(span["last"], len(weights))
        weights[first:last] = [span["weight"]] * (last - first)
    supervised = (False, *(label != IGNORED for label in row["labels"][1:]))
    return [weight if counts else 0.0 for weight, counts in zip(weights, supervised, strict=True)]


@dataclass(frozen=True)
class WeightedCollator:
    """A collator whose batches also hold `weights` (B, T) in float64, and no row or label whose weight is 0.

    A batch without any weight becomes a blank one (tasks/trainer/even_rows.py). Rows without the columns of
    `with_weights` are held-out ones, which count alike.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        if "weight" not in rows[0]:
            return self.collate(rows)
        kept, weights = [], []
        for row in rows:
            of_row = token_weights(row)
            if any(of_row):
                labels = [label if weight else IGNORED for label, weight in zip(row["labels"], of_row, strict=True)]
                kept.append(row | {"labels": labels})
                weights += [weight for weight in of_row if weight]
        batch = self.collate(kept or [blank_row(rows[0])])
        # Padded or end to end, the supervised labels stand in the order of the rows.
        batch[WEIGHTS] = torch.zeros(batch["labels"].shape, dtype=torch.float64)
        batch[WEIGHTS][batch["labels"] != IGNORED] = torch.tensor(weights, dtype=torch.float64)
        return batch if kept else {**batch, BLANK: True}


# -------------------------------------------------------------------------------------------------------- the trainer


def normalise(batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> torch.Tensor:
    """Scale the weights of an optimizer step's micro-batches to mean 1 over the supervised tokens of all processes.

    In float64, then float32: of equal weights every one is exactly 1. Returns the number of these tokens, float64.
    """
    import torch

    sums = torch.stack([batch[WEIGHTS].sum() for batch in batches]).sum()
    counts = torch.stack([batch[WEIGHTS].count_nonzero() for batch in batches]).sum()
    total, count = accelerator.reduce(torch.stack([sums, counts.to(sums.dtype)]), "sum")
    mean = torch.where(count > 0, total / count, 1.0)
    for batch in batches:
        batch[WEIGHTS] = (batch[WEIGHTS] / mean).float()
    return count


def pass_over_steps_without_weight(trainer: Trainer) -> TrainerCallback:
    """A callback: where no token of an optimizer step has a weight, no parameter has a gradient, so none moves.

    With gradients of 0, Adam would still move on by its momentum and decay. `trainer.num_weighted_tokens`: of the step,
    an int: a number on the device would have to be waited for.
    """
    from transformers import TrainerCallback

    class PassOver(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.num_weighted_tokens == 0:
                trainer.model.zero_grad(set_to_none=True)
                logger.warning("step %s: every weight is 0, so it moves nothing", f"{state.global_step + 1:,}")

    return PassOver()
