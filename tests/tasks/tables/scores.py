"""Models with scores and items, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smoltulu.schemas.evaluation import Score
from smoltulu.tasks.comparison.evaluations import Item, Measured
from smoltulu.tasks.tables.values import MeasuredModel


def score(task: str = "paper_piqa", metric: str = "acc_norm,none", value: float = 0.5, **changes: Any) -> Score:
    fixed: dict[str, Any] = {
        "stderr": 0.01, "num_samples": 1838, "num_fewshot": 0, "harness": "lm-eval 0.4.13", "task_version": "1.0",
        "template_digest": "ab" * 32,
    }  # fmt: skip
    return Score.model_validate({"task": task, "metric": metric, "value": value} | fixed | changes)


def right(num_right: int, num_items: int = 40, **changes: Any) -> Measured:
    """The first `num_right` items are right."""
    made = score(value=num_right / num_items, num_samples=num_items, **changes)
    return Measured(made, {f"d{i}": Item(float(i < num_right), "p") for i in range(num_items)})


def model(label: str, *scores: Score | Measured, subject: str = "sft", **changes: Any) -> MeasuredModel:
    values = [one.score if isinstance(one, Measured) else one for one in scores]
    items = {one.score.task: one for one in scores if isinstance(one, Measured)}
    fixed: dict[str, Any] = {"kind": "language_model", "precision": "bfloat16", "max_length": 2048}
    return MeasuredModel(label=label, subject=subject, scores=tuple(values), items=items, **fixed | changes)


def texts(cells: Sequence[Any]) -> list[str | None]:
    return [None if cell is None else cell.value for cell in cells]
