"""Reports while a run goes on, after a kill, and the index of all runs: real stores, small hand-made artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoltulu.artifacts.store import Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.cli.main import app
from smoltulu.flows.reporting import PAGE, RECIPE, SUMMARY, RunReport, mark_killed, reports_of, rewrite, write_index
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.run import RunRecord, RunSummary
from smoltulu.schemas.verdict import Verdict
from tests.tasks.report.test_report import check_page, sample_run
from tests.tasks.report.test_verdict import RLVR

KEY = "ab" * 32


class SmallGraph:
    """What a report asks of a recipe's graph: nodes that were never made."""

    name = "tiny"

    class recipe:
        @staticmethod
        def model_dump(mode: str) -> dict[str, Any]:
            return {"name": "tiny", "description": "a\u202eb"}

    class Node:
        class stage:
            name = "sft"

            @staticmethod
            def makes(outputs: type) -> bool:
                return False

    nodes = {"base-model": Node, "sft": Node, "evaluation-sft": Node}

    @staticmethod
    def keys() -> dict[str, str]:
        return dict.fromkeys(SmallGraph.nodes, KEY)


def words(page: Path) -> str:
    return " ".join(" ".join(check_page(page.read_text("utf-8")).words).split())


def begun(root: Path, name: str = "tiny-night") -> tuple[Store, RunRecord, RunReport]:
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root)
    record = begin_run(store, name, SmallGraph(), "")  # type: ignore[arg-type]
    return store, record, RunReport(SmallGraph(), store, record)  # type: ignore[arg-type]


def test_a_run_has_a_page_from_its_first_moment(tmp_path: Path) -> None:
    store, record, report = begun(tmp_path / "store")
    report.write_while_running({}, {}, {}, ["base-model"])
    page = words(report.page)
    assert "The run goes on. 0 of 3 stages are there; running: base-model." in page and "No model has been made" in page
    summary = RunSummary.model_validate_json((report.folder / SUMMARY).read_text())
    assert (summary.state, summary.finished_at) == ("Running", "") and summary.written_at
    assert (reports_of(store.root) / "latest").read_text() == record.run_name
    assert record.run_name in (reports_of(store.root) / "index.html").read_text()
    assert "description" in (report.folder / RECIPE).read_text()
    # Nothing new: nothing is written. What fails is shown at once, and with the stage that it stopped.
    before = report.page.stat().st_ino
    report.write_while_running({}, {}, {}, ["base-model"])
    assert report.page.stat().st_ino == before
    report.write_while_running({}, {"base-model": "no \u202edisk"}, {"base-model": 3.0}, [])
    assert report.page.stat().st_ino != before and "Stopped at base-model no �disk" in words(report.page)
    done = end_run(store, record, "Failed", {"base-model": "Failed"})
    report.write(done, [], {"base-model": "no disk"}, {}, error="no disk")
    assert "The run goes on" not in words(report.page)
    assert [path.name for path in report.reports.rglob(".*")] == [], "no half-written file is left"


