"""Speed of evaluation: `python benchmarks/evaluation.py [--model FOLDER]`. Prints Markdown tables. Minutes.

1. Cold wall time against `lm-eval run`: the same model, stock tasks, rows and limit, each a process of its own,
   alternating. The two-layer model of the tests, where start-up rules, and with --model that model
   (`benchmarks/real_model.py` makes SmolLM2-135M-Instruct).
2. Adding a task to a finished evaluation, against the task alone in an empty store.
3. An evaluation that is there: 7 tasks of 5 models.
4. `smoltulu compare` of two models with 40,000 items each.
5. Reading 90 nights of history.

ARC, PIQA and GSM8K come from SMOLTULU_REAL_DATA.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import logging
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from smoltulu.artifacts.keys import text_digest
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationOutputs, EvaluationStageConfig, Score

PROJECT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))
BATCH_SIZE, MAX_LENGTH = 8, 512
METRICS = {"arc_easy": "acc_norm,none", "piqa": "acc_norm,none", "gsm8k": "exact_match,strict-match"}
TEXT = {"format": "text"}
NOW = "2026-01-01T00:00:00+00:00"


def rows_of(task: str, limit: int) -> Iterator[dict[str, Any]]:
    """Real rows with the Hub's columns, which the stock definitions read."""
    file = {"arc_easy": "arc_easy_test", "piqa": "piqa_valid", "gsm8k": "gsm8k_test"}[task]
    labels = (DATA / "eval/piqa_valid_labels.lst").read_text().split()
    with gzip.open(DATA / f"eval/{file}.jsonl.gz", "rt", encoding="utf-8") as stream:
        for number, row in zip(range(limit), map(json.loads, stream), strict=False):
            if task == "arc_easy":
                yield {
                    "question": row["query"].removeprefix("Question: "),
                    "choices": {"text": row["choices"], "label": list("ABCD")},
                    "answerKey": "ABCD"[row["gold"]],
                }
            else:
                yield {**row, "label": int(labels[number])} if task == "piqa" else row


def write_rows(folder: Path, limits: dict[str, int]) -> dict[str, dict[str, str]]:
    """Task -> split -> file."""
    files: dict[str, dict[str, str]] = {}
    for task, limit in limits.items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, limit)), encoding="utf-8")
        splits = ("train", "validation", "test") if task != "piqa" else ("train", "validation")
        files[task] = dict.fromkeys(splits, str(file))
    return files


# What is timed, each a process of its own.


def lm_eval_command(folder: Path, model: Path, files: dict[str, dict[str, str]]) -> list[str]:
    """`lm-eval run` over local files: a group changes the stock definitions in what it names."""
    folder.mkdir()
    members = [
        {"task": task, "dataset_path": "json", "dataset_name": None, "num_fewshot": 0,
         "dataset_kwargs": {"data_files": of_task}}
        for task, of_task in files.items()
    ]  # fmt: skip
    (folder / "offline.yaml").write_text(json.dumps({"group": "offline", "task": members}))
    arguments = f"pretrained={model},dtype=float32,max_length={MAX_LENGTH}"
    return [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--tasks", "offline",
        "--include_path", str(folder), "--batch_size", str(BATCH_SIZE), "--device", "cpu", "--log_samples",
        "--output_path", str(folder / "out"),
    ]  # fmt: skip


