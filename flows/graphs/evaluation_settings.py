"""What is asked of a model by kind: settings with resolved revisions, and digests of what they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from smoltulu.flows.graphs.references import References
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationTask, ScoreKind
from smoltulu.schemas.reward_benchmarks import RewardBenchmark
from smoltulu.tasks.evaluation.definitions import definition_digest


@dataclass(frozen=True)
class Asked:
    """The part of `evaluation` that applies to a kind of model: what applies to others must not change its key.

    externals  name -> digest of a local file, or of a task's definition
    sources    of tasks or benchmarks
    """

    settings: EvaluationSettings
    externals: dict[str, str]
    sources: tuple[DataSource, ...]


def asked_of(kind: ScoreKind, settings: EvaluationSettings, references: References, *, has_pairs: bool) -> Asked | None:
    """A language model is asked tasks and samples, any other pairs (if there are some) and, of these a reward model,
    benchmarks. None where nothing is asked.

    Raises:
        ValueError: a revision that cannot be resolved, a file that is not there, a task with two sets of files.
    """
    if kind == "language_model":
        if not settings.tasks and settings.sampled is None:
            return None
        tasks, externals, sources = _tasks(settings.tasks, references)
        own = settings.model_copy(update={"tasks": tasks, "reward_benchmarks": None})
        return Asked(own, externals, sources)
    benchmarks = settings.reward_benchmarks if kind == "reward_model" else None
    if not (has_pairs or benchmarks):
        return None
    own = settings.model_copy(update={"tasks": (), "sampled": None, "reward_benchmarks": None})
    if not benchmarks:
        return Asked(own, {}, ())
    pinned, externals, sources = _benchmarks(benchmarks, references)
    return Asked(own.model_copy(update={"reward_benchmarks": pinned}), externals, sources)


def _tasks(
    tasks: Iterable[EvaluationTask], references: References
) -> tuple[tuple[EvaluationTask, ...], dict[str, str], tuple[DataSource, ...]]:
    """Tasks with resolved revisions, digests of their files by split and of their definitions, and all sources."""
    made: list[EvaluationTask] = []
    externals: dict[str, str] = {}
    sources: list[DataSource] = []
    for task in tasks:
        files = {}
        for split, source in task.files.items():
            (files[split],), digests = references.pinned([source])
            for digest in digests.values():
                if externals.setdefault(f"{task.name}.files.{split}", digest) != digest:
                    raise ValueError(
                        f"evaluation task {task.name!r} is listed twice with different files for its split {split!r}; "
                        "give both the same ones, or measure the second in a recipe of its own"
                    )
        made.append(task.model_copy(update={"files": files}))
        sources += files.values()
        if (definition := definition_digest(task.name)) is not None:
            externals[f"{task.name}.definition"] = definition
    return tuple(made), externals, tuple(sources)


def _benchmarks(
    benchmarks: Iterable[RewardBenchmark], references: References
) -> tuple[tuple[RewardBenchmark, ...], dict[str, str], tuple[DataSource, ...]]:
    """Benchmarks with resolved revisions, digests of their local files by label and position, and all sources."""
    made: list[RewardBenchmark] = []
    externals: dict[str, str] = {}
    sources: list[DataSource] = []
    for one in benchmarks:
        pinned, digests = references.pinned(one.sources)
        externals.update({f"{one.label}.{name}": digest for name, digest in digests.items()})
        made.append(one.model_copy(update={"sources": pinned}))
        sources += pinned
    return tuple(made), externals, tuple(sources)
