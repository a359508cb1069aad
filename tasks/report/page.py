"""The report of a run: one HTML page that needs nothing but itself.

Rows, names and errors come from data sets and models, so every value is escaped, and the page's own policy forbids it
to load anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.run import RunScore, RunSummary, StageRun
from smoltulu.tasks.report import text
from smoltulu.tasks.report.charts import MAX_POINTS, line_chart, lineage, parse_history
from smoltulu.tasks.report.markup import anchor, clean, e, preformatted, readable_json, table
from smoltulu.tasks.report.preflight import preflight_section
from smoltulu.tasks.report.style import STYLE
from smoltulu.tasks.report.summary import grid_columns, preference_label, score_grid

#: What a reader looks at first; everything else that was logged folds away below.
FIRST_CURVES = (
    "loss",
    "reward",
    "accuracy",
    "margin",
    "rewards/accuracies_normalised",
    "rewards/margins_normalised",
    "rewards/accuracies",
    "rewards/margins",
    "mean_token_accuracy",
    "kl",
    "entropy",
    "completions/clipped_ratio",
    "learning_rate",
    "tokens_per_second",
)
_MAX_FIRST_CURVES = 6
_MAX_OTHER_CURVES = 48
_MAX_LISTED_FILES = 40
_OUTCOME_CLASSES = {"Completed": "good", "Cached": "muted", "Resumed": "warn", "Failed": "bad", "Not run": "muted"}
_Outputs = TypeVar("_Outputs", bound=BaseModel)


def html_report(
    summary: RunSummary, manifests: Mapping[str, Manifest], folders: Mapping[str, Path], recipe_yaml: str
) -> str:
    """The whole page. `manifests` and `folders` are by node; nodes that were not made are simply not in them."""
    sections = [
        ("scores", "Scores", _scores(summary)),
        ("stages", "Stages", _stages(summary, manifests)),
        ("curves", "Training", _curves(summary, manifests, folders)),
        ("contamination", "Contamination", _contamination(summary, manifests)),
        ("data", "Data", _data(summary, manifests)),
        ("preflight", "Preflight", preflight_section(summary.stages, manifests)),
        ("lineage", "Lineage", _lineage(manifests) if manifests else ""),
        ("details", "Details", _details(summary, manifests)),
        ("recipe", "Recipe", f"<details><summary>Recipe as it was run</summary>{preformatted(recipe_yaml)}</details>"),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{place}">{name}</a>' for place, name, _ in shown)
    bodies = "".join(f'<section id="{place}"><h2>{name}</h2>{body}</section>' for place, name, body in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(summary.run_name)} · {e(summary.state)}</title><style>{STYLE}</style></head><body>"
        f"{_header(summary)}<nav>{links}</nav>{_stopped(summary)}<main>{bodies}</main>"
        "<footer>Every number comes from the manifests and history files of the artifacts. Times are UTC.</footer>"
        "</body></html>\n"
    )


def _header(summary: RunSummary) -> str:
    seconds = text.seconds_between(summary.started_at, summary.finished_at)
    style = {"Completed": "good", "Failed": "bad"}.get(summary.state, "warn")
    counts = {outcome: sum(run.outcome == outcome for run in summary.stages) for outcome in _OUTCOME_CLASSES}
    stages = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items() if count)
    facts = [
        ("State", f'<span class="{style}">{e(summary.state)}</span>', ""),
        ("Took", "unknown" if seconds is None else text.duration(seconds), ""),
        ("Started", e(text.moment(summary.started_at)), ""),
        ("Stages", e(stages or "none"), ""),
    ]
    if summary.published:
        facts.append(("Model folder", f"<code>{e(summary.published)}</code>", "wide"))
    if summary.pushed:
        facts.append(("Publication", e(summary.pushed), "wide"))
    items = "".join(f'<div class="{style}"><dt>{name}</dt><dd>{value}</dd></div>' for name, value, style in facts)
    return (
        f'<header><h1>{e(summary.recipe)}</h1><div class="muted">Run {e(summary.run_name)}</div>'
        f'<dl class="facts">{items}</dl></header>'
    )


def _stopped(summary: RunSummary) -> str:
    failed = [run for run in summary.stages if run.outcome == "Failed"]
    if not failed and not summary.error:
        return ""
    parts = [f"<b>Stopped at {e(run.node)}</b>{preformatted(run.error or 'no message')}" for run in failed]
    if summary.error and not failed:
        parts.append(f"<b>Stopped</b>{preformatted(summary.error)}")
    return f'<div class="stopped" role="alert">{"".join(parts)}</div>'


def _scores(summary: RunSummary) -> str:
    grid, columns = score_grid(summary.scores), grid_columns(summary.scores)
    preferences = [score for score in summary.scores if score.kind != "language_model"]
    if not grid and not preferences:
        return '<p class="muted">No evaluation has finished in this run.</p>'
    tables = ""
    if grid:
        rows = []
        for (task, metric), cells in grid.items():
            source = sorted({_source(score) for score in cells.values()})
            head = f'<th scope="row">{e(task)}<small>{e(metric)} · {e("; ".join(source))}</small></th>'
            rows.append(f"<tr>{head}{''.join(_score_cell(cells.get(subject)) for subject in columns)}</tr>")
        heads: list[str | tuple[str, str]] = ["Task", *((text.title(subject), "n") for subject in columns)]
        tables += table(heads, rows)
    if preferences:
        rows = [
            f'<tr><th scope="row">{e(preference_label(score))}<small>{e(score.metric)} on {e(score.task)} · '
            f"{e(_source(score))}</small></th>{_score_cell(score)}</tr>"
            for score in preferences
        ]
        tables += "<h3>Held-out preference pairs</h3>" + table(["Model", ("Score", "n")], rows)
    note = "± is one standard error; n is the number of samples."
    if any(score.limited for score in summary.scores):
        note += " Scores marked “part” were measured on a part of the task and compare with nothing published."
    return tables + f'<p class="muted">{note}</p>'


def _source(score: RunScore) -> str:
    shots = "" if score.num_fewshot is None else f"{score.num_fewshot}-shot · "
    return f"{shots}{score.harness}, task version {score.task_version}"


def _score_cell(score: RunScore | None) -> str:
    if score is None:
        return '<td class="n muted">–</td>'
    part = ' <span class="warn">part</span>' if score.limited else ""
    value = text.score(score.value, score.stderr)
    return f'<td class="n">{e(value)}<small>n = {score.num_samples:,}{part}</small></td>'


def _stages(summary: RunSummary, manifests: Mapping[str, Manifest]) -> str:
    rows = []
    for run in summary.stages:
        manifest = manifests.get(run.node)
        link = f'<a href="#{anchor(run.node)}">{e(run.node)}</a>' if manifest else e(run.node)
        metrics = " · ".join(f"{name} {text.number(value)}" for name, value in list(run.metrics.items())[:4])
        rows.append(
            f'<tr><th scope="row" class="tight">{link}</th><td class="tight">{_outcome(run)}{_made(run, manifest)}</td>'
            f'<td class="n">{_time(run)}</td><td class="key">{e(run.key[: text.SHORT_KEY])}</td>'
            f"<td>{e(metrics)}</td></tr>"
        )
    return table(["Stage", "Outcome", ("Time", "n"), "Key", "Metrics"], rows)


def _outcome(run: StageRun) -> str:
    return f'<span class="{_OUTCOME_CLASSES[run.outcome]}">{e(run.outcome)}</span>'


def _made(run: StageRun, manifest: Manifest | None) -> str:
    if manifest is None:
        return ""
    if run.outcome == "Cached":
        return f"<small>made in {text.duration(manifest.duration_seconds)}</small>"
    steps = ", ".join(f"{step:,}" for step in manifest.resumed_from_steps)
    return f"<small>from step {steps}</small>" if steps else ""


def _time(run: StageRun) -> str:
    return "–" if run.outcome == "Not run" else text.duration(run.seconds)


def _curves(summary: RunSummary, manifests: Mapping[str, Manifest], folders: Mapping[str, Path]) -> str:
    parts = []
    for run in summary.stages:
        manifest, folder = manifests.get(run.node), folders.get(run.node)
        if manifest is None or folder is None:
            continue
        series = parse_history(_history_lines(manifest, folder))
        if not series:
            continue
        first = [name for name in FIRST_CURVES if name in series][:_MAX_FIRST_CURVES]
        others = sorted(set(series) - set(first))
        charts = "".join(line_chart(clean(name), series[name]) for name in first)
        part = f'<h3>{e(text.title(run.stage))}</h3><div class="charts">{charts}</div>'
        if others:
            more = "".join(line_chart(clean(name), series[name]) for name in others[:_MAX_OTHER_CURVES])
            left_out = len(others) - _MAX_OTHER_CURVES
            note = f'<p class="muted">{left_out} more are in the history file.</p>' if left_out > 0 else ""
            words = "1 more metric" if len(others) == 1 else f"{len(others)} more metrics"
            part += (
                f'<details class="plain"><summary class="muted">{words}</summary>'
                f'<div class="charts">{more}</div>{note}</details>'
            )
        parts.append(part)
    if not parts:
        return ""
    note = (
        f"Over optimizer steps. Where more than {MAX_POINTS} values were logged, the line is the mean of neighbours "
        "and the band their range."
    )
    return f'<p class="muted">{note}</p>' + "".join(parts)


def _history_lines(manifest: Manifest, folder: Path) -> list[str]:
    """Lines of the artifact's history file; none where it names none, or one outside its own folder."""
    name = manifest.outputs.get("history_file")
    if not isinstance(name, str):
        return []
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return []
    return path.read_text("utf-8", errors="replace").splitlines()


