"""A sweep whose cells are there already, written by hand: scores follow from a planted surface."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from smoltulu.artifacts.manifests import Ref
from smoltulu.flows.sweeping.states import CellRecord, sweep_folder, write_outcome
from smoltulu.schemas.sweep import Place, SweepSettings, places
from smoltulu.tasks.evaluation.samples import write_samples
from tests.hand_store import HandStore

#: Score of a task at a place, as the metric is spelt; None: the cell diverged; "failed", "pending": it has none.
Surface = Callable[[str, Place], float | str | None]


def settings(num_tasks: int = 2, **changes: Any) -> SweepSettings:
    """A surface of 6 rates x 3 batches x 3 seeds at one budget and the same at a second; half of the tasks a class."""
    block = {
        "name": "main",
        "log2_learning_rate": {"low": -15, "high": -10},
        "log2_batch": {"low": 3, "high": 5},
        "seeds": [0, 1, 2],
        "max_tokens": [1 << 14, 1 << 16],
    }
    tasks = [
        {"task": f"task_{n}", "metric": "acc,none", "task_class": "reasoning" if n % 2 == 0 else "pattern"}
        for n in range(num_tasks)
    ]
    values = {"name": "planted", "recipe": "tiny", "stage": "sft", "blocks": [block], "tasks": tasks}
    return SweepSettings.model_validate(values | changes)


def parabola(alpha: float = 0.5, gamma: float = 0.0, curvature: float = -0.1) -> Surface:
    """Highest at log2 LR = -12 + alpha (log2 batch - 4) + gamma (log2 tokens - 15); odd tasks an octave lower."""

    def score(task: str, place: Place) -> float:
        best = -12 + alpha * (place.log2_batch - 4) + gamma * (math.log2(place.max_tokens) - 15)
        best -= int(task.rpartition("_")[2]) % 2 if task[-1].isdigit() else 0
        return 1 + curvature * (place.log2_learning_rate - best) ** 2

    return score


def plant(
    root: Path,
    sweep: SweepSettings,
    surface: Surface,
    num_items: int = 8,
    noise: float = 0.01,
    seed: int = 0,
    details: dict[str, Any] | None = None,
    rows_of: Callable[[HandStore, Place], Ref] | None = None,
) -> HandStore:
    """Write trainings, evaluations and the sweep's own record. Items differ by more than seeds do.

    details  of the scores
    rows_of  makes the tokenised rows of a cell
    """
    store = HandStore(root)
    folder = sweep_folder(root, sweep.name)
    (folder / "outcomes").mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    levels = draws.normal(0, 0.2, num_items)
    records = []
    for place, block in places(sweep).items():
        values = {task: surface(task.task, place) for task in sweep.tasks}
        first = next(iter(values.values()))
        trained = store.begin("sft", f"sft {place.name}")
        measured = store.begin("evaluation", f"evaluation {place.name}")
        record = CellRecord(place=place, block=block, stage="sft", training=trained.key, evaluation=measured.key)
        records.append(record)
        if first == "pending":
            continue
        if first is None or first == "failed":
            state = "diverged" if first is None else "failed"
            write_outcome(folder, record, state, "loss is nan" if first is None else "the disk is full")
            continue
        tokens_a_step = 64 * place.effective_batch_size
        num_steps = max(place.max_tokens // tokens_a_step, 1)
        model = store.make(
            "sft", f"sft {place.name}", weight_decay=0.0,
            inputs={} if rows_of is None else {"dataset": rows_of(store, place)},
            outputs={"num_parameters": 1000, "num_steps": num_steps, "num_tokens": num_steps * tokens_a_step},
        )  # fmt: skip
        rows, scores = [], []
        entry_of = {task: number for number, task in enumerate(dict.fromkeys(one.task for one in sweep.tasks))}
        luck = noise * draws.normal(size=len(entry_of))
        for name, entry in entry_of.items():
            of_name = {
                task.metric.partition(",")[0]: float(value) for task, value in values.items() if task.task == name
            }  # type: ignore[arg-type]
            headline = next(task.metric for task in sweep.tasks if task.task == name)
            for item in range(num_items):
                metrics = {
                    metric: value + luck[entry] + levels[item] + noise * float(draws.normal())
                    for metric, value in of_name.items()
                }
                rows.append({
                    "task": name, "entry": entry, "id": str(item), "doc_hash": f"d{item}", "target_hash": f"t{item}",
                    "filter": headline.partition(",")[2], "metrics": metrics,
                    "prompt": "why " * 40, "completion": "so " * 40,
                })  # fmt: skip
            scores.append({
                "task": name, "metric": headline, "value": 0.5, "num_samples": num_items, "harness": "h",
                "task_version": "1", "template_digest": "t", "details": details or {},
            })  # fmt: skip
        made = store.make(
            "evaluation", f"evaluation {place.name}",
            outputs={"subject": "sft", "scores": scores, "samples_file": "samples.parquet"},
            inputs={"model": model},
        )  # fmt: skip
        records[-1] = record = record.model_copy(update={"training": model.key, "evaluation": made.key})
        write_samples(store.folder(made) / "gen-0001" / "samples.parquet", rows)
    (folder / "cells.json").write_bytes(TypeAdapter(tuple[CellRecord, ...]).dump_json(tuple(records)))
    return store
