"""Suite `harness` over local files gives, item by item, what lm-eval's command line gives."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.evaluation import EvaluationSettings, EvaluationTask
from smoltulu.schemas.suites import SUITES, expand
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation import names
from smoltulu.tasks.evaluation.local_files import rows_of_subset
from tests.tiny_model import build_tiny_model, build_tokenizer

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))
NUM_ITEMS = 3
MAX_LENGTH = 2560  # IFEval's 1,280 new tokens fit twice; longer prompts lose their beginning in both
BBH = ("boolean_expressions", "word_sorting")
#: Checkers that need a model of sentences, or guess.
UNEVEN = ("length_constraints:number_sentences", "change_case:capital_word_frequency", "language:response_language")


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _first(rows: Iterator[dict[str, Any]], number: int = NUM_ITEMS) -> list[dict[str, Any]]:
    return [row for row, _ in zip(rows, range(number), strict=False)]


def _arc(name: str) -> list[dict[str, Any]]:
    """With the Hub's columns, which the stock definition reads."""
    return [
        {
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["gold"]],
        }
        for row in _first(_rows(name))
    ]


def _splits() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task -> split -> rows, real ones."""
    labels = (DATA / "eval/piqa_valid_labels.lst").read_text().split()
    piqa = [{**row, "label": int(label)} for row, label in zip(_first(_rows("eval/piqa_valid.jsonl.gz")), labels)]  # noqa: B905
    gsm8k = _first(_rows("eval/gsm8k_test.jsonl.gz"))
    pro = _first(_rows("eval/mmlu_pro_test.jsonl.gz"), 30)
    ifeval = (row for row in _rows("eval/ifeval.jsonl.gz") if not set(UNEVEN) & set(row["instruction_id_list"]))
    splits = {
        "arc_easy": {"test": _arc("eval/arc_easy_test.jsonl.gz")},
        "arc_challenge": {"test": _arc("eval/arc_challenge_test.jsonl.gz")},
        "piqa": {"validation": piqa},
        "gsm8k": {"train": _first(_rows("train/gsm8k_train.jsonl.gz"), 20), "test": gsm8k},
        "ifeval": {"train": _first(ifeval)},
        "leaderboard_mmlu_pro": {"validation": pro[20:], "test": pro[:NUM_ITEMS]},
    }  # fmt: skip
    for task in ("arc_easy", "arc_challenge", "piqa"):  # asked for at 0 shots as well
        splits[task]["train"] = splits[task].get("test") or splits[task]["validation"]
    for subset in BBH:
        bbh = (row for row in _rows("eval/bbh.jsonl.gz") if row["task"] == subset)
        splits[f"bbh_fewshot_{subset}"] = {"test": _first(bbh)}
    return splits


def _write(folder: Path, splits: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, str]]:
    files: dict[str, dict[str, str]] = {}
    for task, of_task in splits.items():
        for split, rows in of_task.items():
            file = folder / f"{task}_{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            files.setdefault(task, {})[split] = str(file)
    return files


def _command_line(folder: Path, model: Path, files: dict[str, dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """Task -> samples of `lm-eval run`. A group in YAML changes stock definitions in what it names."""
    definitions = folder / "definitions"
    definitions.mkdir()
    members = [
        {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": of_task}}
        for task, of_task in files.items()
    ]
    (definitions / "offline.yaml").write_text(json.dumps({"group": "offline", "task": members}))  # JSON is YAML
    model_args = f"pretrained={model},dtype=float32,max_length={MAX_LENGTH}"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args, "--tasks", "offline",
        "--include_path", str(definitions), "--batch_size", "4", "--device", "cpu", "--log_samples",
        "--output_path", str(folder / "out"),
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "https_proxy": "http://127.0.0.1:9",
        "NLTK_DATA": str(folder / "nltk"),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    samples: dict[str, list[dict[str, Any]]] = {}
    for task in files:
        (file,) = folder.glob(f"out/**/samples_{task}_2*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return samples


def _ours(model_folder: Path, files: dict[str, dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM

    metric_of = {task["name"]: task["metric"] for task in SUITES["harness"]}
    entries = [
        EvaluationTask.model_validate(
            {
                "name": task,
                "metric": metric_of.get(task, "exact_match,none"),
                "files": {split: {"path": file, "format": "text"} for split, file in of_task.items()},
            }
        )
        for task, of_task in files.items()
    ]
    manager = harness.check_tasks(tuple(entries))
    model = AutoModelForCausalLM.from_pretrained(str(model_folder)).eval()
    wrapped = harness.wrap(model, build_tokenizer(), batch_size=4, max_length=MAX_LENGTH, chat=False)
    settings = EvaluationSettings(apply_chat_template=False, max_length=MAX_LENGTH)
    return {
        entry.name: harness.run_task(
            wrapped, manager, entry, settings,
            chat_template="", world=None, externals={}, on_progress=lambda share: None,
        )[1]
        for entry in entries
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="no real data: set SMOLTULU_REAL_DATA")
def test_stock_tasks_over_local_files_equal_lm_evals_command_line(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", max_position_embeddings=MAX_LENGTH)
    files = _write(tmp_path, _splits())
    theirs = _command_line(tmp_path, model, files)
    ours = _ours(model, files)
    num_compared = 0
    for task, expected in theirs.items():
        rows = {(str(row["id"]), row["filter"]): row for row in ours[task]}
        assert len(rows) == len(expected) >= NUM_ITEMS
        for sample in expected:
            row = rows[str(sample["doc_id"]), sample["filter"]]
            assert row["prompt"] == sample["arguments"]["gen_args_0"]["arg_0"], task
            assert row["target_hash"] == sample["target_hash"][:16]
            if "completion" in row:
                assert row["completion"] == sample["resps"][0][0], task
            else:
                # The command line writes numbers as text.
                values = [float(choice[0][0]) for choice in sample["resps"]]
                assert row["logliks"] == pytest.approx(values, abs=1e-4, rel=0), task
            for name in sample["metrics"]:
                if isinstance(sample[name], (int, float)):
                    assert row["metrics"][name] == sample[name], (task, name)
                    num_compared += 1
    assert num_compared >= NUM_ITEMS * len(files)


def test_every_task_of_the_suites_is_known_with_its_metric() -> None:
    for suite in ("harness", "tulu3", "tiny"):
        entries = tuple(EvaluationTask.model_validate(one) for one in expand([{"suite": suite}]))
        assert len(entries) == len(SUITES[suite])
        names.check_names(entries)


def test_members_of_a_group_take_the_rows_of_their_own_subset() -> None:
    rows = [{"input": "a", "subset": "Number Theory"}, {"input": "b", "subset": "Counting & Probability"}]
    assert rows_of_subset("test", rows, "number_theory") == rows[:1]
    assert rows_of_subset("test", rows, "counting_and_probability") == rows[1:]
    plain = [{"input": "a"}]
    assert rows_of_subset("test", plain, "main") == plain
    with pytest.raises(ValueError, match=r"split 'test': no row has the subset 'algebra'; there are: Counting & Prob"):
        rows_of_subset("test", rows, "algebra")
    # A row without one is of no subset, wherever it stands.
    assert rows_of_subset("test", [*rows, *plain], "number_theory") == rows[:1]
    assert rows_of_subset("test", [*plain, *rows], "number_theory") == rows[:1]


def test_a_stock_group_runs_over_one_local_file(tmp_path: Path) -> None:
    """All 27 subsets of BBH lie in one file; `fields` says which column is the subset."""
    from transformers import AutoModelForCausalLM

    manager = harness.task_manager(stock=True)
    members = [name for name in manager.all_tasks if name.startswith("bbh_fewshot_")]
    subsets = [name.removeprefix("bbh_fewshot_") for name in members]
    assert len(subsets) == 27
    rows = [{"task": subset, "input": f"Is it {subset}?", "target": "no"} for subset in subsets]
    file = tmp_path / "bbh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "format": "text", "fields": {"subset": "task"}}
    task = EvaluationTask.model_validate(
        {"name": "bbh_fewshot", "metric": "exact_match,none", "num_fewshot": 0, "files": {"test": source}}
    )
    model = AutoModelForCausalLM.from_pretrained(str(build_tiny_model(tmp_path / "model"))).eval()
    wrapped = harness.wrap(model, build_tokenizer(), batch_size=4, max_length=400, chat=False)
    score, samples, _ = harness.run_task(
        wrapped, manager, task, EvaluationSettings(apply_chat_template=False, max_length=400),
        chat_template="", world=None, externals={}, on_progress=lambda share: None,
    )  # fmt: skip
    assert score.num_samples == 27 and score.task == "bbh_fewshot"
    assert {row["task"]: row["prompt"] for row in samples} == {
        f"bbh_fewshot_{subset}": next(row["prompt"] for row in samples if f"Is it {subset}?" in row["prompt"])
        for subset in subsets
    }
    mean = sum(row["metrics"]["bits_per_byte"] for row in samples) / 27
    assert score.details["metrics"]["bits_per_byte,none"] == pytest.approx(mean)