def _contamination(summary: RunSummary, manifests: Mapping[str, Manifest]) -> str:
    groups = []
    for run in summary.stages:
        outputs = _outputs(ContaminationOutputs, manifests.get(run.node))
        if outputs is None:
            continue
        settings = manifests[run.node].spec.config.get("settings")
        rule = f"mode {settings.get('mode')}, policy {settings.get('policy')}" if isinstance(settings, dict) else ""
        head = (
            f"{outputs.num_rows_read:,} rows read, {outputs.num_rows_contaminated:,} with a hit, "
            f"{outputs.num_removed:,} removed, {outputs.num_rows:,} kept"
        )
        rows = "".join(_benchmark_row(benchmark) for benchmark in outputs.benchmarks)
        groups.append(
            f'<tbody class="group"><tr><th scope="rowgroup" colspan="6">{e(run.node.removeprefix("contamination-"))}'
            f"<small>{head}{e(' · ' + rule if rule else '')}</small></th></tr>{rows}</tbody>"
        )
    if not groups:
        return ""
    note = (
        "Found: instances of the benchmark that a training row holds. Short: found instances of under 8 terms, which "
        "are often there by accident."
    )
    heads: list[str | tuple[str, str]] = [
        "Benchmark",
        ("Instances", "n"),
        ("Found", "n"),
        ("Share", "n"),
        ("Short", "n"),
        ("Not matchable", "n"),
    ]
    return table(heads, groups, wrap_body=False) + f'<p class="muted">{note}</p>'


