"""`smoltulu sweep NAME ...` as a user types it: quick actions in this process, a run that is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from smoltulu.flows.cli.main import app
from smoltulu.flows.sweeping.grid import load_sweep, sweep_names
from smoltulu.flows.sweeping.states import CellRecord, sweep_folder, write_outcome
from smoltulu.recipes import SWEEPS
from smoltulu.schemas.sweep import places
from tests import ROOT
from tests.flows.test_sweep import BLOCK, SMALL, SWEEP, evaluate
from tests.hand_store import HandStore


def written(folder: Path, **changes: Any) -> str:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(SWEEP | changes))))
    return str(file)


def smoltulu(*arguments: str, code: int = 0) -> str:
    """What the command prints; commands change the folder that they are called in, so it is set back."""
    before = os.getcwd()
    try:
        done = CliRunner().invoke(app, arguments)
    finally:
        os.chdir(before)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_a_name_alone_runs_and_a_wrong_action_is_told(tmp_path: Path) -> None:
    assert "no sweep 'surface'; shipped are" in smoltulu("sweep", "surface", code=1)
    assert "no sweep 'surface'" in smoltulu("sweep", "surface", "--store", str(tmp_path), code=1)
    assert "No such command 'staus'. Did you mean 'status'?" in smoltulu("sweep", "surface-tiny", "staus", code=2)
    assert "add cells" in smoltulu("sweep", "surface-tiny", "extend", "--help").lower()


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_are_whole(name: str) -> None:
    """And none is called as a recipe is: `smoltulu plan NAME` is of one of them."""
    assert load_sweep(name).name == name and not (SWEEPS.parent / f"{name}.yaml").exists()


def test_status_by_hand(tmp_path: Path) -> None:
    """Of four cells one is done, one diverged, one failed, and one was asked for by no run yet."""
    store = HandStore(tmp_path / "store")
    name = written(tmp_path, blocks=[BLOCK, BLOCK | {"name": "second", "seeds": [1]}])
    cells = []
    for number, (place, block) in enumerate(places(load_sweep(name)).items()):
        training, evaluation = store.make("sft", f"sft {number}"), store.begin("evaluation", f"evaluation {number}")
        keys = {"training": training.key, "evaluation": evaluation.key}
        cells.append(CellRecord.model_validate({"place": place, "block": block, "stage": "sft", **keys}))
    folder = sweep_folder(store.root, "small")
    (folder / "outcomes").mkdir(parents=True)
    (folder / "cells.json").write_text(json.dumps([one.model_dump() for one in cells[:3]]))
    evaluate(store, 0, [1.0, 0.0])
    write_outcome(folder, cells[1], "diverged", "loss is nan")
    write_outcome(folder, cells[2], "failed", "sft: the disk is full [/mnt]\nsecond line")
    asked = ("sweep", name, "status", "--store", str(store.root))
    values = json.loads(smoltulu(*asked, "--json"))
    assert (values["cells"], values["missing"]) == (4, 2)
    first, second = values["blocks"]
    assert (first["done"], first["diverged"], first["missing"]) == (1, 1, 0)
    assert (second["failed"], second["pending"], second["missing"]) == (1, 1, 2)
    assert second["forecast_from"] == ["measured"] and second["seconds"] > 0
    assert values["diverged"] == [{"cell": "lr-8-b3-t2000-s0", "message": "loss is nan"}]
    shown = smoltulu(*asked)
    assert "lr-9-b3-t2000-s1" in shown and "the disk is full [/mnt]" in shown and "second line" not in shown
    assert "4 cells, 2 missing, forecast" in shown


def test_status_of_what_never_ran(tmp_path: Path) -> None:
    shown = json.loads(smoltulu("sweep", written(tmp_path), "status", "--store", str(tmp_path / "store"), "--json"))
    assert shown["blocks"][0]["pending"] == 2 and not (tmp_path / "store").exists()


def test_a_plan_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written(tmp_path, blocks=[BLOCK | {"hours": 3}], max_hours=2)
    monkeypatch.setenv("SMOLTULU_STORE", str(tmp_path / "store"))
    values = json.loads(smoltulu("plan", name, "--json"))
    assert (values["cells"], values["missing"], values["seconds"]) == (2, 2, 3 * 3600)
    assert "max_hours allows 2 h; run a part (--block first), or raise max_hours" in values["refusal"]
    shown = smoltulu("sweep", name, "plan")
    assert "3 h 00 min" in shown and "refused   sweep small: its 2 missing cells" in shown
    assert "0 of 6 stages that cells have in common are there; still to make: world" in shown
    assert "max_hours allows 2 h" in smoltulu("sweep", name, code=1), "a run is refused as the plan says"
    assert "takes no --override, --until or --refresh" in smoltulu("plan", name, "--until", "sft", code=1)


def test_extend_takes_lists(tmp_path: Path) -> None:
    name, store = written(tmp_path), ("--store", str(tmp_path / "store"))
    shown = smoltulu("sweep", name, "extend", *store, "--seeds", "3", "4", "--rates", "-9", "-6.5", "--dry-run")
    assert "seeds: [3, 4]" in shown and "low: -9.0, high: -6.5, step: 2.5" in shown
    assert "added     4 cells, not written (--dry-run)" in shown
    shown = smoltulu("sweep", name, "extend", *store, "--budgets", "4000")
    assert "added     2 cells, written to" in shown
    assert f"run       smoltulu sweep {name} --store {store[1]}" in shown, "in the same store"
    folder = tmp_path / "elsewhere"
    refused = smoltulu("sweep", name, "extend", "--seeds", "5", "--store", str(folder), "6", code=2)
    assert "unexpected extra argument" in refused and not folder.exists(), "6 is no seed, and no store"
    values = json.loads(smoltulu("sweep", name, "status", *store, "--json"))
    assert [block["name"] for block in values["blocks"]] == ["first", "more-1"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give what to add: --seeds, --rates, --batches, --budgets; or --edges with a number"),
        (["--edges", "3", "--seeds", "1"], "give what to add"),
        (["--edges", "3", "--like", "first"], "--like first has no meaning with --edges"),
        (["--best", "3", "--rates", "-9"], "--best says where --seeds are added"),
        (["--seeds", "0"], "all of these cells are there already"),
        (["--like", "x", "--seeds", "9"], "has no block 'x'; its blocks: first"),
        (["--rates", "1"], "rates are below 1"),
        (["--batches", "0.5"], "batches are whole rows"),
        (["--batches", "12"], "max_tokens 2,000 is less than one step"),
        (["--edges", "3"], "was never run in this store"),
    ],
)
def test_extensions_that_are_refused(tmp_path: Path, given: list[str], told: str) -> None:
    shown = smoltulu("sweep", written(tmp_path), "extend", "--store", str(tmp_path / "store"), *given, code=1)
    assert told in shown


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (["export"], "name what to write"),
        (["export", "cells.xlsx"], "cells.xlsx: a table is written as"),
        (["export", "--optuna", "study"], "was never run in this store"),
        (["import", "--optuna", "study"], "is no file; name the journal file"),
        (["report"], "was never run in this store"),
        (["recommend"], "was never run in this store"),
        (["recommend", "--of", "reasoning"], "--of reasoning says which place --to writes; give --to as well"),
        (["recommend", "-w", "gsm8k"], "--weight 'gsm8k': write a task or class and a number"),
        (["recommend", "-w", "a=1", "-w", "a=2"], "--weight a is given twice"),
    ],
)
def test_results_of_what_never_ran(tmp_path: Path, action: list[str], told: str) -> None:
    assert told in smoltulu("sweep", written(tmp_path), *action, "--store", str(tmp_path / "store"), code=1)


# ------------------------------------------------------------------------------------------ with cells that really run


def started(*arguments: str, store: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "SMOLTULU_STORE": str(store)}
    return subprocess.Popen(
        [sys.executable, "-m", "smoltulu.flows.cli.main", "sweep", *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        # Tests that were begun in the background ignore it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def output_of(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=600)[0]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the terminal. What was finished stays, what was stopped has not failed."""
    store = tmp_path / "store"
    cells = {"blocks": [BLOCK | {"log2_learning_rate": {"low": -12, "high": -9}}], "num_workers": 1}
    name = written(tmp_path, **cells)
    first = started(name, store=store)
    for line in first.stdout or ():
        if "; 1 done, 3 to go" in line or ": done; 1 done" in line:
            break
    time.sleep(1.0)
    os.killpg(first.pid, signal.SIGINT)
    out = output_of(first)
    assert first.returncode == 130 and "goes on" in out, out
    assert "Traceback" not in out
    stopped = json.loads(smoltulu("sweep", name, "status", "--store", str(store), "--json"))
    (block,) = stopped["blocks"]
    assert block["failed"] == 0 and 1 <= block["done"] < 4, stopped
    second = started(name, store=store)
    out = output_of(second)
    assert second.returncode == 0 and f"{4 - block['done']} of 4 cells are missing" in out, out
    assert "sweep small: 4 done" in out and "page      " in out and "verdict   reasoning" in out, out
    assert "0 of 4 cells are missing" in output_of(started(name, store=store))

    # The flow keeps to it: a task that is asked for later is measured, and nothing is trained.
    trainings = sorted((store / "sft").iterdir())
    name = written(tmp_path, **cells, overrides=SMALL | {"evaluation.max_length": 120})
    out = output_of(started(name, store=store))
    assert "4 of 4 cells are missing" in out and "sweep small: 4 done" in out, out
    assert sorted((store / "sft").iterdir()) == trainings


@pytest.mark.slow
def test_sigterm_ends_a_run_and_its_processes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run = started(written(tmp_path), store=store)
    for line in run.stdout or ():
        if "cells are missing" in line:
            break
    time.sleep(0.5)
    run.terminate()
    out = output_of(run)
    assert run.returncode == 143 and "stopped   sweep small" in out, out
    deadline = time.monotonic() + 10  # the kernel ends what waits for its parent
    while left := [one for one in psutil.process_iter() if _is_of(one, run.pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _is_of(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def test_status_imports_nothing_heavy(tmp_path: Path) -> None:
    command = ["-m", "smoltulu.flows.cli.main", "sweep", "surface-tiny", "status", "--store", str(tmp_path / "store")]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, timeout=60, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert not {"torch", "transformers", "trl", "prefect", "matplotlib", "scipy", "optuna"} & imported
