"""Content of `smoltulu runs` and `smoltulu show`: as plain values (for --json) and as Rich text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from smoltulu.artifacts import readable
from smoltulu.artifacts.checkpoints import newest_checkpoint, num_steps_of
from smoltulu.artifacts.layout import CHECKPOINTS, SPEC, WORK, reason_of
from smoltulu.artifacts.manifests import Ref, dig, num_bytes_of, read_json, scores_of
from smoltulu.artifacts.upkeep.catalogue import Catalogue, state_of
from smoltulu.artifacts.upkeep.lineage import Relative, ancestors, descendants, planned_inputs
from smoltulu.flows.cli.output import table
from smoltulu.schemas.artifact import MANIFEST_SCHEMA_VERSION, ExtendedTraining, Manifest
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.run import RunRecord
from smoltulu.tasks.report.text import local_minute

_COLOURS = {"Completed": "green", "Failed": "red", "Cancelled": "yellow"}
_STATE_COLOURS = {**_COLOURS, "Running": "cyan", "Crashed": "red", "Crashed?": "red"}
_OUTCOME_COLOURS = {**_COLOURS, "Cached": "green", "Resumed": "yellow"}
_NUM_FILES_SHOWN = 20
_NUM_DESCENDANTS_SHOWN = 40
_NUM_SCORES_SHOWN = 4
_VALUE_WIDTH = 100


# Runs


def run_values(catalogue: Catalogue, run: RunRecord) -> dict[str, Any]:
    """Values of one run: state, times, counts, size of its artifacts, scores of its last model."""
    manifests = {ref: manifest for ref in refs_of_run(run).values() if (manifest := catalogue.known(ref))}
    outcomes = list(run.outcomes.values())
    return {
        "run": run.run_name,
        "recipe": run.recipe,
        "state": state_of(run),
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "seconds": readable.seconds_between(run.started_at, run.finished_at),
        "num_stages": len(run.keys),
        "num_made": sum(outcome in ("Completed", "Resumed") for outcome in outcomes),
        "num_cached": outcomes.count("Cached"),
        "num_failed": outcomes.count("Failed"),
        "num_bytes": sum(_num_bytes(manifest) for manifest in manifests.values()),
        "scores": _last_model_scores(list(manifests.values())),
    }


def runs_table(runs: list[dict[str, Any]]) -> Table:
    """A table with one line per run."""
    made = table("run", "recipe", "state", "when", "took", "stages", "last model", "disk")
    for run in runs:
        counts = [f"{run[f'num_{name}']} {name}" for name in ("made", "cached", "failed") if run[f"num_{name}"]]
        made.add_row(
            run["run"],
            run["recipe"],
            _coloured(run["state"], _STATE_COLOURS),
            local_minute(run["started_at"]),
            "" if run["seconds"] is None else readable.duration(run["seconds"]),
            " · ".join(counts) or f"{run['num_stages']} planned",
            scores_text(run["scores"], with_subject=True),
            readable.size(run["num_bytes"]),
        )
    return made


def _last_model_scores(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of the language model that was evaluated last; of a run without one, all scores.

    manifests   in the order of the run
    """
    scores = [score for manifest in manifests for score in scores_of(manifest)]
    measured = [score for score in scores if score["kind"] == "language_model"]
    return [score for score in measured if score["subject"] == measured[-1]["subject"]] or scores


# One run


def run_details(catalogue: Catalogue, run: RunRecord) -> dict[str, Any]:
    """Everything about a run."""
    stages = []
    for node, ref in refs_of_run(run).items():
        manifest = catalogue.known(ref)
        stages.append(
            {
                "node": node,
                "stage": ref.stage,
                "key": ref.key,
                "outcome": run.outcomes.get(node, ""),
                "finished_at": manifest.get("finished_at"),
                "made_in_seconds": manifest.get("duration_seconds"),
                "num_bytes": _num_bytes(manifest) if manifest else None,
                "scores": scores_of(manifest),
            }
        )
    return {"kind": "run", **run.model_dump(mode="json"), "state": state_of(run), "stages": stages}


def run_view(run: dict[str, Any]) -> RenderableType:
    """A run and its stages."""
    head = Table.grid(padding=(0, 2))
    seconds = readable.seconds_between(run["started_at"], run["finished_at"])
    head.add_row("run", run["run_name"])
    head.add_row("recipe", run["recipe"])
    head.add_row("state", _coloured(run["state"], _STATE_COLOURS))
    head.add_row("started", local_minute(run["started_at"]))
    head.add_row("took", "" if seconds is None else readable.duration(seconds))
    head.add_row("process", f"{run['pid']} on {run['host']}")
    if run["report_path"]:
        head.add_row("report", run["report_path"])
    made = table("stage", "outcome", "key", "made", "made in", "size", "scores")
    for stage in run["stages"]:
        is_there = stage["num_bytes"] is not None
        made.add_row(
            stage["node"],
            _coloured(stage["outcome"], _OUTCOME_COLOURS),
            stage["key"][:12],
            local_minute(stage["finished_at"]) if is_there else Text("not in the store", "dim"),
            readable.duration(stage["made_in_seconds"]) if isinstance(stage["made_in_seconds"], (int, float)) else "",
            readable.size(stage["num_bytes"]) if is_there else "",
            scores_text(stage["scores"]),
        )
    return Group(head, made)


