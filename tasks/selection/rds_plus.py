"""RDS+ (arXiv 2503.01807): how alike a row is to the nearest of a few target rows.

A row is the mean of its last-layer hidden states, each weighted by its position (1 for the first token), as in SGPT
(arXiv 2202.08904), over the whole row, prompt and answer; the likeness of two rows is the cosine between their means
(hamishivi/automated-instruction-selection, minimal_multitask/compute_influence_cosinesim.py). Their code pools padding
too, and runs one row at a time; here padding has no weight.

From the cosines their code lets the targets choose in turn, each its next best row (get_top_influences.py, max). Here
the score of a row is its greatest cosine. With one target both give the same order; with several, a target that many
rows are like gets more of them here. A row's score then depends on no other row: a new source scores only itself,
scores of sources compare, and a threshold has a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.data import DatasetKind
from smoltulu.tasks.data.rows import COLUMNS, num_rows, open_rows, stored_rows
from smoltulu.tasks.selection.rendering import Renderer
from smoltulu.tasks.selection.scores_file import NO_NUMBER
from smoltulu.tasks.selection.scoring import Batch, Measured, Selector, hidden_states

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5


def pooled(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Each row's weighted mean, of length 1: (rows, hidden) float32. hidden: (tokens, hidden)."""
    import torch

    means = []
    for start, row in zip(batch.starts, batch.rows, strict=True):
        weights = torch.arange(1, len(row.ids) + 1, device=hidden.device, dtype=torch.float32)
        own = hidden[start : start + len(row.ids)].float()
        means.append(weights @ own / weights.sum())
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def likeness(targets: torch.Tensor) -> Callable[[Selector, Batch], list[Measured]]:
    """Score of a row: its greatest cosine with a target. targets: (targets, hidden), each of length 1."""

    def measure(selector: Selector, batch: Batch) -> list[Measured]:
        cosines = pooled(hidden_states(selector, batch), batch) @ targets.T
        return [
            Measured(score=score) if math.isfinite(score) else Measured(problem=NO_NUMBER)
            for score in cosines.max(dim=1).values.tolist()
        ]

    return measure


def embedded(selector: Selector, tokenizer: PreTrainedTokenizerBase, targets: Path, max_length: int) -> torch.Tensor:
    """The rows of the target set, pooled: (targets, hidden).

    Raises:
        ValueError: a target cannot be rendered, is longer than `max_length`, or gives no number. A target that is left
            out in silence would be a selection for something else.
    """
    import torch

    kind = kind_of(targets)
    rows = Renderer(tokenizer, kind, max_length)(enumerate(stored_rows(targets)))
    if refused := [f"{row.id} ({row.problem})" for row in rows if row.problem]:
        raise ValueError(
            f"selection.targets: {len(refused):,} of {len(rows):,} targets cannot be used: "
            f"{', '.join(refused[:_SHOWN])}{', ...' if len(refused) > _SHOWN else ''}; leave them out, or raise "
            f"selection.max_length ({max_length:,} tokens)"
        )
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in selector.batches(rows):
            found |= zip([row.row for row in batch.rows], pooled(hidden_states(selector, batch), batch), strict=True)
    made = torch.stack([found[row.row] for row in rows])
    if broken := [row.id for row in rows if not bool(torch.isfinite(found[row.row]).all())]:
        raise ValueError(
            f"selection.targets: the selector model gives no number for targets {', '.join(broken[:_SHOWN])}; look at "
            "them, or choose another selection.model"
        )
    return made


def kind_of(file: Path) -> DatasetKind:
    """Which kind of rows a rows file holds. ValueError as `open_rows`, and for texts, which are no conversations."""
    with open_rows(file) as opened:
        names = set(opened.schema_arrow.names)
    kinds: tuple[DatasetKind, ...] = ("sft", "preference", "rlvr")
    for kind in kinds:
        if set(COLUMNS[kind]) <= names and "origins" not in names:
            return kind
    raise ValueError(f"{file}: rows of texts, which are no conversations; give rows of sft, preference or rlvr")


def check_targets(targets: Path, hits_folder: Path | None) -> None:
    """ValueError where there is no target, or one is in a benchmark.

    hits_folder  artifact of the stage `contamination` for the targets, policy `report`; None: there are no benchmarks
    """
    if num_rows(targets) == 0:
        raise ValueError("selection.targets has no row; give a few rows that the kept ones are to be like")
    if hits_folder is None:
        return
    from pyarrow import parquet

    file = hits_folder / "hits.parquet"
    if not file.is_file():
        raise ValueError(f"{hits_folder}: no artifact of the contamination check (hits.parquet is missing)")
    hits = parquet.read_table(file, columns=["row_id", "benchmark"]).to_pydict()
    if not hits["row_id"]:
        return
    found: dict[str, set[str]] = {}
    for row_id, benchmark in zip(hits["row_id"], hits["benchmark"], strict=True):
        found.setdefault(row_id, set()).add(benchmark)
    shown = "; ".join(f"row {row_id}: {', '.join(sorted(names))}" for row_id, names in list(found.items())[:_SHOWN])
    raise ValueError(
        f"selection.targets: {len(found):,} of {num_rows(targets):,} targets are in a benchmark that the recipe checks "
        f"against ({shown}{'; ...' if len(found) > _SHOWN else ''}): rows chosen for being like them would be chosen "
        "for the test; take targets from elsewhere"
    )
