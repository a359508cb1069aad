"""The shipped sweeps: they have the cells that are declared, are planned without a network, and know their tasks."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.recipe import load_recipe
from smoltulu.flows.sweeping.grid import cells_of, load_sweep, sweep_names
from smoltulu.schemas.sweep import SweepSettings, overrides_of, places
from smoltulu.tasks.data.sources import expand_path
from tests.golden_keys import made_up_model

DECLARED = {
    "surface-tiny": {"main": 96, "quarter": 30, "fourfold": 30},
    "surface-135m": {
        "main": 162, "budgets": 90, "beta2-batch-4": 15, "beta2": 30, "size-360m": 45,
        "paper-1130": 3, "paper-1207": 3, "same-ratio-as-1130": 3, "same-rate-as-1130": 3,
    },
    "surface-135m-short": {"main": 42, "quarter": 21},
    "selection-tiny": {"main": 25, "beside": 6, "epochs": 3, "draws": 16},
}  # fmt: skip


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up files and a made-up model where the real ones would be, and no network."""
    for variable in ("SMOLTULU_REAL_DATA", "SMOLTULU_REAL_MODEL"):
        monkeypatch.setenv(variable, str(tmp_path))
    made_up_model(tmp_path / "model")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("planning asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def a_cell_of_each_block(sweep: SweepSettings) -> SweepSettings:
    first = {block: place for place, block in reversed(places(sweep).items())}
    blocks = []
    for block in sweep.blocks:
        place = first[block.name]
        rate = {"low": place.log2_learning_rate, "high": place.log2_learning_rate}
        batch = {"low": place.log2_batch, "high": place.log2_batch}
        own = {
            "arms": [place.arm],
            "log2_learning_rate": rate,
            "log2_batch": batch,
            "seeds": [place.seed],
            "max_tokens": [place.max_tokens],
        }
        blocks.append(block.model_dump(mode="json") | own)
    return load_sweep(sweep.model_dump(mode="json") | {"blocks": blocks, "kind": "scan", "selection": None})


def test_all_of_them_are_declared_here() -> None:
    assert set(sweep_names()) >= DECLARED.keys()


@pytest.mark.parametrize("name", DECLARED)
def test_declared_cells_plan_offline_and_measure_their_tasks(name: str) -> None:
    sweep = load_sweep(name)
    assert Counter(places(sweep).values()) == DECLARED[name]
    recipe = load_recipe(sweep.recipe, overrides_of(sweep, next(iter(places(sweep)))))
    for source in recipe.data_sources():
        if source.path is not None:
            file = expand_path(source.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name)
    cells = list(cells_of(a_cell_of_each_block(sweep)))
    assert [cell.block for cell in cells] == list(DECLARED[name])
    for cell in cells:
        settings = cell.graph.recipe.evaluation
        assert settings is not None
        assert {one.task for one in sweep.tasks} <= {task.name for task in settings.tasks}


@pytest.mark.parametrize("name", ["surface-tiny", "surface-135m", "selection-tiny"])
def test_four_tasks_against_four(name: str) -> None:
    classes = {one.task: one.task_class for one in load_sweep(name).tasks}
    assert Counter(classes.values()) == {"reasoning": 4, "pattern": 4}


def test_the_papers_two_settings_and_the_two_that_tell_them_apart() -> None:
    sweep = load_sweep("surface-135m")
    asked = {
        (round(place.learning_rate, 7), place.effective_batch_size) for place in places(sweep) if place.size == "m1700"
    }
    assert asked == {(9.0e-5, 8), (3.1e-6, 32), (3.6e-4, 32), (9.0e-5, 32)}
    arms = {place.arm: overrides_of(sweep, place) for place in places(sweep) if place.effective_batch_size == 4}
    assert arms["beta2-half-life"]["sft.adam_beta2"] == pytest.approx(0.999 ** (4 / 32))
