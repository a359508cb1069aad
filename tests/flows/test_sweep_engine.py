"""A run of a sweep around its cells: order, number at a time, what is written down, edges. Nothing is trained here."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.flows.sweeping.engine import Made, References, SweepRun
from smoltulu.flows.sweeping.extension import FILE, add
from smoltulu.flows.sweeping.grid import SweepCell, load_sweep
from smoltulu.flows.sweeping.states import counts_of, states_of, sweep_folder
from smoltulu.schemas.artifact import ArtifactReference, Spec
from smoltulu.schemas.run import RunRecord
from tests.flows.test_sweep import BLOCK, SMALL, SWEEP, evaluate
from tests.hand_store import HandStore

LOG = logging.getLogger("test-sweep")
SIX = BLOCK | {"seeds": [0, 1, 2]}


def asked(store: Path, **changes: Any) -> Any:
    overrides = SMALL | {"compute.store": str(store)} | changes.pop("overrides", {})
    return load_sweep(SWEEP | {"blocks": [SIX], "overrides": overrides} | changes)


def reference(cell: SweepCell, node: str) -> ArtifactReference:
    stage = cell.graph.nodes[node].stage.name
    return ArtifactReference(stage=stage, node=node, key=cell.graph.key(node), digest="d", path="p")


class Pool:
    """Cells that end as they are told to: `diverges` and `fails` by name, everything else is made."""

    def __init__(self, **ends: str) -> None:
        self.ends, self.started = {name.replace("__", "-"): end for name, end in ends.items()}, list[str]()
        self.most_at_a_time = self._running = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(8)

    def __call__(self, cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Future[Made]:
        return self._pool.submit(self._make, cell, nodes)

    def _make(self, cell: SweepCell, nodes: tuple[str, ...]) -> Made:
        name = nodes[0] if nodes[0] in cell.shared_nodes else cell.place.name
        with self._lock:
            self.started.append(name)
            self._running += 1
            self.most_at_a_time = max(self.most_at_a_time, self._running)
        time.sleep(0.02)
        with self._lock:
            self._running -= 1
        if self.ends.get(name) == "fails":
            raise RuntimeError("the disk is full; free some")
        if self.ends.get(name) == "diverges":
            return Made({}, diverged="loss is nan")
        return Made({node: reference(cell, node) for node in nodes})


def test_so_many_cells_at_a_time_in_the_order_of_the_grid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(**{"lr-9-b3-t2000-s1": "fails", "lr-8-b3-t2000-s2": "diverges"})
    run = SweepRun(asked(tmp_path / "store", num_workers=3), "small", LOG)
    with caplog.at_level(logging.INFO, "test-sweep"):
        state = run.run(pool)
    run.end(state)
    names = [cell.place.name for cell in run.cells]
    shared = list(run.cells[0].shared_nodes)
    assert pool.started[: len(shared)] == shared, "once, before any cell"
    assert sorted(pool.started[len(shared) :]) == sorted(names) and pool.most_at_a_time == 3
    assert state == "Failed", "one cell failed; the others ran all the same"
    told = [text for text in caplog.messages if ": failed" in text or ": diverged" in text]
    assert any(text.startswith("lr-9-b3-t2000-s1: failed (the disk is full)") for text in told)
    assert any(text.startswith("lr-8-b3-t2000-s2: diverged (loss is nan)") for text in told)
    assert caplog.messages[-1].endswith("; 4 done, 1 diverged, 1 failed, 0 to go")
    # What was written down: a stub made no artifacts, so the others wait in the store.
    assert counts_of(run.states()) == {"done": 0, "diverged": 1, "running": 0, "pending": 4, "failed": 1}


def test_a_diverged_cell_is_a_result_and_a_failed_one_runs_again(tmp_path: Path) -> None:
    ends = {"lr-9-b3-t2000-s1": "fails", "lr-8-b3-t2000-s2": "diverges"}
    first = SweepRun(asked(tmp_path / "store"), "small", LOG)
    first.end(first.run(Pool(**ends)))
    pool = Pool()
    second = SweepRun(asked(tmp_path / "store"), "small", LOG)
    assert second.run(pool) == "Completed"
    assert "lr-9-b3-t2000-s1" in pool.started and "lr-8-b3-t2000-s2" not in pool.started


def test_what_cells_share_and_cannot_be_made_fails_all_of_them(tmp_path: Path) -> None:
    run = SweepRun(asked(tmp_path / "store"), "small", LOG)
    pool = Pool(preflight__sft="fails")
    pool.ends = {"preflight-sft": "fails"}
    assert run.run(pool) == "Failed"
    assert pool.started.count("preflight-sft") == 1 and not any(name.startswith("lr") for name in pool.started)
    states = run.states()
    assert {one.state for one in states} == {"failed"} and states[0].message == "the disk is full; free some"


def test_cells_that_have_ended_need_nothing_that_cells_share(tmp_path: Path) -> None:
    """The Hub is silent, and gc took the base model: a sweep that has ended has not failed."""
    store = _Planted(tmp_path / "store")
    pool = Pool(**{"preflight-sft": "fails", "lr-8-b3-t2000-s2": "diverges"})
    pool.ends["preflight-sft"] = ""
    SweepRun(asked(store.root, num_workers=1), "small", LOG).run(pool)
    run = SweepRun(asked(store.root), "small", LOG)
    for cell in run.cells[:-1]:
        store.score(cell)
    pool.ends["preflight-sft"] = "fails"
    assert run.run(pool) == "Completed" and counts_of(run.states())["failed"] == 0
    assert not list((run.folder / "outcomes").glob(f"{run.cells[0].keys[1]}.json"))
    wider = SweepRun(asked(store.root, blocks=[SIX | {"seeds": [0, 1, 2, 3]}]), "small", LOG)
    assert wider.run(pool) == "Failed" and counts_of(wider.states())["failed"] == 2


def test_blocks_that_are_asked_for(tmp_path: Path) -> None:
    more = SIX | {"name": "second", "seeds": [7]}
    run = SweepRun(asked(tmp_path / "store", blocks=[SIX, more]), "small", LOG, blocks=["second"])
    assert [cell.place.seed for cell in run.cells] == [7, 7]
    assert len(states_of(run.store_root, run.folder, run._records.values())) == 8, "all are on record"
    with pytest.raises(ValueError, match="has no block 'third'; its blocks: first, second"):
        SweepRun(asked(tmp_path / "store", blocks=[SIX, more]), "small", LOG, blocks=["third"])


def test_no_cell_starts_after_the_time_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = SweepRun(asked(tmp_path / "store"), "small", LOG, minutes=0)
    pool = Pool()
    assert run.run(pool) == "Completed", "nothing failed"
    assert not any(name.startswith("lr") for name in pool.started)
    assert "the time is over: 6 cells are left for the next run" in caplog.messages


def test_a_cell_whose_model_was_removed_has_its_scores(tmp_path: Path) -> None:
    """Models are large. What was measured is told as done, and is not trained again, unless it is measured anew."""
    store = _Planted(tmp_path / "store")
    first = SweepRun(asked(store.root), "small", LOG)
    for cell in first.cells[:2]:
        store.score(cell)
    pool = Pool()
    run = SweepRun(asked(store.root), "small", LOG)
    assert counts_of(run.states())["done"] == 2 and run.run(pool) == "Completed"
    assert sum(name.startswith("lr") for name in pool.started) == 4
    age = time.time() - (store.root / "evaluation" / run.cells[0].keys[1] / "current").stat().st_mtime
    assert age < 3600, "used now, as gc sees it"
    pool, lower = Pool(), {"evaluation.max_length": 120}
    assert SweepRun(asked(store.root, overrides=lower), "small", LOG).run(pool) == "Completed"
    assert sum(name.startswith("lr") for name in pool.started) == 6


def test_a_forecast_above_the_limit_begins_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ValueError, match="forecast to take 5 h 00 min, max_hours allows 4 h; run a part"):
        SweepRun(asked(store, blocks=[SIX | {"hours": 5}], max_hours=4), "small", LOG)
    assert not (sweep_folder(store, "small") / "cells.json").exists()


class _Planted(HandStore):
    """A store whose artifacts are those of cells. Scores are parabolas with their best rate at 2^-7.3."""

    def spec(self, stage: str, name: str, inputs: Any, **config: Any) -> Spec:
        return self.specs[name]

    def score(self, cell: SweepCell) -> None:
        number, place = len(self.manifests), cell.place
        self.specs = {f"evaluation {number}": cell.graph.spec(cell.evaluation)}
        level = 0.9 - 0.05 * (place.log2_learning_rate + 7.3) ** 2 + 0.01 * place.seed
        made_from = {
            name: Ref(cell.graph.nodes[binding.node].stage.name, cell.graph.key(binding.node))
            for name, binding in cell.graph.nodes[cell.evaluation].bindings().items()
        }
        evaluate(self, number, [level, level + 0.05], inputs=made_from, taken=dict.fromkeys(made_from, "d"))


def test_edges_are_added_until_there_are_none_and_never_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """-8 is the best of -11 to -8, then -7 the best of all to -7; with -6 the best one has neighbours."""
    store = _Planted(tmp_path / "store")
    block = BLOCK | {"log2_learning_rate": {"low": -11, "high": -8}, "seeds": [0, 1]}
    sweep = asked(store.root, blocks=[block], max_edge_cells=5, tasks=SWEEP["tasks"][:1], num_workers=1)
    pool = Pool()

    def submit(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Future[Made]:
        if nodes[0] not in cell.shared_nodes:
            store.score(cell)
        return pool(cell, nodes, upstream)

    run = SweepRun(sweep, "small", LOG)
    with caplog.at_level(logging.INFO, "test-sweep"):
        run.end(run.run(submit))
    added = [name for name in pool.started if name.startswith(("lr-7", "lr-6", "lr-5"))]
    assert added == [f"lr{rate}-b3-t2000-s{seed}" for rate in (-7, -6) for seed in (0, 1)]
    assert [block.name for block in run.sweep.blocks] == ["first", "edge-1", "edge-2"]
    assert counts_of(run.states())["done"] == 12
    again = SweepRun(sweep, "small", LOG)
    assert again.sweep.blocks == run.sweep.blocks and again._added() == []
    (record, _) = sorted((store.root / "runs").glob("*.json"))
    kept = RunRecord.model_validate_json(record.read_text()).keys.values()
    assert {key for cell in run.cells for key in cell.keys} <= set(kept)


def test_edges_end_where_the_cells_that_may_be_added_are_used(tmp_path: Path) -> None:
    store = _Planted(tmp_path / "store")
    block = BLOCK | {"log2_learning_rate": {"low": -11, "high": -8}, "seeds": [0, 1]}
    run = SweepRun(asked(store.root, blocks=[block], max_edge_cells=3, tasks=SWEEP["tasks"][:1]), "small", LOG)
    for cell in run.cells:
        store.score(cell)
    assert [cell.place.log2_learning_rate for cell in run._added()] == [-7, -7]
    for cell in run.cells[-2:]:
        store.score(cell)
    assert run._added() == [], "one is left, and the next rate has two seeds"


def test_half_a_grid_has_no_edges(tmp_path: Path) -> None:
    """-7 is the best rate of all, and the time is over after the first three of them: -8 is not asked for yet."""
    store = _Planted(tmp_path / "store")
    block = BLOCK | {"log2_learning_rate": {"low": -7, "high": -3}, "seeds": [0, 1]}
    changes: dict[str, Any] = {"blocks": [block], "max_edge_cells": 5, "tasks": SWEEP["tasks"][:1], "num_workers": 1}
    pool = Pool()
    begun = list[SweepCell]()

    def submit(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Future[Made]:
        if nodes[0] not in cell.shared_nodes:
            store.score(cell)
            begun.append(cell)
            if len(begun) == 6:
                run._deadline = 0.0
        return pool(cell, nodes, upstream)

    run = SweepRun(asked(store.root, **changes), "small", LOG, minutes=600)
    assert run.run(submit) == "Completed" and len(begun) == 6
    assert not (run.folder / FILE).exists()
    run._deadline, run._left = None, []
    assert [cell.place.log2_learning_rate for cell in run._added()] == [-8, -8], "as it would have been"


def test_cells_that_are_added_while_a_run_goes_on_are_run(tmp_path: Path) -> None:
    """By name as the run itself would call its own."""
    sweep = asked(tmp_path / "store")
    pool = Pool()

    def submit(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Future[Made]:
        if cell.place.seed == 2 and nodes[0] not in cell.shared_nodes and not (run.folder / FILE).exists():
            add(sweep, run.store_root, seeds=[9])
        return pool(cell, nodes, upstream)

    run = SweepRun(sweep, "small", LOG)
    assert run.run(submit) == "Completed"
    assert {name for name in pool.started if name.endswith("s9")} == {"lr-9-b3-t2000-s9", "lr-8-b3-t2000-s9"}
    assert [one.cell.place.seed for one in run.states()][-2:] == [9, 9] and not run._left


def test_an_extension_that_is_broken_meanwhile_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = SweepRun(asked(tmp_path / "store"), "small", LOG)
    (run.folder / FILE).write_text("blocks: [")
    assert run.run(Pool()) == "Completed"
    assert "no cells are added: " in caplog.text and "correct it, or remove it" in caplog.text


def test_the_record_of_a_run_names_what_gc_must_keep(tmp_path: Path) -> None:
    run = SweepRun(asked(tmp_path / "store"), "small", LOG)
    (file,) = (tmp_path / "store" / "runs").glob("*.json")
    record = RunRecord.model_validate_json(file.read_text())
    cells = {key for cell in run.cells for key in cell.keys}
    assert cells <= set(record.keys.values()) and record.state == "Running"
