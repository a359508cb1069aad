"""What a run's report says of mixtures, held-out losses, and tables of data; and the files beside it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from smoltulu.schemas.artifact import InputRecord, Manifest
from smoltulu.schemas.held_out_loss import HeldOutLoss, HeldOutLossOutputs
from smoltulu.schemas.mixture import MixtureOutputs, SourceShare
from smoltulu.schemas.preflight import LengthReport, PreflightOutputs
from smoltulu.tasks.report import html_report
from smoltulu.tasks.report.page import table_files
from smoltulu.tasks.report.tables import sets_of_run
from tests.tasks.report.test_report import sample_run


def section(page: str, name: str) -> str:
    start = page.index(f'<section id="{name}">')
    return " ".join(page[start : page.index("</section>", start)].split())


def with_outputs(manifest: Manifest, outputs: Any, **changes: Any) -> Manifest:
    return manifest.model_copy(update={"outputs": outputs, **changes})


def test_mixtures_and_their_tokens(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    shares = (
        SourceShare(label="a<b>", num_given=1200, num_held_out=12, num_left_out=3, num_distinct=1185, num_rows=3555),
        SourceShare(label="c", num_given=900, num_distinct=500, num_rows=500),
    )
    made = MixtureOutputs(kind="sft", num_rows=4055, num_held_out=12, shares=shares)
    node = manifests["contamination-sft"]
    manifests["contamination-sft"] = with_outputs(node, made.model_dump(mode="json"))
    preflight = manifests["verifier-audit"]
    tokens = PreflightOutputs(
        num_rows=4055,
        num_source_rows=4055,
        lengths=LengthReport(mean=19.0, percentiles={}),
        tokens_by_source={"0": 70_001, "1": 8_002},
    ).model_dump(mode="json")
    inputs = {"dataset": InputRecord(stage="mixture", key=node.key, digest="ef" * 32)}
    manifests["verifier-audit"] = with_outputs(preflight, tokens, inputs=inputs)
    shown = section(html_report(summary, manifests, folders, recipe), "mixtures")
    assert "a&lt;b&gt;" in shown
    cells = [part.partition("<")[0] for part in shown.split('<td class="n">')[1:]]
    assert cells == [
        "1,200", "12", "3", "0", "1,185", "2,370", "3,555", "87.67 %", "70,001",
        "900", "0", "0", "400", "500", "0", "500", "12.33 %", "8,002",
    ]  # fmt: skip


def test_sources_that_a_selection_reads_again_are_told_once(tmp_path: Path) -> None:
    """Another set with the same counts is another set."""
    summary, manifests, folders, recipe = sample_run(tmp_path)
    names = [run.node for run in summary.stages if run.node.startswith("dataset-")][:3]
    outputs = manifests[names[0]].outputs
    for name in names[1:]:
        manifests[name] = with_outputs(manifests[name], outputs)
    shown = section(html_report(summary, manifests, folders, recipe), "data")
    assert all(f">{name.removeprefix('dataset-')}</th>" in shown for name in names)
    # The last of them is one source of the first, read once more to be scored.
    for found in (manifests, folders):
        found["dataset-sft-0"] = found.pop(names[2])
    stages = tuple(
        run.model_copy(update={"node": "dataset-sft-0"}) if run.node == names[2] else run for run in summary.stages
    )
    shown = section(html_report(summary.model_copy(update={"stages": stages}), manifests, folders, recipe), "data")
    assert f">{names[1].removeprefix('dataset-')}</th>" in shown and ">sft-0</th>" not in shown


def test_a_held_out_loss(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    found = HeldOutLossOutputs(
        num_rows=50,
        num_counted=4321,
        losses=tuple(
            HeldOutLoss(step=10 * number, loss=loss, stderr=0.01) for number, loss in enumerate((3.0, 1.5, 2.0))
        ),
        kept_step=10,
        why="keep is best: the weights of step 10 are kept",
        ended_early="at step 20 of 90 nothing was lower",
    )
    sft = manifests["sft"]
    manifests["sft"] = with_outputs(sft, sft.outputs | {"held_out_loss": found.model_dump(mode="json")})
    shown = section(html_report(summary, manifests, folders, recipe), "held_out_loss")
    for said in ("3.0000 ± 0.0100", "1.5000 ± 0.0100", "2.0000 ± 0.0100", "4,321 supervised tokens of 50 rows",
                 "The run ended early:", "lower than the truth"):  # fmt: skip
        assert said in shown, said
    assert "Accuracy" not in shown


def test_tables_of_data_lie_beside_the_report(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path)
    node = manifests["contamination-sft"]
    counts = {"num_instances": 0, "num_skipped": 0, "num_contaminated": 0}
    benchmarks = [
        counts | {"name": "gsm8k", "num_instances": 1319, "num_contaminated": 1},
        counts | {"name": "gpqa", "not_checked": "gated"},
    ]
    manifests["contamination-sft"] = with_outputs(node, node.outputs | {"benchmarks": benchmarks})
    shown = section(html_report(summary, manifests, folders, recipe), "tables")
    assert "Table 1: contamination of the SFT data" in shown and "Table 4:" not in shown
    assert '<a href="tables.csv">' in shown and '<a href="tables.html">' in shown
    files = table_files(manifests, folders)
    lines = [line for line in csv.DictReader(io.StringIO(files["tables.csv"])) if line["table"] == "1"]
    ours = {line["row"]: line for line in lines if line["column"] == "sft"}
    assert (ours["GSM8K"]["value"], ours["GSM8K"]["comparable"]) == ("0.08", "no"), "of another data set"
    assert (ours["GPQA"]["value"], ours["GPQA"]["said"], ours["MMLU"]["said"]) == ("", "not checked", "not checked")
    assert files["tables.html"].startswith("<!DOCTYPE html>") and "gated" in files["tables.html"]
    assert table_files({}, {}) == {}


def test_rows_that_a_setting_dropped_are_not_all_of_a_data_set(tmp_path: Path) -> None:
    """Its contamination would stand beside the published one of other rows."""
    _, manifests, _, _ = sample_run(tmp_path)
    source = {"repository": "org/pairs", "split": "train"}
    found = []
    for dropped in ({}, {"a margin below 2": 3}):
        report = {
            "label": "pairs",
            "num_rows": 9,
            "num_malformed": 0,
            "reasons": {},
            "examples": (),
            "dropped": dropped,
        }
        read = manifests["contamination-sft"].model_copy(deep=True)
        read.spec.config["data"] = {"sources": [source]}
        read = with_outputs(read, {"kind": "preference", "num_rows": 6, "sources": [report]}, key="ab" * 32)
        check = manifests["contamination-sft"].model_copy(
            update={"inputs": {"dataset": InputRecord(stage="dataset", key="ab" * 32, digest="ef" * 32)}}
        )
        (made,) = sets_of_run({"dataset-sft": read, "contamination-sft": check})
        found.append(made.repository)
    assert found == ["org/pairs", None]
