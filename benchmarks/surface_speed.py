"""Cells per hour of the sweep `surface-tiny`: in warm workers, in a loop that starts a script per cell, in one process.

All three train the same cells from the same base for the same number of optimizer steps, and measure the same 800
questions. What cells share (world, base, tokens) and the start of the flow are not in our times: a sweep pays once. The
loops are `surface_peers/trl_cell.py`; each has all cores, and one cell at a time. A script tokenises the rows for its
cell, the loop inside one process once: that is in the time of its first cell.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoltulu.artifacts.layout import read_pointer
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.engine import SweepRun
from smoltulu.flows.sweeping.grid import load_sweep
from smoltulu.flows.sweeping.local import run_here
from smoltulu.flows.sweeping.scores import load_scores
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.sweep import LogRange, SweepBlock, SweepSettings

_PEER = Path(__file__).parent / "surface_peers" / "trl_cell.py"
_LOG = logging.getLogger("benchmark")


def slice_of(name: str, folder: Path, blocks: tuple[SweepBlock, ...], **overrides: Any) -> SweepSettings:
    """A shipped sweep with other blocks and a store of its own, as a scan."""
    sweep = load_sweep(name)
    own = {"compute.store": str(folder / "store")} | overrides
    return sweep.model_copy(
        update={
            "name": f"{name}-slice", "kind": "scan", "blocks": blocks, "max_edge_cells": 0,
            "overrides": sweep.overrides | own,
        }
    )  # fmt: skip


def run_slice(sweep: SweepSettings) -> tuple[SweepRun, float]:
    """Run what is missing. Returns the run and its seconds. RuntimeError where a cell failed."""
    run = SweepRun(sweep, sweep.name, _LOG)
    began = time.monotonic()
    state = run_here(run, _LOG, lambda: "")
    seconds = time.monotonic() - began
    if state != "Completed":
        raise RuntimeError("; ".join(one.message for one in run.states() if one.message))
    return run, seconds


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[what] = time.monotonic() - began


def speed(folder: Path, num_rates: int) -> None:
    """Print cells per hour of `num_rates` learning rates x 4 batches at T."""
    whole = load_sweep("surface-tiny").blocks[0]
    low = -12

    def block(seed: int, rates: int) -> SweepBlock:
        exponents = LogRange(low=low, high=low + rates - 1)
        return whole.model_copy(update={"name": f"s{seed}", "log2_learning_rate": exponents, "seeds": (seed,)})

    # One cell of another seed first: it makes what all share, and starts the warm processes.
    first = block(9, 1).model_copy(update={"log2_batch": LogRange(low=5, high=5)})
    warm, _ = run_slice(slice_of("surface-tiny", folder, (first,)))
    seed = time.time_ns() % 1_000_000 + 10  # cells that no earlier run of this benchmark made
    sweep = slice_of("surface-tiny", folder, (first, block(seed, num_rates)))
    seconds: dict[str, float] = {}
    run, seconds["warm workers, two at a time"] = run_slice(sweep)
    made = [one for one in run.states() if one.cell.place.seed == seed]
    cells = []
    for one in made:
        outputs = _manifest(run.store_root / "sft" / one.cell.training).outputs
        place = one.cell.place
        cells.append({
            "learning_rate": place.learning_rate, "batch": place.effective_batch_size, "seed": place.seed,
            "num_steps": outputs["num_steps"],
        })  # fmt: skip
    graph = warm.cells[0].graph
    world = _folder(run.store_root / "world" / graph.key("world"))
    base = _folder(run.store_root / "base_model" / graph.key("base-model"))
    job = {
        "model": str(base / "model"), "rows": str(world / "skills.jsonl"), "items": str(world / "eval_skills.jsonl"),
        "template": (CHAT_TEMPLATES / "tulu.jinja").read_text(), "cells": cells, "num_threads": os.cpu_count(),
    }  # fmt: skip
    with _timed(seconds, "a TRL script per cell"):
        for cell in cells:
            _peer(job | {"cells": [cell]}, folder)
    loop = _peer(job, folder)
    seconds["a loop inside one process"] = sum(loop["seconds"])

    ours = seconds["warm workers, two at a time"]
    print(f"{len(cells)} cells, {os.cpu_count()} cores\n")
    print("| way | seconds | cells an hour | times as fast as it |\n|---|---:|---:|---:|")
    for way, spent in seconds.items():
        print(f"| {way} | {spent:.0f} | {3600 * len(cells) / spent:.0f} | {spent / ours:.2f} |")
    print(f"\nscores of the first cell, loop: {json.dumps(loop['scores'][0])}")


def slice_135m(folder: Path) -> None:
    """The smallest slice of `surface-135m-short` that trains and measures: 3 rates x 16k tokens. Prints its scores."""
    tasks = [task | {"limit": 15} for task in load_sweep("surface-135m-short").overrides["evaluation.tasks"]]
    exponents = LogRange(low=-14, high=-10, step=2)
    block = SweepBlock(
        name="slice", log2_learning_rate=exponents, log2_batch=LogRange(low=4, high=4), seeds=(0,), max_tokens=(16_384,)
    )
    sweep = slice_of("surface-135m-short", folder, (block,)).model_copy(update={"num_workers": 1})
    own = {"evaluation.tasks": tasks, "compute.per_device_train_batch_size": 4, "sft.max_length": 256}
    sweep = sweep.model_copy(update={"overrides": sweep.overrides | own})
    run, seconds = run_slice(sweep)
    print(f"{run.counted()}; {seconds:.0f} s, with what cells share\n")
    scores = load_scores(sweep, run.store_root, run.states())
    print("| log2 rate | " + " | ".join(f"{one.task.task} {one.task.metric.split(',')[0]}" for one in scores) + " |")
    print("|---:|" + "---:|" * len(scores))
    for position, cell in enumerate(scores[0].of):
        values = " | ".join(f"{one.means[position]:.3f}" for one in scores)
        print(f"| {cell.place.log2_learning_rate:g} | {values} |")


def _peer(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, str(_PEER), str(file)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _folder(key: Path) -> Path:
    pointer = read_pointer(key)
    assert pointer is not None, key
    return key / pointer.name


def _manifest(key: Path) -> Any:
    return read_manifest(_folder(key))
