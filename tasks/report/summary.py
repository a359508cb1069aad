"""A run's summary, its Markdown and its tables, from references and manifests. Pure: no files, no Prefect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError

from smoltulu.schemas.artifact import ArtifactReference, Manifest
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.run import RunScore, RunSummary, StageRun
from smoltulu.tasks.report import text
from smoltulu.tasks.report.preflight import preflight_figures


def stage_runs(
    planned: Sequence[tuple[str, str]],
    made: Sequence[tuple[ArtifactReference, Manifest]],
    failed: Mapping[str, str],
    seconds: Mapping[str, float],
) -> tuple[StageRun, ...]:
    """One entry per planned (node, stage), in that order: made, failed with its error, or not run.

    `seconds` is node -> time spent in this run. Where a node is not in it, a made one counts its manifest's duration
    and a cached one 0: its duration belongs to the run that made it.
    """
    by_node = {reference.node: (reference, manifest) for reference, manifest in made}
    runs = []
    for node, stage in planned:
        if node in failed:
            run = StageRun(
                node=node, stage=stage, outcome="Failed", seconds=seconds.get(node, 0.0), error=_storable(failed[node])
            )
        elif node in by_node:
            reference, manifest = by_node[node]
            own = 0.0 if reference.outcome == "Cached" else manifest.duration_seconds
            run = StageRun(
                node=node,
                stage=stage,
                outcome=reference.outcome,
                seconds=seconds.get(node, own),
                key=reference.key,
                path=reference.path,
                metrics=reference.metrics,
            )
        else:
            run = StageRun(node=node, stage=stage, outcome="Not run", seconds=seconds.get(node, 0.0))
        runs.append(run)
    return tuple(runs)


def collect_scores(made: Sequence[tuple[ArtifactReference, Manifest]]) -> tuple[RunScore, ...]:
    """Every score of every evaluation, told by its outputs; one whose outputs cannot be read is left out."""
    scores = []
    for reference, manifest in made:
        try:
            outputs = EvaluationOutputs.model_validate(manifest.outputs)
        except ValidationError:
            continue
        kind = manifest.spec.config.get("kind", "language_model")
        for score in outputs.scores:
            fields = score.model_dump(exclude={"details"})
            scores.append(RunScore(node=reference.node, kind=kind, subject=outputs.subject, **fields))
    return tuple(scores)


def summarise(
    *,
    run_name: str,
    recipe: str,
    state: str,
    started_at: str,
    finished_at: str,
    planned: Sequence[tuple[str, str]],
    made: Sequence[tuple[ArtifactReference, Manifest]],
    failed: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    error: str | None = None,
    published: str | None = None,
    pushed: str = "",
    summary_path: str | None = None,
    report_path: str | None = None,
) -> RunSummary:
    """The summary of a run.

    planned   (node, stage) in the order of the graph
    made      what is there, cached or new
    failed    node -> error
    seconds   node -> seconds spent in this run
    """
    return RunSummary(
        run_name=run_name,
        recipe=recipe,
        state=state,
        started_at=started_at,
        finished_at=finished_at,
        error=None if error is None else _storable(error),
        stages=stage_runs(planned, made, failed or {}, seconds or {}),
        scores=collect_scores(made),
        published=published,
        pushed=pushed,
        summary_path=summary_path,
        report_path=report_path,
    )


def score_grid(scores: Sequence[RunScore]) -> dict[tuple[str, str], dict[str, RunScore]]:
    """(task, metric) -> subject -> score of the language models, in order of appearance."""
    grid: dict[tuple[str, str], dict[str, RunScore]] = {}
    for score in scores:
        if score.kind == "language_model":
            grid.setdefault((score.task, score.metric), {})[score.subject] = score
    return grid


def grid_columns(scores: Sequence[RunScore]) -> list[str]:
    """Subjects of the language-model scores, in order of appearance: that of the run."""
    return list(dict.fromkeys(score.subject for score in scores if score.kind == "language_model"))


def preference_label(score: RunScore) -> str:
    """Whose pairs a pair accuracy is about: `Reward model`, or `DPO, implicit reward`."""
    return text.title(score.subject) + (", implicit reward" if score.kind == "implicit_reward" else "")


def markdown(summary: RunSummary) -> str:
    """The final Markdown artifact: scores, stages, where things lie."""
    words = text.markdown_text
    seconds = text.seconds_between(summary.started_at, summary.finished_at)
    took = "" if seconds is None else f" in {text.duration(seconds)}"
    lines = [f"# {words(summary.recipe)}: {words(summary.state)}{took}", "", f"Run `{_code(summary.run_name)}`", ""]
    if summary.error:
        lines += [text.markdown_block(summary.error), ""]

    columns, grid = grid_columns(summary.scores), score_grid(summary.scores)
    if grid:
        lines += [_row("Task", "Metric", *(text.title(subject) for subject in columns))]
        lines += ["|---|---|" + "---:|" * len(columns)]
        for (task, metric), cells in grid.items():
            lines.append(_row(task, metric, *(_score_cell(cells.get(subject)) for subject in columns)))
        lines.append("")
    preferences = [score for score in summary.scores if score.kind != "language_model"]
    if preferences:
        lines += [_row("Preference", "Task", "Metric", "Score"), "|---|---|---|---:|"]
        lines += [_row(preference_label(s), s.task, s.metric, _score_cell(s)) for s in preferences]
        lines.append("")
    if not summary.scores:
        lines += ["No scores.", ""]

    lines += [_row("Stage", "Outcome", "Time", "Key"), "|---|---|---:|---|"]
    for run in summary.stages:
        lines.append(_row(run.node, run.outcome, text.duration(run.seconds), run.key[: text.SHORT_KEY]))
    lines.append("")
    if summary.published:
        lines.append(f"Model: `{_code(summary.published)}`")
    if summary.pushed:
        lines.append(words(summary.pushed))
    if summary.report_path:
        lines.append(f"Report: `{_code(summary.report_path)}`")
    return "\n".join(lines).rstrip() + "\n"


def stage_table(reference: ArtifactReference, outputs_model: type[BaseModel]) -> list[dict[str, str]]:
    """Rows {metric, value} of a stage's Prefect table artifact: scores or benchmarks first, then the metrics."""
    rows = [("outcome", reference.outcome), ("key", reference.key[: text.SHORT_KEY])]
    try:
        outputs = outputs_model.model_validate(reference.outputs)
        if isinstance(outputs, EvaluationOutputs):
            for score in outputs.scores:
                part = ", part of the task" if score.limited else ""
                value = f"{text.score(score.value, score.stderr)} (n = {score.num_samples:,}{part})"
                rows.append((f"{score.task} {score.metric}", value))
        if isinstance(outputs, ContaminationOutputs):
            for benchmark in outputs.benchmarks:
                found = f"{benchmark.num_contaminated:,} of {benchmark.num_instances:,} instances"
                rows.append(
                    (
                        f"found of {benchmark.name}",
                        f"not checked: {benchmark.not_checked}" if benchmark.not_checked else found,
                    )
                )
        if isinstance(outputs, PreflightOutputs):
            rows += preflight_figures(outputs).items()
    except ValidationError:
        rows.append(("outputs", "written by another version, not shown"))
    rows += [(name, text.number(value)) for name, value in sorted(reference.metrics.items())]
    return [{"metric": name, "value": value} for name, value in rows]


def _score_cell(score: RunScore | None) -> str:
    if score is None:
        return ""
    return f"{text.score(score.value, score.stderr)} (n = {score.num_samples:,}{', part' if score.limited else ''})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(text.markdown_text(cell) for cell in cells) + " |"


def _storable(value: str) -> str:
    """What UTF-8 cannot hold (a lone surrogate of a damaged row) would make the summary unwritable."""
    return value.encode("utf-8", "replace").decode()


def _code(value: str) -> str:
    return " ".join(value.split()).replace("`", "'")
