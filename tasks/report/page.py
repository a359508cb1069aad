"""Report of a run: one self-contained HTML page.

This module prepares plain values; templates/run.html.jinja, verdict.html.jinja and sections.html.jinja lay them out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.held_out import HeldOutOutputs
from smoltulu.schemas.held_out_loss import HeldOutLossOutputs
from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.schemas.mixture import MixtureOutputs
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.near_duplicates import NearDuplicateOutputs
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.run import Outcome, RunSummary, StageRun
from smoltulu.schemas.sampled import SampledRowsOutputs
from smoltulu.schemas.selection import SET_KINDS, SelectionOutputs
from smoltulu.schemas.verdict import AnsweredPrompt, Verdict
from smoltulu.schemas.verifier_audit import PassRatesOutputs, VerifierAuditOutputs
from smoltulu.tasks.report import text, verdict
from smoltulu.tasks.report.charts import Point, parse_history
from smoltulu.tasks.report.render import render
from smoltulu.tasks.report.summary import Outputs, outputs_of, preflight_figures, score_tables
from smoltulu.tasks.report.tables import FORMATS, tables_of_run, tables_section
from smoltulu.tasks.tables.values import Table

#: Metrics that are shown first; all others are folded below them.
FIRST_CURVES = (
    "loss",
    "held_out/loss",
    "reward",
    "held_out/accuracy",
    "held_out/kinds/accuracy",
    "explained_variance",
    "value_loss",
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
#: Batches of rollouts at the end of a training whose samples are shown, besides the first.
_NUM_LAST_STEPS = 2


def html_report(
    summary: RunSummary,
    manifests: Mapping[str, Manifest],
    folders: Mapping[str, Path],
    recipe_yaml: str,
    answers: Sequence[AnsweredPrompt] = (),
) -> str:
    """The whole page. `manifests` and `folders` are by node, without nodes that were not made.

    A page may be written while the run goes on: what is not there yet is said.
    """
    runs = [(run, manifests.get(run.node)) for run in summary.stages]
    datasets = _outputs_of(DatasetOutputs, runs)
    preflights = _outputs_of(PreflightOutputs, runs)
    sections: list[tuple[str, str, Any]] = [
        ("scores", "Scores", score_tables(summary.scores)),
        ("tables", "Tables", tables_section(*run_tables(manifests, folders), beside=True)),
        ("answers", "Answers side by side", answers),
        ("stages", "Stages", runs),
        ("curves", "Training", _curves(runs, folders)),
        ("held_out", "Held-out prompts", _held_out(runs)),
        ("held_out_loss", "Held-out loss", _held_out_losses(runs)),
        ("samples", "What the policy wrote", _samples(runs, folders)),
        ("sampled", "Rows that a model wrote", _outputs_of(SampledRowsOutputs, runs)),
        ("contamination", "Contamination", _outputs_of(ContaminationOutputs, runs)),
        (
            "near_duplicates",
            "Near-duplicates",
            [(name, outputs) for name, _, outputs in _outputs_of(NearDuplicateOutputs, runs)],
        ),
        (
            "selection",
            "Selection of training rows",
            [(name, outputs) for name, _, outputs in _outputs_of(SelectionOutputs, runs)],
        ),
        ("data", "Data", _sets_of(datasets)),
        ("mixtures", "Mixtures", _mixtures(runs, preflights)),
        ("preflight", "Preflight", [(name, preflight_figures(outputs)) for name, _, outputs in preflights]),
        ("verifier_audit", "Verifier audit", _verifier_audit(runs)),
        ("lineage", "Lineage", _lineage(manifests) if manifests else None),
        ("details", "Details", [(run, manifest) for run, manifest in runs if manifest]),
        ("recipe", "Recipe", recipe_yaml),
    ]
    outcomes = Counter(run.outcome for run in summary.stages)
    return render(
        "run.html.jinja",
        summary=summary,
        said=_said(summary, runs),
        searchable=bool(answers),
        seconds=text.seconds_between(summary.started_at, summary.finished_at or summary.written_at),
        outcomes=", ".join(f"{outcomes[name]} {name.lower()}" for name in get_args(Outcome) if outcomes[name]),
        # The section of scores also says that there are none.
        sections=[section for section in sections if section[2] or section[0] == "scores"],
    )


@dataclass(frozen=True)
class _Measured:
    """What of a run is in tables, equal where manifests and folders are."""

    key: tuple[tuple[str, str, str], ...]
    manifests: dict[str, Manifest] = field(compare=False)
    folders: Mapping[str, Path] = field(compare=False)


def run_tables(manifests: Mapping[str, Manifest], folders: Mapping[str, Path]) -> tuple[list[Table], list[str]]:
    """The tables of a run, and what could not be read. Kept until an artifact of those that are in tables is made."""
    key = tuple(
        (node, str(folders.get(node)), repr(manifest))
        for node, manifest in manifests.items()
        if any(outputs_of(model, manifest) for model in (EvaluationOutputs, ContaminationOutputs, LanguageOutputs))
    )
    made, problems = _made_tables(_Measured(key, dict(manifests), folders))
    if problems:
        _made_tables.cache_clear()  # what cannot be read may be read for the next page
    return made, problems


@lru_cache(maxsize=2)  # the page is written after every stage, and few of them are in tables
def _made_tables(measured: _Measured) -> tuple[list[Table], list[str]]:
    return tables_of_run(measured.manifests, measured.folders)


def table_files(manifests: Mapping[str, Manifest], folders: Mapping[str, Path]) -> dict[str, str]:
    """Name -> text of the files that lie beside a report; none where nothing is in tables."""
    tables, _ = run_tables(manifests, folders)
    return {f"tables.{name}": FORMATS[name](tables) for name in ("html", "csv")} if tables else {}


@dataclass(frozen=True)
class Made:
    """The newest language model of a run, and the models that it was made from, itself included."""

    title: str
    num_parameters: int
    path: list[str]


@dataclass(frozen=True)
class Said:
    """The first screen."""

    verdict: Verdict
    made: Made | None
    headline: str
    tone: str
    sentences: list[tuple[str, str]]
    chats: list[str]
    num_there: int
    running: list[str]
    absent: list[tuple[str, str]]  # evaluations that are not there, and what became of them


def _said(summary: RunSummary, runs: Sequence[tuple[StageRun, Manifest | None]]) -> Said:
    models = {
        run.node: (run, manifest, outputs)
        for run, manifest in runs
        if manifest and run.makes == "language model" and (outputs := outputs_of(ModelOutputs, manifest)) is not None
    }
    made = None
    if models:
        last, _, outputs = list(models.values())[-1]
        made = Made(text.title(last.stage), outputs.num_parameters, [text.title(run.stage) for run in _path(models)])
    there = ("Completed", "Cached", "Resumed")
    return Said(
        verdict=summary.verdict,
        made=made,
        headline=verdict.headline(summary.verdict),
        tone=verdict.tone(summary.verdict),
        sentences=verdict.sentences(summary.verdict),
        chats=[f"smoltulu chat {summary.run_name}:{node}" for node in models],
        num_there=sum(run.outcome in there for run in summary.stages),
        running=[run.node for run in summary.stages if run.outcome in ("Running", "Killed")],
        absent=[
            (run.node, run.outcome) for run in summary.stages if run.makes == "scores" and run.outcome not in there
        ],
    )


def _path(models: Mapping[str, tuple[StageRun, Manifest, ModelOutputs]]) -> list[StageRun]:
    """From the first model to the last, each made from the one before it."""
    by_key = {manifest.key: (run, manifest) for run, manifest, _ in models.values()}
    run, manifest, _ = list(models.values())[-1]
    path = [run]
    while (start := manifest.inputs.get("model")) is not None and start.key in by_key and len(path) < len(models):
        run, manifest = by_key[start.key]
        path.insert(0, run)
    return path


def _verifier_audit(runs: Sequence[tuple[StageRun, Manifest | None]]) -> dict[str, Any]:
    """Audited verifiers, and pools of prompts; empty where neither was made."""
    audits = [outputs for _, _, outputs in _outputs_of(VerifierAuditOutputs, runs)]
    measured = [outputs for _, _, outputs in _outputs_of(PassRatesOutputs, runs)]
    left_out = [manifest.spec.config.get("leave_out") for _, manifest in runs if manifest is not None]
    named = sorted({str(pool) for pools in left_out if isinstance(pools, (list, tuple)) for pool in pools})
    return {"audits": audits, "measured": measured, "left_out": named} if audits or measured else {}


def _sets_of(
    datasets: Sequence[tuple[str, Manifest, DatasetOutputs]],
) -> list[tuple[str, Manifest, DatasetOutputs]]:
    """Those with rows, without the single sources that a selection reads once more: `dataset-SET-NUMBER`."""
    of_source = re.compile(rf"({'|'.join(SET_KINDS)})-\d+")
    return [one for one in datasets if one[2].sources and not of_source.fullmatch(one[0])]


def _outputs_of(
    model: type[Outputs], runs: Sequence[tuple[StageRun, Manifest | None]]
) -> list[tuple[str, Manifest, Outputs]]:
    """(name without the stage, manifest, outputs) of every finished node with such outputs."""
    return [
        (run.node.removeprefix(f"{run.stage.replace('_', '-')}-"), manifest, outputs)
        for run, manifest in runs
        if manifest is not None and (outputs := outputs_of(model, manifest)) is not None
    ]


@dataclass(frozen=True)
class TrainingCurves:
    """Logged metrics of a training over optimizer steps."""

    title: str
    first: list[tuple[str, list[Point]]]  # those of FIRST_CURVES
    others: list[tuple[str, list[Point]]]
    num_left_out: int


def _curves(runs: Sequence[tuple[StageRun, Manifest | None]], folders: Mapping[str, Path]) -> list[TrainingCurves]:
    curves = []
    for run, manifest in runs:
        folder = folders.get(run.node)
        if manifest is None or folder is None:
            continue
        series = parse_history(_lines(manifest, folder, "history_file"))
        first = [(name, series.pop(name)) for name in FIRST_CURVES if name in series]
        others = sorted([*first[_MAX_FIRST_CURVES:], *series.items()])
        if first or others:
            shown = others[:_MAX_OTHER_CURVES]
            title = text.title(run.stage)
            curves.append(TrainingCurves(title, first[:_MAX_FIRST_CURVES], shown, len(others) - len(shown)))
    return curves


def _held_out(runs: Sequence[tuple[StageRun, Manifest | None]]) -> list[tuple[str, HeldOutOutputs]]:
    """Title and result of every training that had held-out prompts."""
    return [
        (text.title(manifest.spec.stage), outputs.held_out)
        for _, manifest, outputs in _outputs_of(ModelOutputs, runs)
        if outputs.held_out is not None
    ]


def _held_out_losses(
    runs: Sequence[tuple[StageRun, Manifest | None]],
) -> list[tuple[str, HeldOutLossOutputs, str]]:
    """Title, result and unit of every training that had held-out rows."""
    return [
        (text.title(manifest.spec.stage), found, "pairs" if found.last.accuracy is not None else "supervised tokens")
        for _, manifest, outputs in _outputs_of(ModelOutputs, runs)
        if (found := outputs.held_out_loss) is not None
    ]


def _mixtures(
    runs: Sequence[tuple[StageRun, Manifest | None]], preflights: Sequence[tuple[str, Manifest, PreflightOutputs]]
) -> list[tuple[str, MixtureOutputs, PreflightOutputs | None]]:
    """Every mixture, with the first preflight that read its rows."""
    read = {
        record.key: outputs
        for name, manifest, outputs in reversed(preflights)
        if (record := manifest.inputs.get("dataset")) is not None and not name.endswith("held-out")
    }
    return [(name, outputs, read.get(manifest.key)) for name, manifest, outputs in _outputs_of(MixtureOutputs, runs)]


@dataclass(frozen=True)
class PolicySamples:
    """Completions of a training's first and last rollouts."""

    title: str
    rows: list[dict[str, Any]]  # see tasks/training/rollout_log.py
    num_steps: int


