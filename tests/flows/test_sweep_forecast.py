"""How long a sweep takes: from cells like the ones that are missing, and what is refused where that is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.sweeping.forecast import (
    Duration,
    Forecast,
    Kind,
    Seconds,
    _by_operations,
    by_block,
    check_limit,
    estimate,
    forecast_of,
)
from smoltulu.flows.sweeping.grid import cells_of, load_sweep
from smoltulu.flows.sweeping.states import CellState, states_of, sweep_folder
from smoltulu.schemas.sweep import Place, SweepSettings, places
from smoltulu.tasks.engine.stores import open_store
from tests.flows.test_sweep import BLOCK, SMALL, SWEEP, evaluate, record
from tests.hand_store import HandStore


def place(**changes: Any) -> Place:
    return Place.model_validate({"log2_learning_rate": -9, "log2_batch": 3, "seed": 0, "max_tokens": 2000} | changes)


def forecast(**measured: list[Duration]) -> Forecast:
    made = Forecast(2, {"base": 100, "large": 400, "unsaid": None})
    made.measured[Kind(2000, 3, "base", "main")] = [Duration(6, 4), Duration(8, 4), Duration(100, 4)]
    return made


def test_seconds_of_a_cell_by_hand() -> None:
    known = forecast()
    assert known.of(place(seed=5, log2_learning_rate=-3)) == Seconds(12, "measured")
    # Twice the tokens: 2 x 8 s of training, 4 s of evaluation. Four times the parameters: four times both.
    assert known.of(place(max_tokens=4000)) == Seconds(20, "scaled")
    assert known.of(place(log2_batch=7)) == Seconds(12, "scaled")
    assert known.of(place(size="large")) == Seconds(48, "scaled")
    assert known.of(place(size="unsaid")) is None
    known.declared[Kind(2000, 3, "unsaid", "main")] = 7.0
    known.estimated |= {Kind(2000, 3, "unsaid", "main"): 9.0, Kind(500, 3, "unsaid", "main"): 3.0}
    assert known.of(place(size="unsaid")) == Seconds(7, "declared")
    assert known.of(place(size="unsaid", max_tokens=500)) == Seconds(3, "estimated")
    # Measured two at a time: so many are divided by two; what nobody measured is not.
    assert known.total([place(), place(seed=1), place(size="unsaid"), place(size="unsaid", arm="x")]) == (12 + 7, 1)


def test_the_nearest_kind_is_scaled() -> None:
    known = forecast()
    known.measured[Kind(8000, 3, "base", "main")] = [Duration(10, 0)]
    known.measured[Kind(4000, 3, "base", "lora")] = [Duration(1, 0)]
    assert known.of(place(max_tokens=16_000)) == Seconds(20, "scaled"), "of this arm, nearest in tokens"
    assert known.of(place(max_tokens=4000, arm="lora")) == Seconds(1, "measured")


def test_time_left_follows_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("smoltulu.flows.sweeping.forecast.time.monotonic", lambda: now)
    known = forecast()
    known.begin()
    assert known.time_left([place()] * 4) == 24, "12 s each, two at a time"
    assert known.time_left([]) is None and known.time_left([place(size="unsaid")]) is None
    # Four cells were to take 24 s, and took 36.
    known._num_ended, known._expected, now = 4, 24.0, 136.0
    assert known.time_left([place()] * 4) == 36


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def test_finished_cells_are_the_measure(store: HandStore) -> None:
    sweep = load_sweep(SWEEP)
    cells = [record(store, number, max_tokens=2000) for number in range(2)]
    store.make("sft", "sft 0")
    evaluate(store, 0, [1.0])
    states = states_of(store.root, sweep_folder(store.root, "small"), cells)
    assert [one.state for one in states] == ["done", "pending"]
    known = forecast_of(sweep, store.root, states)
    seconds = sum(manifest.duration_seconds for manifest in store.manifests.values())
    assert seconds > 0 and known.of(cells[1].place) == Seconds(seconds, "measured")


def states(sweep: SweepSettings, num_done: int = 0) -> dict[Place, CellState | None]:
    return dict.fromkeys(places(sweep))


def declared(hours: float | None, **changes: Any) -> SweepSettings:
    return load_sweep(SWEEP | {"blocks": [BLOCK | {"hours": hours}]} | changes)


def test_blocks_by_hand() -> None:
    sweep = declared(3.0)
    (block,) = by_block(sweep, forecast_of(sweep, Path("nowhere"), []), states(sweep))
    assert (block.num_cells, block.num_missing, block.seconds, block.num_unknown) == (2, 2, 3 * 3600, 0)
    assert block.counts["pending"] == 2 and block.bases == ("declared",)


def test_hours_of_a_block_are_shared_out_by_tokens() -> None:
    """Two cells of 1,000 and two of 3,000 tokens in 8 hours: 1 hour and 3 hours each."""
    sweep = load_sweep(SWEEP | {"blocks": [BLOCK | {"hours": 8, "max_tokens": [1000, 3000]}]})
    known = forecast_of(sweep, Path("nowhere"), [])
    assert known.of(place(max_tokens=1000)) == Seconds(3600, "declared")
    assert known.of(place(max_tokens=3000)) == Seconds(3 * 3600, "declared")


def test_a_forecast_above_the_limit_is_refused() -> None:
    sweep = declared(3.0, max_hours=2.5)
    blocks = by_block(sweep, forecast_of(sweep, Path("nowhere"), []), states(sweep))
    with pytest.raises(
        ValueError, match=r"2 missing cells are forecast to take 3 h 00 min, max_hours allows 2.5 h; run"
    ):
        check_limit(sweep, blocks)
    assert check_limit(declared(3.0, max_hours=3.0), blocks) is None
    assert check_limit(declared(3.0), blocks) is None


def test_a_limit_that_cannot_be_held_against_anything_is_told() -> None:
    sweep = declared(None, max_hours=1.0)
    blocks = by_block(sweep, forecast_of(sweep, Path("nowhere"), []), states(sweep))
    note = check_limit(sweep, blocks)
    assert note is not None and "max_hours 1 cannot be held against 2 cells" in note and "device_tflops" in note


def test_operations_tell_the_time_of_cells_whose_rows_are_not_there(tmp_path: Path) -> None:
    """6 FLOPs a parameter and token: 6 x N x 2,000 / (0.001 x 10^12)."""
    overrides = SMALL | {"compute.store": str(tmp_path / "store"), "compute.device_tflops": 0.001}
    sweep = load_sweep(SWEEP | {"overrides": overrides, "recipe": "tiny"})
    cells = list(cells_of(sweep))
    known = forecast_of(sweep, tmp_path / "store", [])
    (needs,) = estimate(known, cells, open_store(cells[0].graph.compute)).values()
    assert needs.device_bytes is None, "a base model from nothing has no size before it is made"
    assert known.of(cells[0].place) is None
    # 1,000 parameters hold 16,000 bytes: weights, gradients and Adam's moments in float32.
    assert _by_operations(cells[0], 16_000) == pytest.approx(6 * 1000 * 2000 / 1e9)
