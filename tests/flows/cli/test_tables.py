"""`smoltulu tables`, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.recipes import PUBLISHED
from tests.flows.cli.test_compare import evaluate
from tests.flows.cli.test_store_cli import call, words
from tests.hand_store import HandStore


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


@pytest.fixture
def run(store: HandStore) -> dict[str, Ref]:
    """SFT has 10, DPO 30 of 40 items of GSM8K right, the stock task."""
    made: dict[str, Ref] = {}
    for stage, num_right in (("sft", 10), ("dpo", 30)):
        made[stage] = store.make(stage, stage)
        made[f"evaluation-{stage}"] = evaluate(store, made[stage], num_right)
    store.run("brave-fox", made)
    return made


def titles(shown: str) -> list[str]:
    return [line.removeprefix("### ") for line in shown.splitlines() if line.startswith("### ")]


def test_a_run(store: HandStore, run: dict[str, Ref]) -> None:
    shown = call(store, "tables", "brave-fox").stdout
    assert titles(shown)[0] == "Language models: stages × tasks" and len(titles(shown)) == 4  # 3, 6 and 9
    assert "| gsm8k exact_match,strict | 0.250 ± 0.010 (n = 40) | **0.750 ± 0.010** (n = 40) | lm-eval" in shown
    table = shown[shown.index("### Table 3") : shown.index("### Table 6")]
    assert "| GSM8K (5-shot) | 49.0 | 42.8 | 48.2 | - | - |" in table
    assert "| gsm8k exact_match,strict | - | - | - | 25.0 ± 1.0 (n = 40) not comparable" in table
    assert (
        "not comparable: gsm8k is defined otherwise than paper_gsm8k of suite paper; 0-shot, published 5-shot" in table
    )


def test_formats_and_tables_by_name(store: HandStore, run: dict[str, Ref]) -> None:
    for names in (("--table", "3,6"), ("--table", "3", "--table", " 6")):
        assert [one.partition(":")[0] for one in titles(call(store, "tables", "brave-fox", *names).stdout)] == [
            "Table 3", "Table 6"
        ]  # fmt: skip
    assert call(store, "tables", "brave-fox", "--format", "latex").stdout.count(r"\begin{tabular}") == 4
    page = call(store, "tables", "brave-fox", "--format", "html").stdout
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    result = call(store, "tables", "brave-fox", "--table", "8")
    assert "94.13" in result.stdout and "No model of this table was measured here." in result.stdout
    assert (
        "note: nothing of 'Table 8: performance comparison of reward models' was measured by brave-fox" in result.stderr
    )


def test_data_of_a_run_without_a_model(store: HandStore) -> None:
    """Named twice it is one column. A check of one's own benchmark alone is in no table by itself, which is said."""
    counts = {"num_instances": 4, "num_skipped": 0, "num_contaminated": 1}
    outputs = {"kind": "sft", "num_rows_read": 9, "num_rows": 9, "num_removed": 0, "num_rows_contaminated": 1}
    for name, benchmark in (("own", "mine"), ("papers", "gsm8k")):
        check = outputs | {"benchmarks": [counts | {"name": benchmark}]}
        made = store.make("contamination", name, outputs=check, settings={}, kind="sft")
        store.run(name, {"contamination-sft": made})
    result = call(store, "tables", "own")
    assert not result.stdout.strip() and "--table names one: 1, 4, 13, 10, 11, 12" in words(result.stderr)
    assert (
        "| mine | - | 25.00 (n = 4) | mode full, turns of user |" in call(store, "tables", "own", "--table", "1").stdout
    )
    shown = call(store, "tables", "papers", "papers").stdout
    assert titles(shown) == ["Table 1: contamination of the SFT data"]
    assert shown.count("papers sft, measured") == 1 and "25.00 (n = 4) not comparable" in shown


