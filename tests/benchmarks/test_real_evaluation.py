"""The benchmark on the real model: what it would run, and what it calls near. The model itself is not here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import real_evaluation, real_model
from benchmarks.real_evaluation import ROWS, Row, recipe_of, show, verdict
from benchmarks.real_prompts import held_out_rows, training_rows
from smoltulu.flows.recipe import load_recipe


def options(**changes: object) -> argparse.Namespace:
    given = {"data": Path("/data"), "model": Path("/model"), "device": "cpu", "threads": 1, "batch": 8}
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.task}-{row.suite}")
@pytest.mark.parametrize(("device", "precision"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_every_row_is_a_recipe(row: Row, device: str, precision: str) -> None:
    evaluation = load_recipe(recipe_of(row, options(device=device), row.cpu_limit, 0.5)).evaluation
    assert evaluation is not None and evaluation.precision == precision
    assert evaluation.apply_chat_template == (row.suite == "paper")
    [task] = evaluation.tasks
    assert (task.name, task.limit, task.num_fewshot) == (row.task, row.cpu_limit, row.num_fewshot)
    assert {source.path for source in task.files.values()} == {f"/data/{file}" for file in row.files.values()}


def test_what_is_near() -> None:
    """Within the allowed points, or two standard errors where they are more; a part is shown and not judged."""
    row = Row("PIQA", "paper", "paper_piqa", "acc_norm,none", 66.3, "a card", {}, 2.5)
    assert verdict(row, 64.0, 1.1, is_part=False) == ("-2.3", "2.5", True)
    assert verdict(row, 63.7, 1.1, is_part=False) == ("-2.6", "2.5", False)
    assert verdict(row, 63.7, 1.4, is_part=False) == ("-2.6", "2.8", True)
    assert verdict(row, 50.0, 1.1, is_part=True) == ("-16.3", "(2.5)", True)
    shown = Row("GSM8K", "paper", "paper_gsm8k", "exact_match,none", 1.4, "a card", {})
    assert verdict(shown, 9.0, 1.0, is_part=False) == ("+7.6", "(2.0)", True)


def test_the_table_names_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    score = {
        "value": 0.66, "stderr": 0.011, "num_samples": 1838, "limited": False,
        "details": {"metrics": {"acc,none": 0.67}, "num_left_cut": 2},
    }  # fmt: skip
    assert show({0: score}) and not show({5: score})
    shown = capsys.readouterr().out
    assert "| PIQA, paper | 1,838 | 66.00 ± 1.10 | 66.30 | -0.3 | 2.5 | yes | acc_norm,none |" in shown
    assert '{"acc,none": 0.67} {"num_left_cut": 2}' in shown and real_evaluation.CARD in shown


def test_prompts_are_written_once(tmp_path: Path) -> None:
    """The recipe `real-135m` is keyed by their content."""
    file = tmp_path / "rows.jsonl"
    real_model.write_rows(file, held_out_rows(0, 2))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 34 and rows[0]["verifier"] == "ifeval"
    real_model.write_rows(file, [])
    assert len(file.read_text().splitlines()) == 34
    asked = {row["prompt"][0]["content"] for row in training_rows(0)}
    assert not asked & {row["prompt"][0]["content"] for row in rows}
