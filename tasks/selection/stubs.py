"""Stand-ins until the stages are there."""

from __future__ import annotations

from typing import Any

from smoltulu.schemas.selection import (
    SelectionHeadsConfig,
    SelectionHeadsInputs,
    SelectionHeadsOutputs,
    SelectionScoresConfig,
    SelectionScoresInputs,
    SelectionScoresOutputs,
)
from smoltulu.tasks.stage import Stage, StageContext


def _none(config: Any, inputs: Any, context: StageContext) -> Any:
    """Not there yet."""
    raise NotImplementedError


selection_heads = Stage(
    "selection_heads", 1, SelectionHeadsConfig, SelectionHeadsInputs, SelectionHeadsOutputs, _none, block="selector"
)
selection_scores = Stage(
    "selection_scores", 1, SelectionScoresConfig, SelectionScoresInputs, SelectionScoresOutputs, _none, block="selector"
)
