"""The task that a night measures a second time with the same weights: it must give the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.graphs.nodes import Node
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.evaluation import EvaluationOutputs, EvaluationStageConfig
from smoltulu.tasks.comparison.evaluations import Measured, measured
from smoltulu.tasks.comparison.night import Repeated, repeated
from smoltulu.tasks.engine.environment import drift

SUFFIX = "-again"


def tasks_of(node: Node) -> list[str]:
    """What an evaluation measures, each of which can be measured alone."""
    config = node.config
    assert isinstance(config, EvaluationStageConfig)
    if config.kind != "language_model":
        return ["preference" if config.kind == "reward_model" else "implicit_reward"]
    names = [task.name for task in config.settings.tasks]
    return [*dict.fromkeys(names), *(["verified_sampled"] if config.settings.sampled else [])]


def alone(node: Node, task: str) -> Node:
    """The same evaluation of one of its tasks."""
    config = node.config
    assert isinstance(config, EvaluationStageConfig)
    settings = config.settings
    if config.kind == "language_model":
        tasks = [one for one in settings.tasks if one.name == task][:1]
        sampled = settings.sampled if task == "verified_sampled" else None
        settings = settings.model_copy(update={"tasks": tuple(tasks), "sampled": sampled})
    return replace(node, name=f"{node.name}{SUFFIX}", config=config.model_copy(update={"settings": settings}))


def compared(model: str, task: str, before: ArtifactReference, again: ArtifactReference) -> Repeated:
    """Whether both gave the same samples; where not, what else differs between the two."""
    old, new = (of_evaluation(one).get(task) for one in (before, again))
    environments = [read_manifest(Path(one.path)).environment for one in (before, again)]
    return repeated(model, task, old, new, drift(*environments))


def of_evaluation(reference: ArtifactReference) -> Mapping[str, Measured]:
    """Task -> its score with its items. OSError, ValueError where they cannot be read."""
    outputs: Any = EvaluationOutputs.model_validate(reference.outputs)
    return measured(Path(reference.path), outputs)
