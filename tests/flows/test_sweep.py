"""Sweeps: cells and their keys, states, scores as arrays, and the flow, which runs what is missing and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltulu.artifacts.locks import try_lock
from smoltulu.artifacts.manifests import Ref
from smoltulu.flows.recipe import RecipeError
from smoltulu.flows.sweeping.engine import _Cells
from smoltulu.flows.sweeping.grid import SweepCell, cells_of, load_sweep
from smoltulu.flows.sweeping.scores import load_scores
from smoltulu.flows.sweeping.states import (
    CellRecord,
    counted,
    counts_of,
    forget_outcome,
    remember,
    remembered,
    states_of,
    sweep_folder,
    write_outcome,
)
from smoltulu.schemas.artifact import ArtifactReference
from tests import ROOT
from tests.hand_store import HandStore
from tests.small_tiny import SMALL_TINY

NOT_SWEPT = ("dpo.", "rlvr.")
SMALL: dict[str, Any] = {
    **{field: value for field, value in SMALL_TINY.items() if not field.startswith(NOT_SWEPT)},
    **dict.fromkeys(("reward_model", "dpo", "rlvr", "pass_rates", "publish", "verifier_audit", "evaluation.sampled")),
    "data.verified_eval": None,
    "evaluation.max_length": 128,
}
BLOCK: dict[str, Any] = {
    "name": "first",
    "log2_learning_rate": {"low": -9, "high": -8},
    "log2_batch": {"low": 3, "high": 3},
    "seeds": [0],
    "max_tokens": [2000],
}
SWEEP: dict[str, Any] = {
    "name": "small",
    "recipe": "tiny",
    "stage": "sft",
    "kind": "scan",
    "overrides": SMALL,
    "blocks": [BLOCK],
    "tasks": [
        {"task": "tiny_arithmetic", "metric": "exact_match,strict-match", "task_class": "reasoning"},
        {"task": "tiny_instructions", "metric": "acc,none", "task_class": "pattern"},
    ],
}
WIDER = SWEEP | {"blocks": [BLOCK, BLOCK | {"name": "second", "log2_learning_rate": {"low": -9, "high": -7}}]}


def test_cells_share_all_but_their_training_and_its_scores() -> None:
    cells = list(cells_of(load_sweep(SWEEP)))
    assert [cell.place.name for cell in cells] == ["lr-9-b3-t2000-s0", "lr-8-b3-t2000-s0"]
    first, second = cells
    assert first.own_nodes == ("sft", "evaluation-sft")
    for node in first.shared_nodes:
        assert first.graph.key(node) == second.graph.key(node)
    assert first.keys[0] != second.keys[0] and first.keys[1] != second.keys[1]
    config = second.graph.nodes["sft"].config
    assert (config.learning_rate, config.effective_batch_size) == (2.0**-8, 8)  # type: ignore[attr-defined]


def test_a_cell_can_be_sent_to_another_process() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")  # as Dask does it
    cell = next(cells_of(load_sweep(SWEEP)))
    sent = cloudpickle.loads(cloudpickle.dumps(cell.to_send))
    assert sent.keys == cell.keys and sent.shared_nodes == cell.shared_nodes and sent.own_nodes == cell.own_nodes
    job, there = (one.graph.job("sft", {name: _made(one, name) for name in one.shared_nodes}) for one in (cell, sent))
    assert (job.spec, job.inputs, job.compute) == (there.spec, there.inputs, there.compute)


def _made(cell: SweepCell, node: str) -> ArtifactReference:
    outputs = {name: name for name in cell.graph.nodes[node].stage.outputs.model_fields}
    return ArtifactReference(
        stage=cell.graph.nodes[node].stage.name,
        node=node,
        key=cell.graph.key(node),
        digest="d",
        path="p",
        outputs=outputs,
    )


def test_a_wider_grid_keeps_the_keys_of_its_cells() -> None:
    before = [cell.keys for cell in cells_of(load_sweep(SWEEP))]
    after = [cell.keys for cell in cells_of(load_sweep(WIDER))]
    assert after[:2] == before and len(after) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": "tyni"}, "cell lr-9-b3-t2000-s0: .*tyni"),
        ({"overrides": SMALL | {"sft": None}}, "'sft.max_tokens' and 'sft' set the same field"),
        ({"overrides": SMALL | {"evaluation": None}}, "has no evaluation-sft; give it a block evaluation|evaluation"),
        ({"stage": "pretraining"}, "stage"),
        ({"overrides": {"sft.weight_decay": "hf_" + "a1B2" * 9}}, "holds no secrets"),
    ],
)
def test_what_is_no_sweep_of_this_recipe(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        list(cells_of(load_sweep(SWEEP | changes)))


def test_an_unknown_sweep_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="no sweep 'surfase'; shipped are"):
        load_sweep("surfase")


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def record(store: HandStore, number: int, **place: Any) -> CellRecord:
    """A cell whose keys are those of artifacts that the store may be given."""
    where = {"log2_learning_rate": -9 + number, "log2_batch": 3, "seed": 0, "max_tokens": 2048} | place
    keys = [store.begin(stage, f"{stage} {number}").key for stage in ("sft", "evaluation")]
    values = {"place": where, "block": "first", "stage": "sft", "training": keys[0], "evaluation": keys[1]}
    return CellRecord.model_validate(values)


def evaluate(store: HandStore, number: int, right: list[float], **made_from: Any) -> Ref:
    rows = [
        {"task": "tiny_arithmetic", "entry": 0, "id": str(item), "doc_hash": f"d{item}", "target_hash": f"t{item}",
         "filter": "strict-match", "metrics": {"exact_match": value, "bits_per_byte": 2 - value}}
        for item, value in enumerate(right)
    ]  # fmt: skip
    score = {
        "task": "tiny_arithmetic", "metric": "exact_match,strict-match", "value": float(np.mean(right)),
        "num_samples": len(right), "harness": "h", "task_version": "1", "template_digest": "t",
    }  # fmt: skip
    return store.make(
        "evaluation",
        f"evaluation {number}",
        outputs={"subject": "sft", "scores": [score], "samples_file": "samples.jsonl"},
        files={"samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows)},
        **made_from,
    )


def test_states(store: HandStore) -> None:
    cells = [record(store, number) for number in range(5)]
    folder = sweep_folder(store.root, "small")
    (folder / "outcomes").mkdir(parents=True)
    evaluate(store, 0, [1.0, 0.0])
    write_outcome(folder, cells[0], "failed", "an earlier attempt")
    write_outcome(folder, cells[1], "diverged", "loss is nan")
    write_outcome(folder, cells[2], "failed", "the disk is full")
    with try_lock(store.root / "sft" / cells[3].training / "lock") as is_mine:
        assert is_mine
        states = states_of(store.root, folder, cells)
    assert [one.state for one in states] == ["done", "diverged", "failed", "running", "pending"]
    assert states[2].message == "the disk is full"
    assert counted(counts_of(states)) == "1 done, 1 diverged, 1 running, 1 pending, 1 failed"
    forget_outcome(folder, cells[2])
    assert states_of(store.root, folder, cells[2:3])[0].state == "pending"
    again = cells[1].model_copy(update={"evaluation": "0" * 64})
    assert states_of(store.root, folder, [again])[0].state == "diverged", "a metric that is added trains nothing"
    (folder / "outcomes" / f"{cells[1].training}.json").write_text("{")
    assert states_of(store.root, folder, cells[1:2])[0].state == "pending"


def test_a_sweep_remembers_cells_that_are_not_asked_for_any_more(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path / "store", "small")
    with pytest.raises(ValueError, match="sweep small was never run in this store"):
        remembered(folder)
    remember(tmp_path / "store", folder, cells_of(load_sweep(WIDER)))
    remember(tmp_path / "store", folder, cells_of(load_sweep(SWEEP)))
    assert [cell.place.log2_learning_rate for cell in remembered(folder)] == [-9, -8, -7]
    (folder / "cells.json").write_text("[{}]")
    with pytest.raises(ValueError, match="remove the file and run the sweep again"):
        remembered(folder)


def test_a_cell_that_has_ended_stays_the_training_that_it_was(tmp_path: Path) -> None:
    """Another evaluation takes the place of the one before; another recipe does only where nothing has ended."""
    root = tmp_path / "store"
    folder = sweep_folder(root, "small")
    before = remember(root, folder, cells_of(load_sweep(SWEEP)))
    measured = load_sweep(SWEEP | {"overrides": SMALL | {"evaluation.max_length": 120}})
    after = remember(root, folder, cells_of(measured))
    assert [one.training for one in after] == [one.training for one in before]
    assert after[0].evaluation != before[0].evaluation and remembered(folder) == tuple(after)
    other = load_sweep(SWEEP | {"overrides": SMALL | {"sft.weight_decay": 0.3}})
    changed = remember(root, folder, cells_of(other))
    assert remembered(folder) == tuple(changed) and changed[0].training != after[0].training
    write_outcome(folder, changed[1], "diverged", "loss is nan")
    with pytest.raises(ValueError, match=r"sweep small: 1 of its cells have ended .* lr-8-b3-t2000-s0; take back"):
        remember(root, folder, cells_of(measured))
    assert remembered(folder) == tuple(changed)


def test_gc_keeps_what_the_cells_of_every_size_share() -> None:
    sizes = {"base": {"num_parameters": 1}, "large": {"num_parameters": 2, "overrides": {"world.seed": 5}}}
    cells = list(cells_of(load_sweep(SWEEP | {"sizes": sizes, "blocks": [BLOCK | {"sizes": list(sizes)}]})))
    keys = set(_Cells("small", cells).keys().values())
    assert keys == {cell.graph.key(node) for cell in cells for node in (*cell.shared_nodes, *cell.own_nodes)}


def test_a_look_at_a_cell_leaves_nothing_behind(store: HandStore) -> None:
    cell = record(store, 0)
    before = sorted(store.root.rglob("*"))
    assert states_of(store.root, sweep_folder(store.root, "small"), [cell])[0].state == "pending"
    assert sorted(store.root.rglob("*")) == before


def test_scores_as_arrays_by_hand(store: HandStore) -> None:
    sweep = load_sweep(SWEEP | {"tasks": [SWEEP["tasks"][0], {"task": "tiny_arithmetic", "metric": "bits_per_byte,none",
        "task_class": "reasoning", "lower_is_better": True}]})  # fmt: skip
    cells = [record(store, number) for number in range(3)]
    folder = sweep_folder(store.root, "small")
    (folder / "outcomes").mkdir(parents=True)
    evaluate(store, 0, [1.0, 0.0])
    evaluate(store, 1, [1.0, 1.0])
    write_outcome(folder, cells[2], "diverged", "loss is nan")
    accuracy, bits = load_scores(sweep, store.root, states_of(store.root, folder, cells))
    assert accuracy.cells.items[:2].tolist() == [[1.0, 0.0], [1.0, 1.0]] and np.isnan(accuracy.cells.items[2]).all()
    assert bits.cells.items[:2].tolist() == [[-1.0, -2.0], [-1.0, -1.0]]
    assert bits.means[:2].tolist() == [1.5, 1.0]
    assert accuracy.cells.log2_lr.tolist() == [-9, -8, -7] and accuracy.cells.log2_tokens.tolist() == [11] * 3
    assert accuracy.cells.diverged.tolist() == [False, False, True]
    evaluate(store, 1, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="have other items of tiny_arithmetic"):
        load_scores(sweep, store.root, states_of(store.root, folder, cells))


def test_scores_of_a_model_that_was_trained_again_since_are_none(store: HandStore) -> None:
    sweep = load_sweep(SWEEP | {"tasks": SWEEP["tasks"][:1]})
    model = store.make("sft", "sft 0")
    place = record(store, 0).model_dump() | {"training": model.key}
    for taken, is_told in (({}, False), ({"model": "0" * 64}, True)):
        made = evaluate(store, 0, [1.0, 0.0], inputs={"model": model}, taken=taken)
        cell = CellRecord.model_validate(place | {"evaluation": made.key})
        states = states_of(store.root, sweep_folder(store.root, "small"), [cell])
        with pytest.raises(ValueError, match="trained again since") if is_told else contextlib.nullcontext():
            load_scores(sweep, store.root, states)


_FLOW = "import json, sys; from smoltulu.flows.sweep import smoltulu_sweep; smoltulu_sweep(json.loads(sys.argv[1]))"


_DASK = """
import json, sys
from prefect_dask import DaskTaskRunner
from smoltulu.flows.sweep import smoltulu_sweep
if __name__ == "__main__":
    cluster = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    smoltulu_sweep.with_options(task_runner=DaskTaskRunner(cluster_kwargs=cluster))(json.loads(sys.argv[1]))
