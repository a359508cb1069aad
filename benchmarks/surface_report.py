"""How long the page of a sweep takes: `python benchmarks/surface_report.py`. Its cells are planted, nothing is trained.

9 learning rates x 6 batches x 6 seeds x 3 budgets, 972 cells, each measured on 8 tasks of 100 items; and the status of
10,000 cells without scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from smoltulu.flows.sweeping.gather import gather
from smoltulu.flows.sweeping.overview import status_of
from smoltulu.flows.sweeping.results import export_table, recommend, write_page
from smoltulu.flows.sweeping.states import CellRecord, sweep_folder, write_outcome
from smoltulu.schemas.sweep import SweepSettings, places
from tests.hand_store import HandStore
from tests.planted_sweep import parabola, plant, settings


def sweep(num_seeds: int, num_tasks: int) -> SweepSettings:
    """The planted sweep."""
    block = {
        "name": "main",
        "log2_learning_rate": {"low": -16, "high": -8},
        "log2_batch": {"low": 2, "high": 7},
        "seeds": list(range(num_seeds)),
        "max_tokens": [1 << 22, 1 << 24, 1 << 26],
    }
    return settings(num_tasks, blocks=[block])


def sweep_of_many() -> SweepSettings:
    """10,000 cells."""
    axes = {"log2_learning_rate": {"low": -16, "high": -7}, "log2_batch": {"low": 0, "high": 9}}
    block = {"name": "main", **axes, "seeds": list(range(20)), "max_tokens": [1 << n for n in range(10, 15)]}
    return settings(1, blocks=[block])


def plant_states(root: Path, asked: SweepSettings) -> None:
    """Cells without scores: the first half done; of the others a tenth failed, and a tenth diverged."""
    store, folder = HandStore(root), sweep_folder(root, asked.name)
    (folder / "outcomes").mkdir(parents=True)
    records = []
    for number, (place, block) in enumerate(places(asked).items()):
        is_done = number < 5_000
        add = store.make if is_done else store.begin
        training, evaluation = add("sft", f"sft {number}"), add("evaluation", f"evaluation {number}")
        keys = {"training": training.key, "evaluation": evaluation.key}
        records.append(CellRecord(place=place, block=block, stage="sft", **keys))
        if not is_done and number % 10 < 2:
            write_outcome(folder, records[-1], "diverged" if number % 10 else "failed", "loss is nan")
    (folder / "cells.json").write_text(json.dumps([one.model_dump() for one in records]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--items", type=int, default=100)
    given = parser.parse_args()
    asked = sweep(given.seeds, given.tasks)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        plant(root, asked, parabola(gamma=-0.2), num_items=given.items)
        many, other = sweep_of_many(), Path(folder) / "many" / "store"
        plant_states(other, many)
        steps = {
            "read the scores": lambda: gather(asked, root),
            "analyse them": gather(asked, root).analyses,
            "page, figures and tables": lambda: write_page(asked, root),
            "page, figures and tables, again": lambda: write_page(asked, root),
            "recommend": lambda: recommend(asked, root, None),
            "export": lambda: export_table(asked, root, Path(folder) / "cells.parquet"),
            "status of 10,000 cells": lambda: status_of(many, other),
        }
        print("| step | seconds | CPU seconds |\n|---|---:|---:|")
        for name, step in steps.items():
            began, cpu = time.monotonic(), time.process_time()
            step()
            print(f"| {name} | {time.monotonic() - began:.1f} | {time.process_time() - cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
