"""A training stage `sft2`, added as docs/how-to-add-a-stage.md says: whatever knows of SFT must know of it too.

What the guide has one write is put in place here: its settings and their block in `Recipe`, the stage in its module, a
line in `STAGES`, a line in the graph. Nothing else is touched.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

import smoltulu.tasks.engine.launch
from smoltulu.artifacts.store import Found, Store
from smoltulu.flows.cli.plan import as_dict, show
from smoltulu.flows.graphs.recipe_graph import Graph, preflight_config
from smoltulu.flows.planning.plan import plan
from smoltulu.flows.recipe import RecipeError, check_stage_names, load_recipe, recipe_stages
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import science, scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.preflight import PreflightInputs, PreflightOutputs, PreflightSettings
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.run import RunScore
from smoltulu.schemas.training import SFTSettings, TrainingInputs
from smoltulu.tasks.engine.launch import StageFailed, run_child
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.job import Job
from smoltulu.tasks.report import html_report, markdown, summarise
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.gate import gate_failures
from smoltulu.tasks.training.sft import build, train_sft
from tests import small_runs
from tests.flows.planning.test_plan import NUM_PARAMETERS, ROWS, finish, rows_of
from tests.rows_file import write_rows
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

LOG = logging.getLogger("test")
SFT2 = {"learning_rate": 1e-4, "effective_batch_size": 8, "max_length": 128, "precision": "float32"}


class SFT2Settings(SFTSettings):
    """Its schema."""


@pytest.fixture(autouse=True)
def sft2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The guide's steps, taken back afterwards."""
    stage = Stage("sft2", 1, SFT2Settings, TrainingInputs, ModelOutputs, train_sft, gate_failures, build)
    lay_out = Graph._lay_out

    def with_one_line_more(graph: Graph) -> None:
        lay_out(graph)
        graph._evaluate(graph._train("sft2", "sft"), "language_model")

    monkeypatch.setattr(Graph, "_lay_out", with_one_line_more)
    before = dict(STAGES)
    STAGES.clear()
    for name, one in before.items():
        STAGES.update({name: one} | ({"sft2": stage} if name == "sft" else {}))
    Recipe.model_fields["sft2"] = FieldInfo.from_annotated_attribute(SFT2Settings | None, science(None, title="SFT 2"))
    Recipe.model_rebuild(force=True)
    yield stage
    del Recipe.model_fields["sft2"]
    Recipe.model_rebuild(force=True)
    STAGES.clear()
    STAGES.update(before)


