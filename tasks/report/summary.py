"""Summary of a run, its Markdown and its tables, from references and manifests. Pure: no files, no Prefect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from smoltulu.schemas.artifact import ArtifactReference, Manifest
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.evaluation import EvaluationOutputs, Measurement, Score
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.run import Makes, RunScore, RunSummary, StageRun
from smoltulu.schemas.verifier_audit import PassRatesOutputs, VerifierAuditOutputs
from smoltulu.tasks.report import text, verdict
from smoltulu.tasks.report.render import render

Outputs = TypeVar("Outputs", bound=BaseModel)
#: Counts in the details of a score, and how they are called.
_ODD = {
    "num_empty": "empty",
    "num_unparsed": "unparsed",
    "num_truncated": "cut at the limit",
    "num_left_cut": "prompts cut",
    "num_ungradable": "not graded",
    "num_too_long": "pairs too long",
    "num_ties": "ties",
}


def stage_runs(
    planned: Sequence[tuple[str, str, Makes]],
    made: Sequence[tuple[ArtifactReference, Manifest]],
    failed: Mapping[str, tuple[str, str]],
    seconds: Mapping[str, float],
    running: Collection[str] = (),
) -> tuple[StageRun, ...]:
    """One entry per planned (node, stage, what it makes), in that order: made, failed with its error, running, not run.

    `seconds` is node -> time spent in this run. A node without an entry counts the duration in its manifest, or 0 if
    cached: that duration belongs to the run that made it. `failed` is node -> (Failed or Cancelled, error).
    """
    by_node = {reference.node: (reference, manifest) for reference, manifest in made}
    runs = []
    for node, stage, makes in planned:
        run = StageRun(node=node, stage=stage, makes=makes, outcome="Not run", seconds=seconds.get(node, 0.0))
        if node in failed:
            outcome, error = failed[node]
            run = run.model_copy(update={"outcome": outcome, "error": _storable(error)})
        elif node in by_node:
            reference, manifest = by_node[node]
            own = 0.0 if reference.outcome == "Cached" else manifest.duration_seconds
            of_artifact = reference.model_dump(include={"outcome", "key", "path", "metrics"})
            forecast = None if reference.outcome == "Cached" else manifest.forecast
            run = run.model_copy(update={**of_artifact, "seconds": seconds.get(node, own), "forecast": forecast})
        elif node in running:
            run = run.model_copy(update={"outcome": "Running"})
        runs.append(run)
    return tuple(runs)


def outputs_of(model: type[Outputs], made: Manifest | ArtifactReference) -> Outputs | None:
    """Outputs of this kind; None if they are of another kind, or another version wrote them."""
    with suppress(ValidationError):
        return model.model_validate(made.outputs)
    return None


def collect_scores(made: Sequence[tuple[ArtifactReference, Manifest]]) -> tuple[RunScore, ...]:
    """Every score of every evaluation. An evaluation whose outputs cannot be read is left out."""
    scores = []
    for reference, manifest in made:
        if (outputs := outputs_of(EvaluationOutputs, manifest)) is None:
            continue
        kind = manifest.spec.config.get("kind", "language_model")
        for score in outputs.scores:
            fields = score.model_dump(exclude={"details"})
            fields |= {"counts": odd_answers(score), "is_near_chance": score.details.get("is_near_chance") is True}
            scores.append(RunScore(node=reference.node, kind=kind, subject=outputs.subject, **fields))
    return tuple(scores)


def odd_answers(score: Score) -> dict[str, int]:
    """How many answers, or prompts, were odd, by what they were; without zeros."""
    details = dict(score.details)
    if not details.keys() & {"num_empty", "num_unparsed", "num_left_cut"}:
        # Before answers were counted, `num_truncated` was the number of prompts that were cut.
        details["num_left_cut"] = details.pop("num_truncated", None)
    counts = {words: details.get(name) for name, words in _ODD.items()}
    return {words: count for words, count in counts.items() if isinstance(count, int) and count > 0}


def summarise(
    *,
    planned: Sequence[tuple[str, str, Makes]],
    made: Sequence[tuple[ArtifactReference, Manifest]],
    failed: Mapping[str, tuple[str, str]] | None = None,
    seconds: Mapping[str, float] | None = None,
    running: Collection[str] = (),
    error: str | None = None,
    **facts: Any,
) -> RunSummary:
    """The summary of a run.

    planned   (node, stage, what it makes) in the order of the graph
    made      every finished node, cached or new
    failed    node -> (Failed or Cancelled, error)
    seconds   node -> seconds spent in this run
    running   nodes that run now
    facts     the other fields of `RunSummary`
    """
    return RunSummary(
        error=None if error is None else _storable(error),
        stages=stage_runs(planned, made, failed or {}, seconds or {}, running),
        scores=collect_scores(made),
        **facts,
    )


@dataclass(frozen=True)
class ScoreCell:
    """One score as text."""

    value: str  # 0.703 ± 0.020
    num_samples: str
    limited: bool
    notes: tuple[str, ...] = ()  # near chance; 3 empty; 12 cut at the limit

    def __str__(self) -> str:
        notes = (", part of the task" if self.limited else "") + "".join(f", {note}" for note in self.notes)
        return f"{self.value} (n = {self.num_samples}{notes})"


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task."""

    names: tuple[str, ...]
    source: str  # shots, harness, version of the task
    cells: tuple[ScoreCell | None, ...]  # one per column; None if not measured


@dataclass(frozen=True)
class ScoreTable:
    """Scores as the page, the Markdown and the terminal show them."""

    title: str
    names: tuple[str, ...]  # heads of the names of a row
    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]

    @property
    def has_near_chance(self) -> bool:
        """Whether a score is within noise of chance."""
        return any("near chance" in cell.notes for row in self.rows for cell in row.cells if cell)

    @property
    def has_limited(self) -> bool:
        """Whether a score was measured on a part of its task."""
        return any(cell.limited for row in self.rows for cell in row.cells if cell)