# One artifact


def artifact_details(catalogue: Catalogue, ref: Ref) -> dict[str, Any]:
    """Everything about an artifact. ValueError where its folder holds nothing that can be read."""
    folder = catalogue.folder(ref)
    details: dict[str, Any] = {
        "kind": "artifact",
        "stage": ref.stage,
        "key": ref.key,
        "folder": str(folder.path),
        "generation": folder.newest,
        "tags": [name for name, tag in catalogue.tags().items() if (tag.stage, tag.key) == ref],
        "problems": [],
        "set_aside": {name: reason_of(folder.path / name) for name in folder.damaged},
        "other_generations": [name for name in folder.whole if name != folder.newest],
    }
    manifest: dict[str, Any] = {}
    if folder.newest is not None:
        details["folder"] = str(folder.path / folder.newest)
        try:
            manifest = catalogue.manifest(ref, folder.newest)
            details["problems"] += _problems(manifest, ref)
        except ValueError as error:
            details["problems"].append(f"its manifest {error}")
    elif folder.has_spec:
        try:
            spec = read_json(folder.path / SPEC)
            manifest = {"spec": spec, "inputs": planned_inputs(catalogue, spec)}
        except ValueError as error:
            details["problems"].append(f"its spec {error}")
    elif not (WORK in folder.begun or folder.damaged or folder.headless):
        raise ValueError(f"{catalogue.root} has no artifact {ref.stage}/{ref.key}")
    checkpoint = newest_checkpoint(folder.path / WORK / CHECKPOINTS)
    if checkpoint is not None:
        details["resumable"] = {"step": checkpoint[0], "num_steps": num_steps_of(checkpoint[1])}
    if folder.last_used:
        details["last_used"] = datetime.fromtimestamp(folder.last_used / 1e9).astimezone().isoformat(timespec="seconds")
    details = {**manifest, **details}
    details["num_bytes"] = _num_bytes(manifest)
    details["scores"] = catalogue.scores(ref)
    details["ancestors"] = ancestors(catalogue, manifest)
    return details


def artifact_view(catalogue: Catalogue, details: dict[str, Any]) -> RenderableType:
    """An artifact: its identity, its inputs, and what was made from it."""
    parts: list[RenderableType] = [_identity(details)]
    parts += [Text(f"problem: {problem}", "red") for problem in details["problems"]]
    config = dict(_flat(dig(details, "spec", "config") or {}))
    externals = {f"external {name}": value for name, value in (dig(details, "spec", "externals") or {}).items()}
    parts.append(_pairs("config", {**config, **externals}))
    parts.append(_pairs("scores", {_score_name(score): _score_value(score) for score in details["scores"]}))
    metrics = details.get("metrics")
    # Those of an evaluation are its scores.
    parts.append(_pairs("metrics", metrics if isinstance(metrics, dict) and not scores_of(details) else {}))
    parts.append(_files(details))
    environment = dict(_flat(details.get("environment") or {}))
    parts.append(_pairs("environment", {name.removeprefix("packages."): value for name, value in environment.items()}))
    found, num_left = descendants(catalogue, Ref(details["stage"], details["key"]), _NUM_DESCENDANTS_SHOWN)
    for title, relatives, num_more in (("made from", details["ancestors"], 0), ("made from it", found, num_left)):
        if relatives:
            tree = Tree(Text(title, "bold"))
            _grow(tree, relatives)
            if num_more:
                tree.add(Text(f"and {num_more} more (--json lists all)", "dim"))
            parts.append(tree)
    return Group(*(part for part in parts if part))


def relative_values(relative: Relative) -> dict[str, Any]:
    """A relative and its relatives as plain values."""
    return {
        "stage": relative.ref.stage,
        "key": relative.ref.key,
        **{name: value for name, value in vars(relative).items() if name not in ("ref", "relatives")},
        "relatives": [relative_values(inner) for inner in relative.relatives],
    }


def scores_text(scores: list[dict[str, Any]], with_subject: bool = False) -> str:
    """The first scores, in one line."""
    texts = [f"{_score_name(score)} {_score_value(score)}" for score in scores[:_NUM_SCORES_SHOWN]]
    if len(scores) > _NUM_SCORES_SHOWN:
        texts.append(f"{len(scores) - _NUM_SCORES_SHOWN} more")
    subjects = {str(score["subject"]) for score in scores}
    subject = f"{subjects.pop()}: " if with_subject and len(subjects) == 1 else ""
    return subject + ", ".join(texts)