"""


def run(sweep: dict[str, Any], folder: Path, flow: str = _FLOW) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "SMOLTULU_STORE": str(folder / "store"), "PYTHONPATH": f"{ROOT}/src:{ROOT}", "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", flow, json.dumps(sweep)],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow
def test_only_what_is_missing_runs_and_a_cell_that_fails_ends_nothing(tmp_path: Path) -> None:
    code, out = run(SWEEP, tmp_path)
    assert code == 0 and "sweep small: 2 done" in out and "2 of 2 cells are missing" in out, out[-3000:]
    code, out = run(WIDER, tmp_path)
    assert code == 0 and "sweep small: 3 done" in out and "1 of 3 cells are missing" in out, out[-3000:]
    # A gate that no model passes: these cells fail, after they were trained. Rows that no token of is left of: what the
    # cells of the arm share fails, and they with it.
    gate = {"num_prompts": 2, "max_new_tokens": 8, "min_stopped_share": 1}
    failing = SWEEP | {
        "overrides": SMALL | {"sft.gate": gate},
        "arms": {"main": {}, "short": {"overrides": {"sft.max_length": 8}}},
        "blocks": [BLOCK, BLOCK | {"name": "b", "seeds": [5], "arms": ["short", "main"]}],
    }
    code, out = run(failing, tmp_path)
    assert code != 0 and "sweep small: 2 done, 4 failed" in out, out[-3000:]


@pytest.mark.slow
def test_cells_run_on_dask_workers(tmp_path: Path) -> None:
    """In processes of their own, which find what cells share, and whose failures come back."""
    pytest.importorskip("prefect_dask")
    code, out = run(SWEEP, tmp_path, _DASK)
    assert code == 0 and "sweep small: 2 done" in out, out[-3000:]
    gate = {"num_prompts": 2, "max_new_tokens": 8, "min_stopped_share": 1}
    failing = SWEEP | {"name": "failing", "overrides": SMALL | {"sft.gate": gate}, "blocks": [BLOCK | {"seeds": [5]}]}
    code, out = run(failing, tmp_path, _DASK)
    assert code != 0 and "sweep failing: 2 failed" in out, out[-3000:]