def score_tables(scores: Sequence[RunScore]) -> list[ScoreTable]:
    """A table with a column per language model, and a table of preference pairs. A table without rows is left out."""
    # Columns are in order of appearance, which is the order of the run.
    subjects = list(dict.fromkeys(score.subject for score in scores if score.kind == "language_model"))
    grid: dict[tuple[str, str], dict[str, RunScore]] = {}
    for score in scores:
        if score.kind == "language_model":
            grid.setdefault((score.task, score.metric), {})[score.subject] = score
    rows = [_score_row(names, [cells.get(subject) for subject in subjects]) for names, cells in grid.items()]
    pairs = []
    for score in scores:
        if score.kind != "language_model":
            model = text.title(score.subject) + (", implicit reward" if score.kind == "implicit_reward" else "")
            pairs.append(_score_row((model, score.task, score.metric), [score]))
    tables = [
        ScoreTable(
            "Language models", ("Task", "Metric"), tuple(text.title(subject) for subject in subjects), tuple(rows)
        ),
        ScoreTable("Held-out preference pairs", ("Model", "Task", "Metric"), ("Score",), tuple(pairs)),
    ]
    return [table for table in tables if table.rows]


def score_cell(score: Measurement) -> ScoreCell:
    """One score as text."""
    counts, is_near_chance = {}, False
    if isinstance(score, RunScore):
        counts, is_near_chance = score.counts, score.is_near_chance
    elif isinstance(score, Score):
        counts, is_near_chance = odd_answers(score), score.details.get("is_near_chance") is True
    notes = [f"{count:,} {words}" for words, count in counts.items()]
    notes = ["near chance", *notes] if is_near_chance else notes
    return ScoreCell(text.score(score.value, score.stderr), f"{score.num_samples:,}", score.limited, tuple(notes))


def _score_row(names: tuple[str, ...], scores: Sequence[RunScore | None]) -> ScoreRow:
    sources = sorted({_source(score) for score in scores if score})
    return ScoreRow(names, "; ".join(sources), tuple(score_cell(score) if score else None for score in scores))


def _source(score: RunScore) -> str:
    shots = "" if score.num_fewshot is None else f"{score.num_fewshot}-shot · "
    return f"{shots}{score.harness}, task version {score.task_version}"


def markdown(summary: RunSummary) -> str:
    """The final Markdown artifact: scores, stages, paths."""
    seconds = text.seconds_between(summary.started_at, summary.finished_at)
    page = render(
        "run.md.jinja",
        summary=summary,
        seconds=seconds,
        tables=score_tables(summary.scores),
        headline=verdict.headline(summary.verdict),
        sentences=verdict.sentences(summary.verdict),
    )
    return page.rstrip() + "\n"


def stage_table(reference: ArtifactReference, outputs_model: type[BaseModel]) -> list[dict[str, str]]:
    """Rows {metric, value} of a stage's Prefect table artifact: scores or benchmarks first, then the metrics."""
    rows = [("outcome", reference.outcome), ("key", reference.key[: text.SHORT_KEY])]
    match outputs_of(outputs_model, reference):
        case None:
            rows.append(("outputs", "written by another version, not shown"))
        case EvaluationOutputs(scores=scores):
            rows += [(f"{score.task} {score.metric}", str(score_cell(score))) for score in scores]
        case ContaminationOutputs(benchmarks=benchmarks):
            for benchmark in benchmarks:
                found = f"{benchmark.num_contaminated:,} of {benchmark.num_instances:,} instances"
                not_checked = benchmark.not_checked and f"not checked: {benchmark.not_checked}"
                rows.append((f"found of {benchmark.name}", not_checked or found))
        case PreflightOutputs() as outputs:
            rows += preflight_figures(outputs).items()
        case VerifierAuditOutputs(groups=groups):
            for group in groups:
                rows.append((f"gold right: {group.title}", f"{group.num_gold_right:,} of {group.num_gold:,}"))
        case PassRatesOutputs(counts=counts):
            for pools in counts:
                found = ", ".join(f"{pool} {count:,}" for pool, count in pools.pools.items())
                rows.append((f"pools: {pools.verifier}, {pools.label or pools.source}", found))
    rows += [(name, text.number(value)) for name, value in sorted(reference.metrics.items())]
    return [{"metric": name, "value": value} for name, value in rows]


def preflight_figures(outputs: PreflightOutputs) -> dict[str, str]:
    """The figures of one preflight as text, by name."""
    source = max(outputs.num_source_rows, 1)
    left_out = outputs.num_empty + outputs.num_malformed
    run = outputs.dry_run
    trained = outputs.num_trained_tokens / max(outputs.num_tokens, 1)
    return {
        "Rows": f"{outputs.num_rows:,} of {outputs.num_source_rows:,}",
        "Dropped": text.percent(outputs.num_dropped / source),
        "Cut": text.percent(outputs.num_truncated / source),
        "Left out": f"{left_out:,}",
        "Tokens an epoch": f"{outputs.num_tokens:,}",
        "Trained": text.percent(trained) if outputs.num_trained_tokens else "–",
        "Mean length": f"{outputs.lengths.mean:,.0f}",
        "Longest": f"{outputs.lengths.percentiles.get('100', 0):,}",
        "Peak memory": "–" if run is None else text.size(run.peak_memory_bytes),
    }


def _storable(value: str) -> str:
    """Text without lone surrogates (of a damaged row), which UTF-8 cannot encode."""
    return value.encode("utf-8", "replace").decode()
