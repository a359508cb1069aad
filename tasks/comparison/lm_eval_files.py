"""What `lm-eval run --log_samples --output_path` wrote into a folder, to be compared item by item."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from smoltulu.artifacts.keys import text_digest
from smoltulu.schemas.evaluation import Score
from smoltulu.tasks.comparison.evaluations import Item, Measured, item_name
from smoltulu.tasks.evaluation.samples import json_lines

_DIGEST_CHARACTERS = 16


def read_folder(folder: Path) -> dict[str, Measured]:
    """ "task metric,filter" -> that score with its items, of the newest results under `folder`.

    Scores are those of single tasks: a group is in its members.

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
    return made


def precision_of(folder: Path) -> str | None:
    """As the newest results say, e.g. bfloat16; None where they do not."""
    newest = max(folder.rglob("results_*.json"), key=lambda path: path.name)
    config = json.loads(newest.read_text(encoding="utf-8")).get("config")
    said = config.get("model_dtype") if isinstance(config, dict) else None
    return str(said).removeprefix("torch.") if said else None


def _task(task: str, results: dict[str, Any], rows: list[tuple[dict[str, Any], Any, list[str]]]) -> dict[str, Measured]:
    made: dict[str, Measured] = {}
    seen: Counter[tuple[str, str]] = Counter()
    template = results.get("chat_template_sha") or "none"
    for row, number, metrics in rows:
        for metric in metrics:
            value = row[metric]
            if not isinstance(value, (int, float)):
                continue  # one of several parts, as IFEval's of instructions
            name = f"{metric},{row.get('filter', 'none')}"
            key = f"{task} {name}"
            if key not in made:
                made[key] = Measured(
                    Score(
                        task=key,
                        metric=name,
                        value=float(results["results"][task][name]),
                        num_samples=int(results["n-samples"][task]["effective"]),
                        num_fewshot=results["n-shot"].get(task),
                        harness=f"lm-eval {results.get('lm_eval_version', 'unknown')}",
                        task_version=str(results["versions"].get(task, "none")),
                        template_digest=template,
                    )
                )
            kept = {"task": task, "id": number} | {name: row.get(name) for name in ("doc_hash", "target_hash")}
            answer = row["resps"][0][0]
            shown = kept | {"target": str(row.get("target"))[:200], "completion": str(answer)}
            prompt = row.get("prompt_hash") or text_digest(json.dumps(row.get("arguments")))
            item = Item(float(value), prompt[:_DIGEST_CHARACTERS], "", shown)
            made[key].items[item_name(kept, key, seen)] = item
    return made