def test_several_models_are_told_apart(store: HandStore, run: dict[str, Ref]) -> None:
    again = {"sft": store.make("sft", "again")}
    again["evaluation-sft"] = evaluate(store, again["sft"], 12)
    store.run("calm-owl", again)
    shown = call(store, "tables", "brave-fox", "calm-owl", "--table", "3").stdout
    assert "| brave-fox SFT, measured | calm-owl SFT, measured |" in shown
    shown = call(
        store, "tables", "brave-fox:sft", "calm-owl:sft", run["evaluation-dpo"].key, "--table", "stages"
    ).stdout
    assert (
        f"| brave-fox SFT, measured | calm-owl SFT, measured | {run['evaluation-dpo'].key[:8]} DPO, measured" in shown
    )
    once = call(store, "tables", "brave-fox:sft", run["sft"].key, "--table", "stages").stdout
    assert once.count("SFT, measured") == 1  # the same evaluation twice


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            ("brave-fox", "--table", "7"),
            "no table is called '7'; there are stages, 3, 6, 8, 9, smollm2-135m, 1, 4, 13, 10, 11, 12",
        ),
        (("brave-fux",), "did you mean 'brave-fox'"),
        (("brave-fox:rlvr",), "brave-fox has no evaluation of 'rlvr'; name one of its models: brave-fox:sft"),
        (("bare",), "bare has no finished evaluation; run it up to evaluation, or name another run"),
        (("brave-fox", "--published", "nowhere.yaml"), "No such file or directory: nowhere.yaml"),
    ],
)
def test_bad_input(store: HandStore, run: dict[str, Ref], what: tuple[str, ...], said: str) -> None:
    store.run("bare", {"sft": run["sft"]})
    assert said in words(call(store, "tables", *what, code=1).output)


def test_an_evaluation_of_another_shape(store: HandStore, run: dict[str, Ref]) -> None:
    odd: dict[str, Any] = {"subject": "sft", "scores": [{"task": "gsm8k", "value": 0.5}]}
    made = store.make("evaluation", "odd", {"model": run["sft"]}, outputs=odd, kind="language_model")
    said = words(call(store, "tables", made.key, code=1).output)
    assert f"evaluation/{made.key[:12]} is an evaluation of another version (scores.0.metric: Field required)" in said
    assert "evaluate this model again" in said


def test_items_that_cannot_be_read_are_told(store: HandStore, run: dict[str, Ref]) -> None:
    file = next(store.folder(run["evaluation-sft"]).glob("gen-*/samples.jsonl"))
    file.write_text('{"task"\n')
    result = call(store, "tables", "brave-fox", "--table", "stages")
    assert "note: SFT: the items cannot be read, so no score of it is tested: samples.jsonl, line 1" in result.stderr
    assert "**" not in result.stdout and "not compared item by item: SFT with DPO (no items were kept)" in result.stdout


def test_published_figures_of_ones_own(store: HandStore, run: dict[str, Ref], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = PUBLISHED.read_text().replace('title: "SmolTulu SFT-1130"', 'title: "Mine & <yours>"')
    own.write_text(text)
    shown = call(store, "tables", "brave-fox", "--published", str(own), "--table", "3").stdout
    assert "A: Mine &amp; &lt;yours&gt;, published" in shown
    own.write_text(text.replace("arc: 51.0,", "arc: 510,", 1))
    said = words(call(store, "tables", "brave-fox", "--published", str(own), code=1).output)
    assert "models.sft-1130.figures.arc: Input should be less than or equal to 100" in said
    own.write_text(text.replace("arc: 51.0,", "arc: 51.0, arc: 52.0,", 1))
    said = words(call(store, "tables", "brave-fox", "--published", str(own), code=1).output)
    assert "`arc` is given twice" in said


def test_no_heavy_import(store: HandStore, run: dict[str, Ref]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from smoltulu.flows.cli.main import app\n"
        f"made = CliRunner().invoke(app, ['tables', 'brave-fox', '--store', {str(store.root)!r}])\n"
        "assert made.exit_code == 0, made.output\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'lm_eval', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
