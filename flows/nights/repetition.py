"""The task that a night measures a second time with the same weights: it must give the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltulu.artifacts.layout import REPEATED
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.graphs.nodes import Node
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationCellConfig, EvaluationOutputs, EvaluationStageConfig
from smoltulu.tasks.comparison.evaluations import Measured, measured
from smoltulu.tasks.comparison.night import Repeated, repeated
from smoltulu.tasks.engine.environment import drift
from smoltulu.tasks.evaluation.stage import cell_configs


def tasks_of(node: Node) -> list[str]:
    """What an evaluation measures, each of which can be measured alone. Of a task that it asks twice, the first."""
    return [name for name, cell in _cells(node).items() if name == cell.name]


def alone(node: Node, task: str) -> Node:
    """The same evaluation of one of its tasks. Its cell is that of the whole, so that a refresh measures only that.

    Where it measures nothing else, it is the whole.
    """
    config, cells = node.config, _cells(node)
    assert isinstance(config, EvaluationStageConfig)
    if len(cells) == 1:
        return node
    cell = cells[task]
    only = {
        "tasks": (cell.task,) if cell.task else (),
        "sampled": cell.sampled,
        "reward_benchmarks": (cell.benchmark,) if cell.benchmark else None,
    }
    left_out = ("preference_eval",) if cell.benchmark else ()  # else its pairs would be measured as well
    return replace(
        node,
        name=f"{node.name}{REPEATED}",
        config=config.model_copy(update={"settings": config.settings.model_copy(update=only)}),
        inputs={name: binding for name, binding in node.inputs.items() if name not in left_out},
    )


def _cells(node: Node) -> Mapping[str, EvaluationCellConfig]:
    config = node.config
    assert isinstance(config, EvaluationStageConfig)
    return cell_configs(config, ComputeSettings(), has_pairs="preference_eval" in node.inputs)


def compared(model: str, task: str, before: ArtifactReference, again: ArtifactReference) -> Repeated:
    """Whether both gave the same samples; where not, what else differs between the two."""
    old, new = of_evaluation(before), of_evaluation(again)
    environments = [read_manifest(Path(one.path)).environment for one in (before, again)]
    changes = drift(*environments)
    # A benchmark has several scores; those of which no items are kept say nothing.
    found = [repeated(model, task, old.get(name), one, changes) for name, one in new.items() if one.items]
    if not found or any(one.reason for one in found):
        return next((one for one in found if one.reason), Repeated(model, task, reason="no items were kept"))
    different = [one for one in found if one.num_different]
    return Repeated(
        model,
        task,
        sum(one.num_items for one in found),
        sum(one.num_different for one in different),
        changes=tuple(dict.fromkeys(text for one in different for text in one.changes)),
    )


def of_evaluation(reference: ArtifactReference) -> Mapping[str, Measured]:
    """Task -> its score with its items. One of `READ_ERRORS` where they cannot be read."""
    outputs: Any = EvaluationOutputs.model_validate(reference.outputs)
    return measured(Path(reference.path), outputs)