def evaluation_command(store: Path, models: Sequence[Path], tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Evaluate models as a run does: this file again, with `--evaluate`."""
    asked = {"store": str(store), "models": [str(model) for model in models], "tasks": list(tasks)}
    return [sys.executable, __file__, "--evaluate", json.dumps(asked)]


def entries(files: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"name": task, "metric": METRICS[task], "num_fewshot": 0,
         "files": {split: {"path": file, **TEXT} for split, file in of_task.items()}}
        for task, of_task in files.items()
    ]  # fmt: skip


class Took(NamedTuple):
    """Seconds of a process and its children: on the clock, and of CPU, which other work on the machine moves less."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} ({self.cpu:.1f})"


def median(times: Sequence[Took]) -> Took:
    return Took(*(statistics.median(column) for column in zip(*times, strict=True)))


def timed(command: list[str]) -> Took:
    """Run a command as a process of its own."""
    environment = {
        **os.environ, "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}", "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:9", "HF_DATASETS_CACHE": tempfile.mkdtemp(),
    }  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\n{done.stderr[-3000:]}")
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


# Artifacts.


def commit(store: Store, spec: Spec, outputs: dict[str, Any], fill: Any, inputs: dict[str, InputRecord]) -> Any:
    """A finished artifact whose folder `fill` writes."""

    def manifest(files: dict[str, FileRecord], digest: str) -> Manifest:
        return Manifest(
            key=folder.name, spec=spec, digest=digest, inputs=inputs, outputs=outputs, metrics={}, files=files,
            environment={}, node=spec.stage, started_at=NOW, finished_at=NOW, duration_seconds=0.0,
        )  # fmt: skip

    with store.producer(spec, lambda whom: None) as folder:
        output = store.open_work(folder, {}) / "output"
        fill(output)
        return store.commit(spec, output, manifest)


def as_artifact(store: Store, folder: Path) -> Path:
    """A model's folder as that of a finished artifact: an evaluation knows a model by its content."""
    spec = Spec(stage="base_model", version=1, config={"name": str(folder)}, inputs={}, externals={})

    def fill(output: Path) -> None:
        shutil.copytree(folder, output / "model")

    outputs = {"folder": "model", "num_parameters": 1}
    made: Path = commit(store, spec, outputs, fill, {}).folder
    return made / "model"


def evaluate(asked: dict[str, Any]) -> None:
    """Evaluate each model in a store, as the evaluation nodes of a run do."""
    from smoltulu.tasks.engine.runner import run_stage
    from smoltulu.tasks.job import Job
    from smoltulu.tasks.stages import STAGES

    log = logging.getLogger("benchmark")
    store, stage = Store(Path(asked["store"])), STAGES["evaluation"]
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    compute = ComputeSettings(
        device="cpu", min_free_disk_gb=0, per_device_eval_batch_size=BATCH_SIZE,
        **({"num_threads": threads} if threads else {}),
    )  # fmt: skip
    settings = {
        "tasks": asked["tasks"], "max_length": MAX_LENGTH, "precision": "float32", "apply_chat_template": False,
    }  # fmt: skip
    config = EvaluationStageConfig.model_validate({"subject": "sft", "kind": "language_model", "settings": settings})
    for model in asked["models"]:
        template = (Path(model) / "chat_template.jinja").read_text(encoding="utf-8")
        key = text_digest(model)
        spec = Spec(stage="evaluation", version=stage.version, config=scientific(config), inputs={"model": key},
                    externals={"chat_template": text_digest(template)})  # fmt: skip
        inputs = EvaluationInputs(model=model, chat_template=template)
        record = InputRecord(stage="base_model", key=key, digest=key)
        run_stage(Job("evaluation-sft", stage, config, compute, spec, inputs, {"model": record}), store, log)


# The tables.


def against_lm_eval(scratch: Path, name: str, model: Path, limits: dict[str, int], repeats: int) -> None:
    folder = scratch / f"against-{name}"
    folder.mkdir()
    files = write_rows(folder, limits)
    theirs, ours = [], []
    for repeat in range(repeats):
        theirs.append(timed(lm_eval_command(folder / f"lm-eval-{repeat}", model, files)))
        ours.append(timed(evaluation_command(folder / f"store-{repeat}", [model], entries(files))))
    ratios = [Took(one.wall / other.wall, one.cpu / other.cpu) for one, other in zip(ours, theirs, strict=True)]
    items = ", ".join(f"{task} {limit}" for task, limit in limits.items())
    ratio = "{:.2f} ({:.2f})".format(*median(ratios))
    print(f"| {name}: {items} | {median(theirs)} | {median(ours)} | {ratio} |", flush=True)


def adding_a_task(scratch: Path, model: Path) -> None:
    folder = scratch / "added"
    folder.mkdir()
    tasks = entries(write_rows(folder, {"arc_easy": 24, "piqa": 24}))
    alone = timed(evaluation_command(folder / "alone", [model], tasks[1:]))
    timed(evaluation_command(folder / "both", [model], tasks[:1]))
    added = timed(evaluation_command(folder / "both", [model], tasks))
    print(f"| adding PIQA to ARC; PIQA alone: {alone} | {added} | {alone.wall + 2:.1f} |", flush=True)


def nothing_new(scratch: Path, model: Path, num_models: int = 5, num_tasks: int = 7) -> None:
    """The tasks are one task with other limits: as many cells as other tasks would be."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = scratch / "nothing-new"
    folder.mkdir()
    models = []
    for number in range(num_models):
        models.append(folder / f"model-{number}")
        network = AutoModelForCausalLM.from_pretrained(str(model))
        network.model.norm.weight.data *= 1 + number / 10
        network.save_pretrained(models[-1])
        AutoTokenizer.from_pretrained(str(model)).save_pretrained(models[-1])
        models[-1] = as_artifact(Store(folder / "models"), models[-1])
    (task,) = entries(write_rows(folder, {"arc_easy": num_tasks}))
    tasks = [{**task, "limit": 1 + number} for number in range(num_tasks)]
    command = evaluation_command(folder / "store", models, tasks)
    timed(command)
    took = median([timed(command) for _ in range(3)])
    print(f"| nothing new: {num_tasks} tasks of {num_models} models | {took} | 3 |", flush=True)


def comparing(scratch: Path, num_items: int = 40_000, num_tasks: int = 4) -> None:
    from smoltulu.tasks.evaluation.samples import SAMPLES_FILE, write_samples

    store = Store(scratch / "compared")
    generator = random.Random(0)
    right = [generator.random() < 0.5 for _ in range(num_items)]
    keys = []
    for name in "ab":
        rows = []
        for number, was_right in enumerate(right):
            is_right = was_right if generator.random() < 0.88 else not was_right
            text = f"Question: what is item {number} of this benchmark, and why? " * 4
            rows.append(
                {"task": f"task_{number % num_tasks}", "entry": number % num_tasks, "id": number, "filter": "none",
                 "doc_hash": text_digest(str(number))[:16], "prompt_hash": text_digest(text)[:16],
                 "target_hash": f"{number % 4:016}", "prompt": text, "target": str(number % 4),
                 "logliks": [-1.0, -2.0, -3.0, -4.0], "metrics": {"acc": float(is_right)}}
            )  # fmt: skip
        scores = tuple(
            Score(task=f"task_{place}", metric="acc,none", value=statistics.fmean(
                  row["metrics"]["acc"] for row in rows[place::num_tasks]), stderr=0.01,
                  num_samples=num_items // num_tasks, num_fewshot=0, harness="lm-eval 0.4.13", task_version="1.0",
                  template_digest="none", details={})
            for place in range(num_tasks)
        )  # fmt: skip
        outputs = EvaluationOutputs(subject="sft", scores=scores, samples_file=SAMPLES_FILE)
        spec = Spec(stage="evaluation", version=1, config={"name": name}, inputs={}, externals={})

        def fill(output: Path, rows: list[dict[str, Any]] = rows) -> None:
            output.mkdir(exist_ok=True)
            write_samples(output / SAMPLES_FILE, rows)

        keys.append(commit(store, spec, outputs.model_dump(mode="json"), fill, {}).manifest.key)
    program = "import sys; from smoltulu.flows.cli.main import app; app()"
    command = [sys.executable, "-c", program, "compare", *keys, "--store", str(store.root)]
    took = median([timed(command) for _ in range(3)])
    print(f"| `smoltulu compare`, {num_items:,} items each | {took} | 5 |", flush=True)


def history(scratch: Path, num_nights: int = 90) -> None:
    from smoltulu.tasks.nightly.history import History, Row

    nights = History(scratch / "nights", "tiny")
    for number in range(num_nights):
        at = f"2026-{1 + number // 30:02}-{1 + number % 30:02}T03:00:00+00:00"
        key = text_digest(str(number))
        score = Row(
            "score", at, f"run-{number}", node="evaluation-sft", model=key, stage="evaluation", key=key,
            generation="gen-0001", evaluation=key, task="gsm8k", metric="exact_match,strict-match", value=0.5,
        )  # fmt: skip
        against = {"kind": "comparison", "against": "baseline", "reference": key, "p_value": 0.3, "verdict": "same"}
        scores = [dataclasses.replace(score, task=f"task_{place}") for place in range(35)]
        compared = [dataclasses.replace(one, **against) for one in scores]
        night = Row("night", at, f"run-{number}", verdict="well", reason="no real drop", num_items=0)
        nights.add([night, *scores, *compared], [])
    times = []
    for _ in range(5):
        began = time.monotonic()
        rows = History(nights.root, "tiny").read()
        times.append(time.monotonic() - began)
    assert len(rows) == num_nights * 71
    seconds = statistics.median(times)
    print(f"| {num_nights} nights of history, {len(rows):,} lines read | {seconds:.2f} | 1 |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a larger model, measured as well")
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison with lm-eval, two-layer model")
    parser.add_argument("--limit", type=int, default=48, help="items of ARC and PIQA for the larger model")
    parser.add_argument("--parts", default="lm-eval,added,nothing-new,compare,history")
    parser.add_argument("--evaluate", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.evaluate:
        evaluate(asked.evaluate)
        return
    from tests.tiny_model import build_tiny_model

    parts = asked.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = Store(scratch / "models")
        tiny = as_artifact(models, build_tiny_model(scratch / "tiny", max_position_embeddings=MAX_LENGTH))
        if "lm-eval" in parts:
            print("| cold, seconds (of CPU); medians | `lm-eval run` | ours | ratio |\n|---|---:|---:|---:|")
            against_lm_eval(scratch, "two layers", tiny, {"arc_easy": 32, "piqa": 32, "gsm8k": 8}, asked.repeats)
            if asked.model:
                limits = {"arc_easy": asked.limit, "piqa": asked.limit}
                against_lm_eval(scratch, asked.model.name, as_artifact(models, asked.model.resolve()), limits, 1)
            print()
        print("| seconds (of CPU), two-layer model | measured | goal |\n|---|---:|---:|")
        for name, part in {"added": adding_a_task, "nothing-new": nothing_new}.items():
            if name in parts:
                part(scratch, tiny)
        if "compare" in parts:
            comparing(scratch)
        if "history" in parts:
            history(scratch)


if __name__ == "__main__":
    main()
