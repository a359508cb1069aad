"""What the tests of the suite `paper` share: rows, loaded tasks, and as much of a model as preparing them needs."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.evaluation import EvaluationTask
from smoltulu.schemas.suites import SUITES
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.evaluation import lm_eval as harness
from smoltulu.tasks.evaluation.prepare import FittedExamples, fit_examples, limit_answers
from tests.tiny_model import build_tokenizer

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no SMOLTULU_REAL_DATA")

BBH_ROWS = {
    "boolean_expressions": [178, 215, 196, 10], "causal_judgement": [101, 103, 9, 69],
    "date_understanding": [98, 162, 22, 86], "disambiguation_qa": [136, 167, 6, 99],
    "dyck_languages": [201, 101, 12, 43], "formal_fallacies": [182, 211, 195, 6],
    "geometric_shapes": [111, 186, 32, 100], "hyperbaton": [186, 203, 210, 9],
    "logical_deduction_five_objects": [206, 127, 249, 115], "logical_deduction_seven_objects": [7, 94, 214, 207],
    "logical_deduction_three_objects": [150, 164, 13, 105], "movie_recommendation": [176, 182, 122, 19],
    "multistep_arithmetic_two": [143, 46, 81, 155], "navigate": [168, 230, 181, 13],
    "object_counting": [111, 95, 146, 116], "penguins_in_a_table": [86, 9, 52, 96],
    "reasoning_about_colored_objects": [209, 201, 67, 109], "ruin_names": [191, 30, 58, 146],
    "salient_translation_error_detection": [234, 105, 127, 4], "snarks": [99, 105, 11, 74],
    "sports_understanding": [176, 214, 198, 12], "temporal_sequences": [185, 201, 31, 80],
    "tracking_shuffled_objects_five_objects": [136, 216, 128, 21],
    "tracking_shuffled_objects_seven_objects": [164, 17, 94, 233],
    "tracking_shuffled_objects_three_objects": [143, 156, 10, 93], "web_of_lies": [199, 187, 227, 101],
    "word_sorting": [136, 30, 213, 241],
}  # fmt: skip


IFEVAL = {"key": 1, "prompt": " Write {{x}} \n", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ARC = {"query": "Question: What is ice?", "choices": ["water", " a stone"], "gold": 0}
PIQA = {"goal": "chip {{clip}}", "sol1": " can  be broken ", "sol2": "no", "label": 1}
HELLASWAG = {
    "activity_label": "Making tea", "ctx_a": "[header] How to make tea [title] Boil water.", "ctx_b": "then  THE cup",
    "endings": ["is [substeps] full. ", "[step] breaks"], "label": "0",
}  # fmt: skip
MMLU_PRO = {
    "question": "Who pays?", "options": ["a bank", "B. nobody", "we"], "answer_index": 2,
    "category": "computer_science",
}  # fmt: skip

ARCS = {"easy": ARC, "challenge": ARC}
TRAIN = [{"question": f"Q{n}?", "answer": f"A{n}\n#### {n}"} for n in range(9)]


def real_rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def real_file(name: str) -> dict[str, Any]:
    return {"path": str(DATA / name), "format": "text"}


def write_file(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path), "format": "text"}


def load_all(name: str, files: dict[str, Any]) -> dict[str, Any]:
    entry = next(one for one in SUITES["paper"] if one["name"] == name)
    task = EvaluationTask.model_validate({**entry, "files": files})
    digests = {f"{name}.data.{at}": source_digest(source) for at, source in enumerate(task.files.values())}
    return harness._load(harness.task_manager(stock=False), task, None, digests)  # type: ignore[no-any-return]


def load_one(name: str, files: dict[str, Any], only: str = "") -> Any:
    """The one task of that name, or the member `only` of a group."""
    tasks = load_all(name, with_all_subsets(files) if name == "paper_bbh" else files)["tasks"]
    return tasks[f"{name}::{only}" if only else name]


def with_all_subsets(files: dict[str, Any]) -> dict[str, Any]:
    """BBH's file with rows of each subset that has none."""
    file = Path(files["test"]["path"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    given = {row["task"] for row in rows}
    rows += [{"task": one, "input": str(at), "target": "-"} for one in BBH_ROWS if one not in given for at in range(4)]
    return {"test": write_file(file, rows)}


class Model(SimpleNamespace):
    """What the preparation of a task asks of lm-eval's model: a template and tokens."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def model_with(template: str, max_length: int = 2048) -> Model:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{template}.jinja").read_text("utf-8")
    return Model(tokenizer=tokenizer, max_length=max_length)


def requests_of(leaf: Any, model: Model, *, chat: bool = True, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Prompt and what is scored or asked behind it, of the task's first items."""
    leaf.build_all_requests(
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=model.apply_chat_template if chat else None,
    )
    for instance in leaf.instances:
        yield instance.args


def prepared(leaf: Any, model: Model, *, chat: bool = True, limit: int | None = None) -> FittedExamples | None:
    limit_answers(leaf, lambda text: len(model.tok_encode(text)), chat=chat)
    return fit_examples(leaf, model, harness._max_gen_toks(leaf), limit, chat=chat)  # type: ignore[arg-type]
