"""Ten steps of each stage give the pinned losses; see `golden_losses.py` for the tolerance and how to update them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.golden_losses import FILE, NUM_STEPS, STAGES, TOLERANCE, environment, golden_losses

PINNED = json.loads(FILE.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_losses_of_ten_steps(stage: str, tmp_path: Path) -> None:
    losses = golden_losses(stage, tmp_path)
    assert len(losses) == NUM_STEPS
    assert losses == pytest.approx(PINNED["losses"][stage], rel=TOLERANCE), (
        f"the losses of {stage} changed (pinned with {PINNED['environment']}, this is {environment()}); "
        "where that is meant: python -m tests.golden_losses --write"
    )


def test_pinned_losses_say_something() -> None:
    """Every stage moves by far more than the tolerance from step to step, so a changed step cannot hide in it."""
    for losses in PINNED["losses"].values():
        steps = [abs(a - b) / a for a, b in pairwise(losses)]
        assert sorted(steps)[len(steps) // 2] > 50 * TOLERANCE
