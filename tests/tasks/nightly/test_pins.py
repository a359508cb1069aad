"""The pinned baseline: who and when, what held before, and what gc keeps for it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.tasks.nightly import pins
from tests.tasks.nightly.test_history import NODE, model


def test_a_pin_says_who_and_when_and_stays_recorded_when_it_is_let_go(tmp_path: Path) -> None:
    assert pins.read_pins(tmp_path, "tiny").held() == {}
    assert pins.pin(tmp_path, "tiny", {NODE: model(1), "evaluation-dpo": model(2)}, "first-run") == {}
    before = pins.pin(tmp_path, "tiny", {NODE: model(3)}, "best")
    assert before[NODE].measured == model(1) and before[NODE].named == "first-run"
    held = pins.read_pins(tmp_path, "tiny").held()
    assert {node: pin.measured for node, pin in held.items()} == {NODE: model(3), "evaluation-dpo": model(2)}
    assert "@" in held[NODE].pinned_by
    assert abs((datetime.now(UTC) - datetime.fromisoformat(held[NODE].pinned_at)).total_seconds()) < 60
    let_go = pins.unpin(tmp_path, "tiny", [])
    assert set(let_go) == {NODE, "evaluation-dpo"} and pins.read_pins(tmp_path, "tiny").held() == {}
    recorded = pins.read_pins(tmp_path, "tiny").pins
    assert [one.measured for one in recorded] == [model(1), model(2), model(3)]
    assert all(one.unpinned_at and one.unpinned_by for one in recorded)


def test_what_is_not_pinned_cannot_be_let_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny has no baseline of any evaluation; pinned: none"):
        pins.unpin(tmp_path, "tiny", [])
    pins.pin(tmp_path, "tiny", {NODE: model(1)}, "best")
    with pytest.raises(ValueError, match="no baseline of evaluation-dpo; pinned: evaluation-sft"):
        pins.unpin(tmp_path, "tiny", ["evaluation-dpo"])


def test_a_damaged_record_is_not_no_baseline(tmp_path: Path) -> None:
    """A night that passed it over would say that nothing is worse than it."""
    pins.pin(tmp_path, "tiny", {NODE: model(1)}, "best")
    file = tmp_path / "history" / "tiny" / "pins.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"pins.json cannot be read: it is not what was written; move it away"):
        pins.read_pins(tmp_path, "tiny")
    with pytest.raises(ValueError, match=r"pins.json cannot be read, and gc would remove what it names"):
        Catalogue(tmp_path).kept_by_nights()
