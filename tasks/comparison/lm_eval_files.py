"""What `lm-eval run --log_samples --output_path` wrote into a folder, to be compared item by item."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.evaluation import Score
from smoltulu.tasks.comparison.evaluations import Measured, item_name, item_of
from smoltulu.tasks.evaluation.samples import is_parts, json_lines

_DIGEST_CHARACTERS = 16
#: lm-eval's names of a backend, where they mean one that we have too.
_BACKENDS = {"hf": "transformers"}
#: Of --model_args those that change what a model answers; the others name the model, or say how it is run.
_MODEL_SETTINGS = (
    "add_bos_token", "chat_template_args", "enable_thinking", "max_length", "prefix_token_id", "softmax_dtype",
    "think_end_token", "truncation",
)  # fmt: skip


def read_folder(folder: Path) -> dict[str, Measured]:
    """ "task metric,filter" -> that score with its items, of the newest results under `folder`: tasks and groups.

    Raises:
        ValueError: no results, no samples beside them, or files of another form.
    """
    found = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        raise ValueError(
            f"{folder} is no evaluation: it has no results_*.json of `lm-eval run --log_samples --output_path {folder}`"
        )
    newest = found[-1]
    date = newest.stem.removeprefix("results_")
    files = sorted(newest.parent.glob(f"samples_*_{date}.jsonl"))
    if not files:
        raise ValueError(f"{newest.name} has no samples beside it; run lm-eval again with --log_samples")
    try:
        results = json.loads(newest.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{newest.name} is no results file of lm-eval: {error}; run lm-eval again") from error
    made: dict[str, Measured] = {}
    for file in files:
        task = file.name.removeprefix("samples_").removesuffix(f"_{date}.jsonl")
        if not file.stat().st_size:
            raise ValueError(f"{file.name} is empty; run lm-eval again")
        try:
            made |= _task(task, results, [(row, row["doc_id"], row["metrics"]) for row in json_lines(file, "doc_id")])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file.name} is not as lm-eval 0.4.13 writes samples: {error!r}") from error
    try:
        return made | _groups(results, made)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{newest.name} is not as lm-eval 0.4.13 writes groups: {error!r}") from error


def settings_of(folder: Path) -> dict[str, str]:
    """Backend and precision (e.g. bfloat16) of the newest results, as far as they say them."""
    newest = max(folder.rglob("results_*.json"), key=lambda path: path.name)
    config = json.loads(newest.read_text(encoding="utf-8")).get("config")
    if not isinstance(config, dict):
        return {}
    made = {}
    if backend := config.get("model"):
        made["backend"] = _BACKENDS.get(str(backend), str(backend))
    if said := config.get("model_dtype"):
        made["precision"] = str(said).removeprefix("torch.")
    return made


def _task(task: str, results: dict[str, Any], rows: list[tuple[dict[str, Any], Any, list[str]]]) -> dict[str, Measured]:
    made: dict[str, Measured] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for row, number, metrics in rows:
        for metric in metrics:
            value = row[metric]
            if not isinstance(value, (int, float)) and not is_parts(value):
                continue
            name = f"{metric},{row.get('filter', 'none')}"
            key = f"{task} {name}"
            if key not in made:
                num_samples = int(results["n-samples"][task]["effective"])
                made[key] = Measured(_score(task, name, num_samples, _settings(task, results), results))
            kept = {"task": task, "id": number} | {name: row.get(name) for name in ("doc_hash", "target_hash")}
            answer = row["resps"][0][0]
            shown = kept | {"target": str(row.get("target"))[:200], "completion": str(answer)}
            prompt = row.get("prompt_hash") or text_digest(json.dumps(row.get("arguments")))
            values = [float(part) for part in value] if isinstance(value, list) else float(value)
            item = item_of(values, prompt[:_DIGEST_CHARACTERS], "", shown)
            made[key].items[item_name(kept, key, seen)] = item
    return made


def _groups(results: dict[str, Any], tasks: dict[str, Measured]) -> dict[str, Measured]:
    """The scores of groups, with the items of their members."""
    subtasks: dict[str, list[str]] = results.get("group_subtasks") or {}
    made: dict[str, Measured] = {}
    for group, scores in (results.get("groups") or {}).items():
        leaves = sorted(_leaves(group, subtasks))
        for name, value in scores.items():
            members = [tasks[f"{leaf} {name}"] for leaf in leaves if f"{leaf} {name}" in tasks]
            if "," not in name or not isinstance(value, (int, float)) or not members or len(members) < len(leaves):
                continue
            settings = {
                key: "; ".join(sorted({str(one.score.details.get(key)) for one in members}))
                for key in sorted({key for one in members for key in one.score.details} - {"higher_is_better"})
            }
            num_samples = sum(one.score.num_samples for one in members)
            one = Measured(_score(group, name, num_samples, settings, results))
            for leaf, member in zip(leaves, members, strict=True):
                one.items.update((item, replace(of, member=leaf)) for item, of in member.items.items())
            made[f"{group} {name}"] = one
    return made


def _leaves(name: str, subtasks: dict[str, list[str]]) -> set[str]:
    """The tasks of a group, those of its groups included."""
    children = subtasks.get(name)
    return {leaf for child in children for leaf in _leaves(child, subtasks)} if children else {name}


def _score(task: str, name: str, num_samples: int, settings: dict[str, Any], results: dict[str, Any]) -> Score:
    is_up = (results.get("higher_is_better") or {}).get(task, {}).get(name.partition(",")[0])
    return Score(
        task=f"{task} {name}",
        metric=name,
        value=float(results["results" if task in results["results"] else "groups"][task][name]),
        num_samples=num_samples,
        num_fewshot=results["n-shot"].get(task),
        harness=f"lm-eval {results.get('lm_eval_version', 'unknown')}",
        task_version=str(results["versions"].get(task, "none")),
        template_digest=results.get("chat_template_sha") or "none",
        details=settings | ({} if is_up is None else {"higher_is_better": is_up}),
    )


def _settings(task: str, results: dict[str, Any]) -> dict[str, Any]:
    """What must be the same beside the task: how answers are generated, what --model_args change."""
    config = results.get("config") or {}
    made: dict[str, Any] = {}
    of_task = (results.get("configs") or {}).get(task) or {}
    # What the command line changed is in the task's own; older results have it beside them only.
    generation = of_task.get("generation_kwargs") or config.get("gen_kwargs")
    if generation and of_task.get("output_type", "generate_until") == "generate_until":
        made["generation"] = json.dumps(generation, sort_keys=True)
    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = dict(pair.partition("=")[::2] for pair in given.split(",") if pair)
    if changing := {name: str(given[name]) for name in _MODEL_SETTINGS if name in given}:
        made["model_settings"] = json.dumps(changing, sort_keys=True)
    return made