def recipe(**changes: Any) -> Recipe:
    compute = {"compute.stages.sft2": {"per_device_train_batch_size": 4}}
    return load_recipe("tiny", {f"sft2.{name}": value for name, value in SFT2.items()} | compute | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def job(folder: Path, model: Path, settings: dict[str, Any], **compute: Any) -> Job:
    """The stage on seven conversations, tokenised as the preflight of SFT does it."""
    sft, inputs, context = small_runs.stage_arguments(
        "sft", folder, model, small_runs.conversations(7)[1:], settings, min_free_disk_gb=0, **compute
    )
    config = SFT2Settings(**sft.model_dump())
    spec = Spec(stage="sft2", version=1, config=scientific(config), inputs={}, externals={})
    return Job("sft2", STAGES["sft2"], config, context.compute, spec, inputs)


# --- The recipe and the graph -----------------------------------------------------------------------------------------


def test_its_batch_must_divide_and_its_rows_must_be_there() -> None:
    (lowered,) = recipe(**{"compute.stages.sft2": {"per_device_train_batch_size": 3}}).batch_notes()
    assert lowered.startswith("sft2: per_device_train_batch_size 3 does not divide") and "lowered to 2" in lowered
    fewer, *_ = recipe(**{"compute.stages.sft2": {"num_processes": 3}}).batch_notes()
    assert fewer.startswith("sft2: effective_batch_size 8 is not a multiple of num_processes 3: runs on 2")
    with pytest.raises(RecipeError, match=r"sft2: needs data\.sft; add it or remove the sft2 block"):
        recipe(**{"data.sft": None})


def test_it_can_be_named_in_until_refresh_and_compute() -> None:
    asked = recipe(**{"compute.stages.sft2": {"per_device_train_batch_size": 4, "save_steps": 7}})
    check_stage_names(asked, "sft2", ["sft2"])
    assert recipe_stages(asked)[recipe_stages(asked).index("sft") + 1] == "sft2"
    assert asked.compute.of("sft2").save_steps == 7
    assert {"preflight-sft2", "sft2", "evaluation-sft2"} <= Graph(asked, "sft2").nodes.keys()
    assert "sft2" not in Graph(asked, "sft").nodes


# --- The plan ---------------------------------------------------------------------------------------------------------


def test_plan_has_its_steps_tokens_flops_and_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, store = Graph(recipe()), Store(tmp_path / "store")
    for name in graph.nodes:
        finish(store, graph, name)
        if name == "sft":
            break
    finish(store, graph, "preflight-sft2")
    planned = plan(graph.recipe, None, [], store, graph)
    row = rows_of(planned)["sft2"]
    assert row.status == "runs"
    # One epoch of 1,000 rows in steps of 8; 500 tokens a row; 6 FLOPs a parameter and token.
    assert (row.estimate.num_steps, row.estimate.num_tokens) == (ROWS // 8, 500 * ROWS)
    assert row.estimate.flops == 6.0 * NUM_PARAMETERS * 500 * ROWS
    # Weights and Adam's moments are 12 bytes a parameter; one checkpoint is there and one in writing.
    assert row.estimate.peak_disk_bytes is not None and row.estimate.peak_disk_bytes >= 2 * 12 * NUM_PARAMETERS
    assert row.preflight is not None and row.preflight.num_tokens == 500 * ROWS
    others = [r.estimate.num_steps for r in planned.rows if r.node in ("reward-model", "dpo", "rlvr")]
    assert planned.totals["num_steps"].value == ROWS // 8 + sum(n or 0 for n in others)
    show(planned, as_json=False)
    assert "sft2" in capsys.readouterr().out
    assert any(stage["node"] == "sft2" for stage in as_dict(planned)["stages"])


# --- The engine -------------------------------------------------------------------------------------------------------


def test_it_is_started_with_as_many_processes_as_asked_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(tmp_path, model, {}, num_processes=2)
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(StageFailed, match="ended with status 1"):
        run_child(asked, tmp_path, tmp_path / "output", LOG)
    assert json.loads((tmp_path / "job.json").read_text())["num_ranks"] == 2


def test_out_of_memory_halves_its_micro_batch_and_not_the_effective_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = job(tmp_path, model, {"effective_batch_size": 6}, per_device_train_batch_size=6)
    (tmp_path / "output").mkdir()
    tried: list[int] = []

    def run_once(asked: Job, compute: ComputeSettings, *_: Any) -> str | None:
        assert asked.config.effective_batch_size == 6  # type: ignore[attr-defined]
        tried.append(compute.per_device_train_batch_size)
        return "CUDA out of memory"

    monkeypatch.setattr(smoltulu.tasks.engine.launch, "_run_once", run_once)
    with pytest.raises(ValueError, match=r"sft2: out of memory .* no smaller one gives the same effective batch; set"):
        run_child(asked, tmp_path, tmp_path / "output", LOG)
    assert tried == [6, 3, 1]
    assert "per_device_train_batch_size 6: goes on with 3, same effective batch" in caplog.messages[0]


def test_a_disk_that_is_too_small_is_said_before_it_starts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(tmp_path, model, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**5))
    with pytest.raises(ValueError, match=r"sft2 needs .*B more for checkpoints and rows"):
        run_stage(asked, Store(tmp_path / "store"), LOG)


def test_the_dry_run_is_its_own(tmp_path: Path, model: Path) -> None:
    checks = PreflightSettings(max_overlong_share=1, max_unstable_share=1, max_faulty_share=1, dry_run=True)
    config = preflight_config("sft2", SFT2Settings(**SFT2), checks)
    rows = write_rows(tmp_path / "rows.parquet", small_runs.conversations(6))
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    compute = ComputeSettings.model_validate(
        {"device": "cpu", "num_threads": 1, "stages": {"sft2": {"per_device_train_batch_size": 3}}}
    )
    outputs, _ = STAGES["preflight"].function(
        config,
        PreflightInputs(model=str(model), dataset=str(rows), chat_template=TULU_TEMPLATE),
        StageContext(tmp_path / "out", tmp_path / "work", compute, lambda *args, **kwargs: None),
    )
    assert isinstance(outputs, PreflightOutputs) and outputs.disk_bytes is not None and outputs.dry_run is not None
    # The largest batch that the training would use: of 8 rows, at most 3 at a time.
    assert (outputs.dry_run.subject, outputs.dry_run.per_device_train_batch_size) == ("sft2", 2)
    assert "Preflight of SFT 2" in (tmp_path / "out" / "logs" / "report.html").read_text()


# --- The report, of a training that really ran ------------------------------------------------------------------------


def test_the_report_has_its_title_and_its_curves(tmp_path: Path, model: Path) -> None:
    asked, store = job(tmp_path, model, {"max_steps": 3}, launcher="inline"), Store(tmp_path / "store")
    reference = run_stage(asked, store, LOG)
    found = store.find(asked.spec)
    assert isinstance(found, Found) and reference.outcome == "Completed"
    summary = summarise(
        run_name="probe", recipe="tiny", state="Completed", started_at="2026-11-01T10:00:00+00:00",
        finished_at="2026-11-01T10:01:00+00:00", planned=[("sft2", "sft2", "language model")],
        made=[(reference, found.manifest)],
    )  # fmt: skip
    score = RunScore(
        node="evaluation-sft2", kind="language_model", subject="sft2", task="arithmetic", metric="acc", value=0.5,
        num_samples=10, harness="h", task_version="1", template_digest="d",
    )  # fmt: skip
    summary = summary.model_copy(update={"scores": (score,)})
    page = html_report(summary, {"sft2": found.manifest}, {"sft2": found.folder}, "")
    assert "<h3>SFT 2</h3>" in page and "<b>loss</b>" in page and "<b>mean_token_accuracy</b>" in page
    assert "| SFT 2 |" in markdown(summary)