def _identity(details: dict[str, Any]) -> Table:
    head = Table.grid(padding=(0, 2))
    node = details.get("node")
    head.add_row("stage", details["stage"] + (f", as {node}" if node else ""))
    head.add_row("version", str(dig(details, "spec", "version")))
    head.add_row("key", details["key"])
    if details["tags"]:
        head.add_row("tags", ", ".join(details["tags"]))
    if details["generation"] is None:
        head.add_row("state", Text("not finished", "yellow"))
    else:
        others = details["other_generations"]
        text = details["generation"] + (f" (earlier, still there: {', '.join(others)})" if others else "")
        head.add_row("generation", text)
        head.add_row("content", str(details.get("digest")))
        head.add_row("made", local_minute(details.get("finished_at")))
    seconds, steps = details.get("duration_seconds"), details.get("resumed_from_steps")
    if isinstance(seconds, (int, float)):
        head.add_row("took", readable.duration(seconds))
    if isinstance(steps, list) and steps:
        head.add_row("resumed", "from step " + ", ".join(f"{step:,}" for step in steps))
    with contextlib.suppress(ValidationError):  # most extend none; other versions may write it otherwise
        other = ExtendedTraining.model_validate(details.get("extends"))
        which = f"{other.stage}/{other.key[:12]}"
        head.add_row("extends", f"{which}, from its step {other.step:,} of {other.num_steps:,}")
    if "resumable" in details:
        step, num_steps = details["resumable"]["step"], details["resumable"]["num_steps"]
        head.add_row("resumes", f"at step {step:,}" + (f" of {num_steps:,}" if num_steps else ""))
    if "last_used" in details:
        head.add_row("last used", local_minute(details["last_used"]))
    for name, reason in details["set_aside"].items():
        head.add_row("set aside", Text(f"{name}: {reason}", "red"))
    head.add_row("folder", details["folder"])
    return head


def _pairs(title: str, values: dict[str, Any], after_title: str = "") -> RenderableType:
    """A title and a line for every value; nothing if there are no values."""
    if not values:
        return ""
    made = Table.grid(padding=(0, 2))
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        short = text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 1] + "…"
        made.add_row("  " + name, short)
    return Group(Text.assemble((title, "bold"), after_title), made)


def _files(details: dict[str, Any]) -> RenderableType:
    files = details.get("files")
    if not isinstance(files, dict) or not files:
        return ""
    try:
        sizes = sorted(((int(record["size"]), str(name)) for name, record in files.items()), reverse=True)
    except (KeyError, TypeError, ValueError):
        return ""
    shown = {name: readable.size(num_bytes) for num_bytes, name in sizes[:_NUM_FILES_SHOWN]}
    if rest := sizes[_NUM_FILES_SHOWN:]:
        shown[f"and {len(rest)} more"] = readable.size(sum(num_bytes for num_bytes, _ in rest))
    return _pairs("files", shown, f", {len(sizes)}, {readable.size(sum(num_bytes for num_bytes, _ in sizes))}")


def _grow(tree: Tree, relatives: list[Relative]) -> None:
    for relative in relatives:
        text = Text(f"{relative.binding}: " if relative.binding else "")
        text.append(relative.node or relative.ref.stage, "cyan").append(f" {relative.ref.key[:12]}")
        if relative.finished_at:
            text.append(f" {local_minute(relative.finished_at)}", "dim")
        if relative.mark:
            text.append(f" {relative.mark}", "red")
        if relative.repeated:
            tree.add(text.append(" (see above)", "dim"))
            continue
        if relative.scores:
            text.append(f"  {scores_text(relative.scores)}")
        branch = tree.add(text)
        for source in relative.sources:
            branch.add(Text(source, "dim"))
        _grow(branch, relative.relatives)


def _problems(manifest: dict[str, Any], ref: Ref) -> Iterator[str]:
    version = manifest.get("schema_version")
    if version != MANIFEST_SCHEMA_VERSION:
        yield f"its manifest has format {version}; this version reads {MANIFEST_SCHEMA_VERSION} and shows it as it is"
        return
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        yield f"its manifest is damaged: {first_problem(error)}"
    if manifest.get("key") != ref.key:
        yield "its manifest is that of another artifact"


def refs_of_run(run: RunRecord) -> dict[str, Ref]:
    """Node -> artifact of a run."""
    return {node: Ref(run.stages[node], key) for node, key in run.keys.items() if node in run.stages}


def _num_bytes(manifest: dict[str, Any]) -> int:
    try:
        return num_bytes_of(manifest)
    except ValueError:
        return 0


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value


def _score_name(score: dict[str, Any]) -> str:
    metric = str(score.get("metric", "")).partition(",")[0]
    suffix = " (implicit reward)" if score.get("kind") == "implicit_reward" else ""
    return f"{score['task']} {metric}{suffix}".strip()


def _score_value(record: dict[str, Any]) -> str:
    stderr = record.get("stderr")
    limited = ", on a part" if record.get("limited") else ""
    return readable.score(record["value"], stderr if isinstance(stderr, (int, float)) else None) + limited


def _coloured(text: str, colours: dict[str, str]) -> Text:
    return Text(text, colours.get(text, ""))