def _benchmark_row(benchmark: BenchmarkReport) -> str:
    name = f'<th scope="row">{e(benchmark.name)}</th>'
    if benchmark.not_checked:
        why = f'<span class="warn">not checked</span> <small>{e(benchmark.not_checked)}</small>'
        return f'<tr>{name}<td colspan="5">{why}</td></tr>'
    share = benchmark.share
    style = "n bad" if benchmark.num_contaminated else "n"
    skipped = benchmark.num_unmatchable + benchmark.num_skipped
    return (
        f'<tr>{name}<td class="n">{benchmark.num_instances:,}</td>'
        f'<td class="{style}">{benchmark.num_contaminated:,}</td>'
        f'<td class="{style}">{"–" if share is None else text.percent(share)}</td>'
        f'<td class="n">{benchmark.num_short_hits:,}</td><td class="n">{skipped:,}</td></tr>'
    )


def _data(summary: RunSummary, manifests: Mapping[str, Manifest]) -> str:
    rows = []
    for run in summary.stages:
        outputs = _outputs(DatasetOutputs, manifests.get(run.node))
        for position, source in enumerate(outputs.sources if outputs else ()):
            name = run.node.removeprefix("dataset-") if position == 0 else ""
            reasons = "".join(f"<small>{e(reason)}: {count:,}</small>" for reason, count in source.reasons.items())
            examples = "".join(preformatted(example) for example in source.examples)
            if examples:
                examples = f'<details class="plain"><summary>first examples</summary>{examples}</details>'
            style = "n warn" if source.num_malformed else "n"
            rows.append(
                f'<tr><th scope="row" class="tight">{e(name)}</th><td>{e(source.label)}{reasons}{examples}</td>'
                f'<td class="n">{source.num_rows:,}</td><td class="{style}">{source.num_malformed:,}</td></tr>'
            )
    return table(["Set", "Source", ("Rows", "n"), ("Malformed", "n")], rows) if rows else ""


