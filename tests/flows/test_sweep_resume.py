"""A sweep that is killed, extended and measured anew: only what is missing runs, and order changes no byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.schemas.artifact import Manifest
from tests import ROOT
from tests.flows.test_sweep import BLOCK, SWEEP

#: More tokens than in the other tests: the kill has to fall into a training.
BLOCKS: list[dict[str, Any]] = [
    BLOCK | {"max_tokens": [8000]},
    BLOCK | {"name": "more", "max_tokens": [8000], "log2_learning_rate": {"low": -7, "high": -7}},
]


def begin(sweep: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """`smoltulu sweep FILE run`."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    arguments = ["sweep", str(file), "run", "--store", str(folder / "store")]
    return subprocess.Popen(
        [sys.executable, "-m", "smoltulu.flows.cli.main", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "COLUMNS": "200"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(sweep: dict[str, Any], folder: Path) -> str:
    process = begin(sweep, folder)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out[-3000:]
    return out


def made(folder: Path, stage: str) -> dict[str, Manifest]:
    """Key -> manifest of the newest generation, of what is finished."""
    found = {}
    for key in (folder / "store" / stage).glob("*"):
        pointer = layout.read_pointer(key)
        if pointer is not None:
            found[key.name] = read_manifest(key / pointer.name)
    return found


def in_training(folder: Path) -> bool:
    """Whether a training runs that is not finished."""
    finished = made(folder, "sft")
    return any(work.parent.name not in finished for work in (folder / "store" / "sft").glob("*/work"))


@pytest.mark.slow
def test_killed_extended_and_measured_anew(tmp_path: Path) -> None:
    killed, other = tmp_path / "killed", tmp_path / "other"
    killed.mkdir()
    other.mkdir()
    sweep = SWEEP | {"blocks": BLOCKS[:1], "num_workers": 1}
    process = begin(sweep, killed)
    deadline = time.monotonic() + 300
    while not (len(made(killed, "sft")) == 1 and in_training(killed)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = made(killed, "sft")
    assert len(first) == 1, "the second cell was over before the kill"

    # One learning rate more. The cell that was finished, and all that cells share, is as it was.
    shared = {stage: made(killed, stage) for stage in ("world", "dataset", "base_model", "preflight")}
    out = finish(sweep | {"blocks": BLOCKS}, killed)
    assert "2 of 3 cells are missing" in out and "3 done" in out
    trained = made(killed, "sft")
    assert len(trained) == 3 and all(trained[key] == manifest for key, manifest in first.items())
    assert {stage: made(killed, stage) for stage in shared} == shared

    # A score more: every cell is measured, none is trained.
    limited = [{**task, "limit": 5} for task in _tasks()]
    out = finish(sweep | {"blocks": BLOCKS, "overrides": SWEEP["overrides"] | {"evaluation.tasks": limited}}, killed)
    assert "3 of 3 cells are missing" in out and "3 done" in out
    assert made(killed, "sft") == trained and len(made(killed, "evaluation")) == 6

    # The other way round, two at a time, in a store of its own: the same models.
    finish(sweep | {"blocks": BLOCKS[::-1], "num_workers": 2}, other)
    assert {key: one.digest for key, one in made(other, "sft").items()} == {
        key: one.digest for key, one in trained.items()
    }


def _tasks() -> list[dict[str, Any]]:
    from smoltulu.flows.recipe import load_recipe

    evaluation = load_recipe("tiny").evaluation
    assert evaluation is not None
    return [json.loads(task.model_dump_json()) for task in evaluation.tasks]
