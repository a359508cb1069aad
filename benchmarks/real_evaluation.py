"""Do our suites measure what others published? SmolLM2-135M-Instruct on real data, beside both harnesses' figures.

    SMOLTULU_REAL_DATA=DATA python benchmarks/real_evaluation.py --model WORK/model --folder RESULTS --minutes 30

WORK is made by real_model.py. Suite `paper` asks in the model's own template, as lighteval did for the model card;
suite `harness` asks without one, as lm-eval does. PIQA, ARC and IFEval are whole; of BBH and GSM8K a declared part, on
a CPU (`--limit` tries all tasks on few items; `--device cuda` measures all of them whole, in bfloat16, in minutes).

A slice ends after `--minutes`; the same command goes on. Finished tasks are kept in RESULTS, and so are an unfinished
task's finished batches. Exit status: 0 all measured and within what is allowed, 1 one is not, 2 not all measured yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_tools import table
from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.tasks.engine.launch import StageFailed
from smoltulu.tasks.engine.runner import run_stage

CARD = "lighteval, own template: model card HuggingFaceTB/SmolLM2-135M-Instruct"
OTHER = "lm-eval, no template: card of lldois/SmolLM2-135M-Reasoning-SLERP-Champion, column baseline"
_QUANTISED = "our weights are Q4_1 (4 bits), theirs bfloat16"
_MIN_MINUTES = 1.0  # less is not worth a start


@dataclass(frozen=True)
class Row:
    """One published figure, and the task that must come near it.

    metric     of the score; another than the headline is in its details
    allowed    points that it may differ by, or two standard errors where they are more; None: shown, not judged
    cpu_limit  first items (of a group, of each member) that are measured on a CPU; None: all
    """

    name: str
    suite: str
    task: str
    metric: str
    published: float
    source: str
    files: dict[str, str]
    allowed: float | None = None
    cpu_limit: int | None = None
    num_fewshot: int | None = None
    note: str = _QUANTISED


_PIQA = {"validation": "eval/piqa_valid.jsonl.gz", "labels": "eval/piqa_valid_labels.lst"}
_ARC = {"easy": "eval/arc_easy_test.jsonl.gz", "challenge": "eval/arc_challenge_test.jsonl.gz"}
_GSM8K = {"test": "eval/gsm8k_test.jsonl.gz", "train": "train/gsm8k_train.jsonl.gz"}
_PART = "; a part of the items: a deviation within two standard errors says nothing"
ROWS = (
    Row("PIQA", "paper", "paper_piqa", "acc_norm,none", 66.3, CARD, _PIQA, 2.5),
    Row("PIQA", "harness", "local_piqa", "acc_norm,none", 66.92, OTHER, _PIQA, 2.5),
    Row("ARC, mean", "paper", "paper_arc", "acc_norm,none", 37.3, CARD, _ARC, 2.5,
        note=f"{_QUANTISED}; our copy has four choices in every item"),
    Row("ARC-Challenge", "harness", "local_arc_challenge", "acc_norm,none", 27.73, OTHER, {"test": _ARC["challenge"]},
        2.5, note=f"{_QUANTISED}; our copy has four choices in every item"),
    Row("ARC-Easy", "harness", "local_arc_easy", "acc,none", 54.12, OTHER, {"test": _ARC["easy"]},
        2.5, note=f"{_QUANTISED}; our copy has four choices in every item"),
    Row("IFEval", "paper", "paper_ifeval", "average_strict,none", 29.9, CARD, {"test": "eval/ifeval.jsonl.gz"}, 4.0),
    Row("BBH, 3-shot", "paper", "paper_bbh", "exact_match,none", 28.2, CARD, {"test": "eval/bbh.jsonl.gz"},
        cpu_limit=8, note=_QUANTISED + _PART),
    Row("GSM8K, 5-shot", "paper", "paper_gsm8k", "exact_match,none", 1.4, CARD, _GSM8K, cpu_limit=100,
        note=_QUANTISED + _PART),
    Row("GSM8K, 0-shot", "harness", "gsm8k", "exact_match,flexible-extract", 0.38, OTHER, _GSM8K, cpu_limit=100,
        num_fewshot=0, note=_QUANTISED + _PART),
)  # fmt: skip


def recipe_of(row: Row, options: argparse.Namespace, limit: int | None, hours: float) -> dict[str, Any]:
    """A recipe that evaluates the model as it is, on one task."""
    files = {split: {"path": str(options.data / file), "format": "text"} for split, file in row.files.items()}
    task = {"name": row.task, "metric": row.metric, "files": files, "limit": limit, "num_fewshot": row.num_fewshot}
    is_cpu = options.device == "cpu"
    return {
        "name": "real-evaluation",
        "base_model": {"path": str(options.model.resolve())},
        "chat_template": "smollm2",
        "data": {},
        "evaluation": {
            "tasks": [task], "max_length": 2048, "apply_chat_template": row.suite == "paper",
            "precision": "float32" if is_cpu else "bfloat16",
        },
        "compute": {
            "device": options.device, "num_threads": options.threads, "per_device_eval_batch_size": options.batch,
            "max_hours": hours, "min_free_disk_gb": 0.2,
        },
    }  # fmt: skip


def measure(row: Row, options: argparse.Namespace, limit: int | None, hours: float, store: Store) -> dict[str, Any]:
    """The score of a row, measured or from the store. StageFailed: the slice is over."""
    log = logging.getLogger("real_evaluation")
    graph = Graph(load_recipe(recipe_of(row, options, limit, hours)))
    made: dict[str, Any] = {}
    for name in graph.nodes:
        upstream = {binding.node: made[binding.node] for binding in graph.nodes[name].bindings().values()}
        made[name] = run_stage(graph.job(name, upstream), store, log)
    (score,) = made["evaluation-base-model"].outputs["scores"]
    return dict(score)


def verdict(row: Row, value: float, stderr: float, *, is_part: bool) -> tuple[str, str, bool]:
    """(difference, what is allowed, whether it holds), points. A part is shown with its error and not judged."""
    difference = value - row.published
    allowed = max(row.allowed or 0.0, 2 * stderr)
    holds = abs(difference) <= allowed
    judged = row.allowed is not None and not is_part
    return f"{difference:+.1f}", f"{allowed:.1f}" if judged else f"({allowed:.1f})", holds or not judged


def show(scores: dict[int, dict[str, Any]]) -> bool:
    """The table; whether all that is judged holds."""
    lines, all_hold = [], True
    for number, score in scores.items():
        row, stderr = ROWS[number], 100 * (score["stderr"] or 0.0)
        value = 100 * score["value"]
        difference, allowed, holds = verdict(row, value, stderr, is_part=score["limited"])
        all_hold &= holds
        part = " (part)" if score["limited"] else ""
        lines.append([
            f"{row.name}, {row.suite}", f"{score['num_samples']:,}{part}", f"{value:.2f} ± {stderr:.2f}",
            f"{row.published:.2f}", difference, allowed, "yes" if holds else "NO", row.metric,
        ])  # fmt: skip
    table(["row", "items", "measured ± standard error", "published", "difference", "allowed", "holds", "metric"], lines)
    for number, score in scores.items():
        row, details = ROWS[number], score["details"]
        counts = {name: details[name] for name in sorted(details) if name.startswith("num_") and details[name]}
        others = {name: round(value, 4) for name, value in details.get("metrics", {}).items()}
        print(f"\n{row.name}, {row.suite}: published by {row.source}. {row.note}.")
        print(f"  {json.dumps(others)} {json.dumps(counts)}")
    return all_hold


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model (real_model.py makes it)")
    parser.add_argument("--folder", type=Path, required=True, help="for the store of results; kept")
    parser.add_argument("--minutes", type=float, help="end this slice after so long; default: go on to the end")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--batch", type=int, default=32, help="items at once")
    parser.add_argument(
        "--limit", type=int, help="first items of every task (of each subset), to try it; judges nothing"
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="these rows only, counted from 0")
    options = parser.parse_args(arguments)
    options.data = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data")).resolve()
    for needed in (options.data, options.model / "config.json"):
        if not needed.exists():
            parser.error(f"{needed} is not there; set SMOLTULU_REAL_DATA, and make the model with real_model.py")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    options.folder.mkdir(parents=True, exist_ok=True)
    store = Store(options.folder.resolve() / "store")
    began, scores = time.monotonic(), {}
    asked = range(len(ROWS)) if options.rows is None else options.rows
    for number in asked:
        row = ROWS[number]
        left = float("inf") if options.minutes is None else options.minutes - (time.monotonic() - began) / 60
        limit = options.limit or (row.cpu_limit if options.device == "cpu" else None)
        if left < _MIN_MINUTES:
            break
        try:
            scores[number] = measure(row, options, limit, min(left, 60 * 24.0) / 60, store)
        except StageFailed as stopped:
            if "max_hours" not in str(stopped):
                raise
            print(f"{row.name}, {row.suite}: {stopped}", file=sys.stderr)
            break
    holds = show(scores)
    missing = [f"{ROWS[number].name}, {ROWS[number].suite}" for number in asked if number not in scores]
    if missing:
        print(f"\nnot measured yet: {'; '.join(missing)}; run the same command again")
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    return 2 if missing else 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