def _lineage(manifests: Mapping[str, Manifest]) -> str:
    by_key: dict[str, str] = {}
    for node, manifest in manifests.items():
        by_key.setdefault(manifest.key, node)
    parents = {
        node: {by_key[record.key] for record in manifest.inputs.values() if by_key.get(record.key, node) != node}
        for node, manifest in manifests.items()
    }
    labels = {}
    for node, manifest in manifests.items():
        stage = manifest.spec.stage
        kind = stage.replace("_", "-")
        name = node.removeprefix(f"{kind}-") or node
        second = f"{stage if name != node else ''} {manifest.key[:6]}".strip()
        labels[node] = (clean(name), clean(second), "model" if _outputs(ModelOutputs, manifest) else "")
    note = (
        "Top to bottom: who was made from what, with the first digits of the key. A line that a longer way implies is "
        "left out."
    )
    return f'<p class="muted">{note}</p><div class="scroll">{lineage(parents, labels)}</div>'


def _details(summary: RunSummary, manifests: Mapping[str, Manifest]) -> str:
    parts = []
    for run in summary.stages:
        manifest = manifests.get(run.node)
        if manifest is None:
            continue
        facts = [
            ("Key", f"<code>{e(manifest.key)}</code>"),
            ("Content digest", f"<code>{e(manifest.digest)}</code>"),
            ("Folder", f"<code>{e(run.path)}</code>"),
            ("Made", f"{e(text.moment(manifest.started_at))}, in {text.duration(manifest.duration_seconds)}"),
        ]
        if manifest.resumed_from_steps:
            facts.append(("Resumed from step", ", ".join(f"{step:,}" for step in manifest.resumed_from_steps)))
        made_from = "; ".join(f"{name}: {record.stage} {record.key[:8]}" for name, record in manifest.inputs.items())
        facts.append(("Made from", e(made_from or "nothing in the store")))
        rows = [f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts]
        body = table([], rows)
        if manifest.metrics:
            metric_rows = [
                f'<tr><th scope="row">{e(name)}</th><td class="n">{e(text.number(value))}</td></tr>'
                for name, value in sorted(manifest.metrics.items())
            ]
            body += table(["Metric", ("Value", "n")], metric_rows)
        for name, value in (
            ("Config (science)", manifest.spec.config),
            ("Outside the store", manifest.spec.externals),
            ("Outputs", manifest.outputs),
            ("Machinery", manifest.compute),
            ("Environment", manifest.environment),
        ):
            if value:
                body += (
                    f'<details class="plain"><summary>{name}</summary>{preformatted(readable_json(value))}</details>'
                )
        body += _files(manifest)
        parts.append(
            f'<details id="{anchor(run.node)}"><summary>{e(run.node)} {_outcome(run)}</summary>'
            f'<div class="inside">{body}</div></details>'
        )
    return "".join(parts)


def _files(manifest: Manifest) -> str:
    if not manifest.files:
        return ""
    total = sum(record.size for record in manifest.files.values())
    listed = sorted(manifest.files.items())[:_MAX_LISTED_FILES]
    lines = [f"{record.blake3[:12]}  {text.size(record.size):>10}  {name}" for name, record in listed]
    if len(manifest.files) > len(listed):
        lines.append(f"… and {len(manifest.files) - len(listed)} more")
    head = f"{len(manifest.files):,} files, {text.size(total)}"
    return f'<details class="plain"><summary>{head}</summary>{preformatted(chr(10).join(lines))}</details>'


def _outputs(model: type[_Outputs], manifest: Manifest | None) -> _Outputs | None:
    """A stage's outputs; None where it was not made, or its outputs were written by a version that differs."""
    if manifest is None:
        return None
    try:
        return model.model_validate(manifest.outputs)
    except ValidationError:
        return None