def _samples(runs: Sequence[tuple[StageRun, Manifest | None]], folders: Mapping[str, Path]) -> list[PolicySamples]:
    found = []
    for run, manifest in runs:
        folder = folders.get(run.node)
        # Evaluations have samples too, of another form.
        if manifest is None or folder is None or outputs_of(ModelOutputs, manifest) is None:
            continue
        rows = list(_json_objects(_lines(manifest, folder, "samples_file")))
        steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
        shown = [row for row in rows if row.get("step") in (*steps[:1], *steps[-_NUM_LAST_STEPS:])]
        if shown:
            found.append(PolicySamples(text.title(run.stage), shown, len(steps)))
    return found


def _json_objects(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _lines(manifest: Manifest, folder: Path, output: str) -> list[str]:
    """Lines of a file of the artifact; none if it has no such file, or names one outside its folder."""
    name = manifest.outputs.get(output)
    if not isinstance(name, str):
        return []
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return []
    return path.read_text("utf-8", errors="replace").split("\n")


def _lineage(manifests: Mapping[str, Manifest]) -> tuple[dict[str, set[str]], dict[str, tuple[str, str, str]]]:
    """Parents of every node, and the two lines and the class of its box."""
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
        labels[node] = (name, second, "model" if outputs_of(ModelOutputs, manifest) else "")
    return parents, labels
