"""The tables of a sweep: a row for every cell and task, and a row for every optimum, as Parquet or CSV."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from smoltulu.flows.sweeping.gather import Gathered, training_of
from smoltulu.tasks.surface.analysis import Analysis
from smoltulu.tasks.surface.panels import ridge_half_widths

#: Forms that a table is written in.
SUFFIXES = (".parquet", ".csv")
#: Columns of the table, with their types in Parquet.
CELL_COLUMNS = {
    "cell": "string", "block": "string", "state": "string", "task": "string", "metric": "string",
    "task_class": "string", "arm": "string", "size": "string", "num_parameters": "int64",
    "log2_learning_rate": "float64", "learning_rate": "float64", "log2_batch": "float64",
    "effective_batch_rows": "int64", "effective_batch_tokens": "float64", "max_tokens": "int64", "seed": "int64",
    "weight_decay": "float64", "reduction": "string", "num_steps": "int64", "num_tokens": "int64",
    "mean": "float64", "stderr": "float64", "num_items": "int64", "chance": "float64", "lower_is_better": "bool",
    "message": "string",
}  # fmt: skip
OPTIMUM_COLUMNS = {
    "arm": "string", "task": "string", "metric": "string", "task_class": "string", "log2_batch": "float64",
    "log2_tokens": "float64", "log2_parameters": "float64", "log2_best_learning_rate": "float64", "stderr": "float64",
    "low": "float64", "high": "float64", "by_gaussian_process": "float64", "curvature": "float64", "num_seeds": "int64",
    "flaw": "string",
}  # fmt: skip


def cell_rows(found: Gathered) -> list[dict[str, Any]]:
    """A row for every cell and task, in the order of the cells. Values that are not there are None."""
    measured: dict[tuple[str, str, str], tuple[float | None, float | None, int | None]] = {}
    for scores in found.scores.values():
        for one in scores:
            num_items = one.cells.items.shape[1]
            errors = one.cells.items.std(axis=1, ddof=1) / math.sqrt(num_items) if num_items > 1 else None
            for number, record in enumerate(one.of):
                if math.isfinite(mean := float(one.means[number])):
                    stderr = None if errors is None else float(errors[number])
                    measured[record.place.name, one.task.task, one.task.metric] = (mean, stderr, num_items)
    rows = []
    for cell in found.cells:
        place, training = cell.place, training_of(found.store_root, cell)
        own = {
            "cell": place.name, "block": cell.block, "state": cell.state, "arm": place.arm, "size": place.size,
            "num_parameters": found.sweep.sizes[place.size].num_parameters,
            "log2_learning_rate": place.log2_learning_rate, "learning_rate": place.learning_rate,
            "log2_batch": place.log2_batch, "effective_batch_rows": place.effective_batch_size,
            "effective_batch_tokens": training.tokens_a_step, "max_tokens": place.max_tokens, "seed": place.seed,
            "weight_decay": training.weight_decay, "reduction": training.reduction, "num_steps": training.num_steps,
            "num_tokens": training.num_tokens, "message": cell.message or None,
        }  # fmt: skip
        for task in found.sweep.tasks:
            scored = measured.get((place.name, task.task, task.metric), (None, None, None))
            of_task = dict(zip(("mean", "stderr", "num_items"), scored, strict=True)) | {
                "task": task.task, "metric": task.metric, "task_class": task.task_class, "chance": task.chance,
                "lower_is_better": task.lower_is_better,
            }  # fmt: skip
            rows.append(own | of_task)
    return rows


def optimum_rows(found: Gathered, analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """A row for every optimum: what the ridges of the figures show."""
    rows = []
    for analysis in analyses:
        for one in analysis.tasks:
            half = ridge_half_widths(one.found)
            for number, best in enumerate(one.found.optima):
                rows.append({
                    "arm": analysis.arm, "task": one.task.task, "metric": one.task.metric,
                    "task_class": one.task.task_class, "log2_batch": best.log2_batch, "log2_tokens": best.log2_tokens,
                    "log2_parameters": best.log2_size, "log2_best_learning_rate": best.log2_lr, "stderr": best.stderr,
                    "low": best.log2_lr - half[number], "high": best.log2_lr + half[number],
                    "by_gaussian_process": one.checks[number], "curvature": one.found.curvature[number],
                    "num_seeds": best.num_seeds, "flaw": best.flaw or None,
                })  # fmt: skip
    return rows


def table_bytes(rows: Sequence[Mapping[str, Any]], suffix: str, columns: Mapping[str, str] = CELL_COLUMNS) -> bytes:
    """A table as the bytes of a file. `suffix`: one of `SUFFIXES`; `columns`: name -> type."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    schema = pa.schema([(name, getattr(pa, "bool_" if kind == "bool" else kind)()) for name, kind in columns.items()])

    def value(row: Mapping[str, Any], name: str) -> Any:
        one = row.get(name)
        return None if isinstance(one, float) and not math.isfinite(one) else one

    table = pa.Table.from_pydict({name: [value(row, name) for row in rows] for name in columns}, schema=schema)
    buffer = io.BytesIO()
    if suffix == ".csv":
        csv.write_csv(table, buffer)
    else:
        parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