def killed_run(root: Path) -> None:
    """A process that begins a run, writes its page, and is killed."""
    code = f"""
import os, signal
from pathlib import Path
from tests.flows.test_reporting import begun
store, record, report = begun(Path({str(root)!r}))
report.write_while_running({{}}, {{}}, {{}}, ["sft"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def test_a_killed_run_is_said_to_be_killed_by_the_next_one(tmp_path: Path) -> None:
    """Its own last page could not know. What stood on it stays."""
    root = tmp_path / "store"
    killed_run(root)
    page = reports_of(root) / "tiny-night" / PAGE
    assert "The run goes on" in words(page), "whole, though the process was killed"
    _, _, later = begun(root, "tiny-other")
    later.write_while_running({}, {}, {}, [])
    assert "Killed. The process of this run ended without a word, while these ran: sft." in words(page)
    index = (reports_of(root) / "index.html").read_text()
    assert index.index("tiny-other") < index.index("tiny-night") and ">Killed<" in index and ">Running<" in index
    assert json.loads((page.parent / SUMMARY).read_text())["state"] == "Killed"
    assert mark_killed(root) == [], "once"
    assert (reports_of(root) / "latest").read_text() == "tiny-other"


def test_the_command_writes_pages_again(tmp_path: Path) -> None:
    root = tmp_path / "store"
    runner = CliRunner()
    done = runner.invoke(app, ["report", "--store", str(root)])
    assert done.exit_code == 1 and "no store at" in done.output
    killed_run(root)
    done = runner.invoke(app, ["report", "--store", str(root)])
    assert done.exit_code == 0 and "killed    tiny-night" in done.output and "index.html" in done.output
    page = reports_of(root) / "tiny-night" / PAGE
    page.unlink()
    assert runner.invoke(app, ["report", "tiny-night", "--store", str(root)]).exit_code == 0 and page.is_file()
    done = runner.invoke(app, ["report", "--index", "--store", str(root)])
    assert done.exit_code == 0 and "report    " not in done.output
    for wrong, said in (("tiny-nigt", "No such file"), ("../x", "is no name of a run")):
        done = runner.invoke(app, ["report", wrong, "--store", str(root)])
        assert done.exit_code == 1 and said in " ".join(done.output.split())
    done = runner.invoke(app, ["report", "tiny-night", "--index", "--store", str(root)])
    assert done.exit_code == 1 and "give one of the two" in done.output


def test_what_gc_removed_is_not_on_the_page_and_the_verdict_stays(tmp_path: Path) -> None:
    """The summary knows the scores and what they said."""
    (tmp_path / "store").mkdir()
    summary, *_ = sample_run(tmp_path / "gone")
    said = Verdict(measured=("dpo", "rlvr"), comparisons=(RLVR,))
    folder = reports_of(tmp_path / "store") / "tiny-old"
    folder.mkdir(parents=True)
    (folder / SUMMARY).write_text(summary.model_copy(update={"verdict": said}).model_dump_json())
    page = words(rewrite(tmp_path / "store", "tiny-old"))
    assert "RLVR over DPO: sampled +6.1 ± 0.6, greedy not distinguishable" in page and "0.702 ± 0.020" in page
    (folder / SUMMARY).write_text('{"run_name": 1}')
    with pytest.raises(ValueError, match=r"summary.json: .*another version wrote it"):
        rewrite(tmp_path / "store", "tiny-old")


def record(root: Path, name: str, started_at: str, **changes: Any) -> None:
    fields = {
        "run_name": name, "recipe": "tiny", "state": "Completed", "started_at": started_at,
        "finished_at": started_at, "host": os.uname().nodename, "pid": 1, "stages": {"sft": "sft"},
        "keys": {"sft": KEY},
    }  # fmt: skip
    (root / "runs").mkdir(parents=True, exist_ok=True)
    (root / "runs" / f"{name}.json").write_text(RunRecord.model_validate(fields | changes).model_dump_json())


def test_the_index_passes_over_what_it_cannot_read_and_names_it(tmp_path: Path) -> None:
    root, reports = tmp_path / "store", tmp_path / "reports"
    nasty = "<script>alert(1)</script>\u202e"
    summary, *_ = sample_run(tmp_path / "made")
    said = Verdict(measured=("dpo", "rlvr"), comparisons=(RLVR,))
    for number, name in enumerate(("tiny-a", "tiny-b", "tiny-c", "ünit run", "tiny-none")):
        record(root, name, f"2026-11-2{number}T07:00:00+00:00", recipe=nasty)
        if name != "tiny-none":
            (reports / name).mkdir(parents=True)
            (reports / name / PAGE).write_text("page")
            (reports / name / SUMMARY).write_text(summary.model_copy(update={"verdict": said}).model_dump_json())
    record(root, "audit", "2026-11-20T06:00:00+00:00", report_path=str(reports / "audit-rows" / "index.html"))
    record(root, "outside", "2026-11-20T05:00:00+00:00", report_path="/etc/passwd")
    (reports / "audit-rows").mkdir()
    (reports / "audit-rows" / "index.html").write_text("page")
    (reports / "tiny-b" / SUMMARY).write_text('{"scores": [')
    (reports / "tiny-c" / SUMMARY).write_text(
        '{"scores": [1, {"kind": "language_model", "value": "x"}], "stages": 3, "verdict": []}'
    )
    (root / "runs" / "broken.json").write_text("{")
    (root / "runs" / "foreign.json").write_text('{"wandb": 1}')
    source = write_index(root).read_text("utf-8")
    assert "<script>alert" not in source and "\u202e" not in source and source.count("<script>") == 1
    assert "runs/broken.json: passed over" in source and "runs/foreign.json: passed over" in source
    assert "reports/tiny-b/summary.json: passed over" in source
    order = [
        source.index(f">{name}<")
        for name in ("tiny-none", "ünit run", "tiny-c", "tiny-b", "tiny-a", "audit", "outside")
    ]
    assert order == sorted(order)
    assert 'href="%C3%BCnit%20run/report.html"' in source and 'href="audit-rows/index.html"' in source
    assert "passwd" not in source and source.count("no report") == 2
    assert "RLVR is better than DPO on 1 of 2 scores." in source and "tiny_arithmetic 0.712 ± 0.020" in source
    assert "21 of 1" not in source and "23 of 1" in source  # stages that are there, of those that were planned
    assert not (reports / "index.html").with_name(f".index.html.{os.getpid()}").exists()


def test_an_empty_store_has_an_index(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert "No run has begun in this store." in write_index(tmp_path / "store").read_text()


def test_a_thousand_runs_are_indexed_in_seconds(tmp_path: Path) -> None:
    """Each with the summary of a whole run of `tiny`. The limit allows for a busy machine."""
    root = tmp_path / "store"
    summary, *_ = sample_run(tmp_path / "made")
    text = summary.model_copy(
        update={"verdict": Verdict(measured=("dpo", "rlvr"), comparisons=(RLVR,))}
    ).model_dump_json()
    for number in range(1000):
        name = f"tiny-{number:04d}"
        record(root, name, f"2026-11-21T07:{number // 60:02d}:{number % 60:02d}+00:00")
        (tmp_path / "reports" / name).mkdir(parents=True)
        (tmp_path / "reports" / name / SUMMARY).write_text(text)
    began = time.process_time()
    source = write_index(root).read_text()
    print(time.process_time() - began, len(text))
    assert source.count("data-find") >= 1000 and time.process_time() - began < 6
    assert len(Catalogue(root).runs()) == 1000


def test_a_reference_of_a_run_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    """A stage that was made, and removed before the page was written."""
    store, _, report = begun(tmp_path / "store")
    from smoltulu.artifacts.store import Missing

    store.find = lambda spec, digests=None: Missing("is gone")  # type: ignore[method-assign]
    report.graph.spec = lambda node: None  # type: ignore[method-assign, attr-defined, misc]
    gone = ArtifactReference(
        stage="sft", node="sft", key=KEY, digest=KEY, path=str(tmp_path), outcome="Completed", outputs={}, metrics={}
    )
    report.write_while_running({"sft": gone}, {}, {}, [])
    assert "The run goes on. 0 of 3 stages are there" in words(report.page)
