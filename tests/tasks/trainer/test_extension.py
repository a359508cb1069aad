"""Making a finished training longer: from its stored checkpoint, and bit by bit as if trained from the start."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER, fault, mark_complete, place_checkpoint
from smoltulu.artifacts.keys import manifest_checksum, records_digest
from smoltulu.artifacts.store import Found, Store, read_manifest
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.plan import PlanRow, plan
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import ArtifactReference, ExtendedTraining, FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.schedules import ConstantSchedule, CosineSchedule, PowerSchedule, WSDSchedule, WSDSSchedule
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.extension import begin_with, find_source_run, same_sums
from smoltulu.tasks.trainer.schedules import extension_step, learning_rate_factor, same_past
from tests.example_outputs import example_outputs
from tests.golden_keys import made_up_commit
from tests.small_runs import conversations, pairs, stage_arguments
from tests.tasks.trainer.test_schedules import schedules
from tests.tiny_model import build_tiny_model

LOG = logging.getLogger("test")
#: 14 rows, 4 a step: four steps an epoch, the last of them with two rows.
NUM_ROWS, BATCH = 14, 4


def wsd(**changes: Any) -> dict[str, Any]:
    return {"kind": "wsd", "warmup_steps": 2, "decay_ratio": 0.25, "decay_shape": "linear"} | changes


def wsd_s(*budgets: int) -> dict[str, Any]:
    return {"kind": "wsd_s", "warmup_steps": 2, "budgets": list(budgets), "decay_ratio": 0.25}


# --- The pure part ----------------------------------------------------------------------------------------------------


def test_the_step_that_a_larger_budget_goes_on_from() -> None:
    assert extension_step(WSDSchedule(decay_ratio=0.25), 20) == 15
    assert extension_step(WSDSchedule(decay_steps=3, warmup_steps=2), 20) == 17
    assert extension_step(PowerSchedule(decay_steps=3, anchor_tokens=9), 20) == 17
    assert extension_step(WSDSSchedule(budgets=(10, 20), decay_ratio=0.2), 20) == 20
    assert extension_step(ConstantSchedule(), 20) == 20
    assert extension_step(CosineSchedule(), 20) is None
    assert extension_step(WSDSchedule(decay_ratio=1.0), 20) is None, "a decay from the start shares nothing"


@pytest.mark.parametrize(
    ("old", "old_steps", "new", "new_steps", "shared"),
    [
        (WSDSchedule(decay_ratio=0.25), 20, WSDSchedule(decay_ratio=0.25), 40, 15),
        (WSDSchedule(decay_ratio=0.25), 20, WSDSchedule(decay_ratio=0.8, decay_shape="cosine"), 40, 8),
        (WSDSchedule(decay_ratio=0.25, warmup_ratio=0.1), 20, WSDSchedule(decay_ratio=0.25, warmup_ratio=0.1), 40, 0),
        (ConstantSchedule(), 20, WSDSchedule(decay_ratio=0.25), 40, 30),
        (WSDSSchedule(budgets=(20,), decay_ratio=0.25), 20, WSDSSchedule(budgets=(20, 40), decay_ratio=0.25), 40, 20),
        (WSDSSchedule(budgets=(20,), decay_ratio=0.25), 20, WSDSSchedule(budgets=(40,), decay_ratio=0.25), 40, 15),
        (WSDSchedule(decay_steps=5), 20, CosineSchedule(), 40, 1),
        (PowerSchedule(anchor_tokens=9, decay_steps=5), 20, PowerSchedule(anchor_tokens=9, decay_steps=5), 40, 15),
        (PowerSchedule(anchor_tokens=9, decay_steps=5), 20, PowerSchedule(anchor_tokens=8, decay_steps=5), 40, 0),
        (PowerSchedule(anchor_tokens=9, decay_steps=5), 20, WSDSchedule(decay_steps=5), 40, 0),
    ],
)
def test_how_many_first_steps_two_schedules_share(
    old: Any, old_steps: int, new: Any, new_steps: int, shared: int
) -> None:
    assert shared == 0 or same_past(old, old_steps, new, new_steps, shared)
    # A decay has 1 in its first step, which is shared too.
    assert not same_past(old, old_steps, new, new_steps, shared + 2)


@given(schedules(), st.integers(1, 50), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_shared_steps_have_equal_factors_whatever_the_tokens(
    drawn: tuple[Any, int], more: int, tokens_per_step: int
) -> None:
    schedule, num_steps = drawn
    step = extension_step(schedule, num_steps)
    longer = num_steps + more
    if step is None or hasattr(schedule, "budgets"):
        return
    assert same_past(schedule, num_steps, schedule, longer, step)
    for s in range(step):
        tokens = s * tokens_per_step
        assert learning_rate_factor(schedule, s, num_steps, tokens) == learning_rate_factor(schedule, s, longer, tokens)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_a_second_place_is_whole_and_outlives_the_first(tmp_path: Path) -> None:
    first = tmp_path / "checkpoint-5"
    (first / "deep").mkdir(parents=True)
    for name in ("weights", "deep/state", "training_args.bin"):
        (first / name).write_text(name)
    mark_complete(first, score=-2.0)
    second = tmp_path / "kept" / "checkpoint-5"
    place_checkpoint(first, second, ["training_args.bin"])
    for path in sorted(first.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert fault(second, full=True) is None
    assert {path.name for path in second.rglob("*") if path.is_file()} == {"weights", "state", CHECKPOINT_MARKER}
    assert json.loads((second / CHECKPOINT_MARKER).read_text())["score"] == -2.0


def test_a_stored_checkpoint_is_checked_but_no_content() -> None:
    weights, diary = (FileRecord(size=1, blake3=letter * 64) for letter in "ab")
    bare = records_digest({"model/weights": weights})
    assert records_digest({"model/weights": weights, "checkpoint/checkpoint-5/weights": diary}) == bare
    assert records_digest({"model/weights": weights, "logs/diary": diary}) == bare
    assert records_digest({"model/weights": weights, "checkpoints/weights": diary}) != bare


def test_manifests_from_before_keep_their_checksum() -> None:
    spec = Spec(stage="sft", version=1, config={}, inputs={}, externals={})
    manifest = Manifest(
        key="k", spec=spec, digest="d", inputs={}, outputs={}, metrics={}, files={}, environment={}, node="sft",
        started_at="", finished_at="", duration_seconds=1.0,
    )  # fmt: skip
    # Computed by the code before there was `extends`.
    assert manifest_checksum(manifest) == "e52b550f42e3dd2d797f75e37d55dfb3974ea4dea07f9be70bd779eaed2c2203"
    record = ExtendedTraining(stage="sft", key="k", step=15, num_steps=20)
    assert manifest_checksum(manifest.model_copy(update={"extends": record})) != manifest_checksum(manifest)


# --- Real trainings through the store ---------------------------------------------------------------------------------


COMPUTE = ComputeSettings(
    device="cpu", num_threads=1, per_device_train_batch_size=2, logging_steps=1, save_steps=1000, min_free_disk_gb=0,
    launcher="inline",
)  # fmt: skip


class Bench:
    """Jobs of a stage over one model and one set of rows."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage = STAGES[stage]
        rows = conversations(NUM_ROWS) if stage == "sft" else pairs(NUM_ROWS + 1)[1:]
        model = build_tiny_model(folder / "model")
        _, self.inputs, _ = stage_arguments(stage, folder, model, rows, {"effective_batch_size": BATCH})

    def job(
        self, num_steps: int, schedule: dict[str, Any] | None, compute: dict[str, Any] | None = None, **changes: Any
    ) -> Job:
        """`rows`, among the changes: the digest that stands for the data."""
        externals = {"rows": changes.pop("rows", "a")}
        gate = {"gate": {"num_prompts": 0}} if "gate" in self.stage.config.model_fields else {}
        config = self.stage.config(**{
            "learning_rate": 1e-3, "effective_batch_size": BATCH, "max_length": 128, "precision": "float32",
            "max_steps": num_steps, "schedule": schedule, **gate, **changes,
        })  # fmt: skip
        spec = Spec(
            stage=self.stage.name, version=self.stage.version, config=scientific(config), inputs={}, externals=externals
        )
        machinery = COMPUTE.model_copy(update=compute or {})
        return Job(self.stage.name, self.stage, config, machinery, spec, self.inputs)


def weights(reference: ArtifactReference) -> dict[str, torch.Tensor]:
    return load_file(Path(reference.path) / "model" / "model.safetensors")


def different(one: ArtifactReference, other: ArtifactReference) -> list[str]:
    """Tensors in which two models are not bitwise the same."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def source_run_of(store: Store, job: Job, **options: Any) -> tuple[int, int] | None:
    """Step and budget of the training that a job would go on from."""
    source_run = find_source_run(store, job.spec, job.config, job.compute, {}, **options)
    return source_run and (source_run.record.step, source_run.record.num_steps)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("sft", tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def finished(sft: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ArtifactReference]:
    """A store with one SFT of 20 steps under WSD."""
    store = Store(tmp_path_factory.mktemp("store"))
    return store, run_stage(sft.job(20, wsd()), store, LOG)


def copy_of(store: Store, folder: Path) -> Store:
    shutil.copytree(store.root, folder)
    return Store(folder)


def test_wsd_goes_on_from_before_its_decay(
    sft: Bench, finished: tuple[Store, ArtifactReference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, short = copy_of(finished[0], tmp_path / "store"), finished[1]
    with caplog.at_level(logging.INFO):
        longer = run_stage(sft.job(40, wsd()), store, LOG)
    assert f"goes on from step 15 of sft/{short.key[:12]}, which had budget 20" in caplog.text
    assert "resumes at step 15 of 40" in caplog.text
    manifest = read_manifest(Path(longer.path))
    assert manifest.resumed_from_steps == (15,) and longer.outcome == "Resumed"
    assert manifest.extends == ExtendedTraining(stage="sft", key=short.key, step=15, num_steps=20)
    assert [path.name for path in (Path(longer.path) / "checkpoint").iterdir()] == ["checkpoint-30"]

    unbroken = run_stage(sft.job(40, wsd()), Store(tmp_path / "other"), LOG)
    assert read_manifest(Path(unbroken.path)).extends is None and unbroken.outcome == "Completed"
    assert different(longer, unbroken) == [] and longer.digest == unbroken.digest
    assert len(different(longer, short)) > 10, "the last 25 steps changed nothing"
    history = [
        [json.loads(line) for line in (Path(reference.path) / "logs" / "history.jsonl").open()]
        for reference in (longer, unbroken)
    ]
    assert [row["learning_rate"] for row in history[0]] == [row["learning_rate"] for row in history[1]]
    assert [row["step"] for row in history[0]] == list(range(1, 41))


def test_wsd_s_goes_on_from_its_decayed_end(sft: Bench, tmp_path: Path) -> None:
    """The rate of the checkpoint is that of its end; the first step of the new cycle must have the full one."""
    store = Store(tmp_path / "store")
    run_stage(sft.job(20, wsd_s(20)), store, LOG)
    longer = run_stage(sft.job(40, wsd_s(20, 40)), store, LOG)
    assert read_manifest(Path(longer.path)).resumed_from_steps == (20,)
    unbroken = run_stage(sft.job(40, wsd_s(20, 40)), Store(tmp_path / "other"), LOG)
    assert different(longer, unbroken) == []
    rates = [json.loads(line)["learning_rate"] for line in (Path(longer.path) / "logs" / "history.jsonl").open()]
    assert rates[19] < rates[20] == 1e-3
    # And once more, from the larger of the two.
    assert source_run_of(store, sft.job(60, wsd_s(20, 40, 60) | {"decay_base": "cumulative"})) == (40, 40)


def test_dpo_goes_on_from_a_constant_schedule(tmp_path: Path) -> None:
    bench, store = Bench("dpo", tmp_path / "bench"), Store(tmp_path / "store")
    run_stage(bench.job(6, {"kind": "constant", "warmup_steps": 2}), store, LOG)
    longer = run_stage(bench.job(12, wsd()), store, LOG)
    assert read_manifest(Path(longer.path)).resumed_from_steps == (6,)
    assert different(longer, run_stage(bench.job(12, wsd()), Store(tmp_path / "other"), LOG)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"), [("reward_model", {}), ("sft", {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}})]
)
def test_reward_model_and_adapters_with_dropout_go_on_too(stage: str, changes: dict[str, Any], tmp_path: Path) -> None:
    bench, store = Bench(stage, tmp_path / "bench"), Store(tmp_path / "store")
    run_stage(bench.job(12, wsd(), **changes), store, LOG)
    longer = run_stage(bench.job(24, wsd(), **changes), store, LOG)
    assert read_manifest(Path(longer.path)).resumed_from_steps == (9,)
    assert different(longer, run_stage(bench.job(24, wsd(), **changes), Store(tmp_path / "other"), LOG)) == []


def test_what_is_another_experiment_begins_anew(sft: Bench, finished: tuple[Store, ArtifactReference]) -> None:
    store = finished[0]
    assert source_run_of(store, sft.job(40, wsd())) == (15, 20)
    assert source_run_of(store, sft.job(40, wsd(decay_ratio=0.1, decay_shape="cosine"))) == (15, 20)
    assert source_run_of(store, sft.job(40, {"kind": "constant", "warmup_steps": 2})) == (15, 20)
    others = [
        sft.job(40, wsd(), learning_rate=2e-3),
        sft.job(40, wsd(), seed=7),
        sft.job(40, wsd(), rows="b"),
        sft.job(40, wsd(), effective_batch_size=2),
        sft.job(40, wsd(), weight_decay=0.1),
        sft.job(40, wsd(), compute={"num_processes": 2}),
        sft.job(40, wsd(warmup_steps=3)),
        sft.job(40, {"kind": "linear", "warmup_steps": 2}),
        sft.job(40, None),
        sft.job(15, wsd()),  # nothing left to train
        sft.job(18, wsd()),  # its decay begins before step 15
        sft.job(20, wsd(decay_ratio=0.5)),
    ]
    assert [source_run_of(store, job) for job in others] == [None] * len(others)
    newer = sft.job(40, wsd())
    newer = dataclasses.replace(newer, spec=newer.spec.model_copy(update={"version": newer.spec.version + 1}))
    assert source_run_of(store, newer) is None
    # An input of the same key whose content is another one now.
    job = sft.job(40, wsd())
    assert find_source_run(store, job.spec, job.config, job.compute, {"model": "another"}) is None


def test_ranks_and_parallelism_that_add_in_another_order_are_not_extended() -> None:
    two, sharded = ComputeSettings(num_processes=2), ComputeSettings(num_processes=2, parallel="fsdp2")
    for made, same in (
        (two.model_dump(), two),
        ({"num_processes": 2}, two),
        (sharded.model_dump(), sharded),
        ({}, ComputeSettings()),
    ):
        assert same_sums(made, same)
    assert same_sums({}, ComputeSettings(parallel="fsdp2"))  # one process has nothing to divide
    for made, other in (
        (two.model_dump(), sharded),
        ({}, ComputeSettings(compile=True)),
        (ComputeSettings(compile=True).model_dump(), ComputeSettings()),
        (sharded.model_dump(), two),
        ({"num_processes": 2}, ComputeSettings()),
    ):
        assert not same_sums(made, other)


def test_a_training_that_keeps_nothing_has_the_same_digest(
    sft: Bench, finished: tuple[Store, ArtifactReference], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    bare = run_stage(sft.job(20, wsd(), compute={"keep_extension_checkpoint": False}), store, LOG)
    assert not (Path(bare.path) / "checkpoint").exists() and bare.digest == finished[1].digest
    assert source_run_of(store, sft.job(40, wsd())) is None
    kept = finished[1]
    names = {path.name for path in (Path(kept.path) / "checkpoint" / "checkpoint-15").iterdir()}
    assert names == {"shards", "state.json", "trainer_state.json", CHECKPOINT_MARKER}


def test_a_refresh_trains_from_the_start(sft: Bench, finished: tuple[Store, ArtifactReference], tmp_path: Path) -> None:
    store = copy_of(finished[0], tmp_path / "store")
    made = run_stage(dataclasses.replace(sft.job(24, wsd()), refresh=True), store, LOG)
    assert read_manifest(Path(made.path)).resumed_from_steps == ()


def test_a_damaged_checkpoint_is_passed_over_and_said(
    sft: Bench, finished: tuple[Store, ArtifactReference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = copy_of(finished[0], tmp_path / "store")
    file = next(store.root.glob("sft/*/gen-0001/checkpoint/checkpoint-15/shards/rank-0-of-1.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    job = sft.job(24, wsd())
    assert source_run_of(store, job) == (15, 20), "a plan looks at sizes only"
    with caplog.at_level(logging.WARNING):
        made = run_stage(job, store, LOG)
    key = finished[1].key[:12]
    said = (
        f"step 15 of sft/{key} cannot be resumed from: shards/rank-0-of-1.safetensors has other bytes than were written"
    )
    assert said in caplog.text
    assert read_manifest(Path(made.path)).resumed_from_steps == ()

    messages: list[str] = []
    file.write_bytes(content[:-1])
    assert source_run_of(store, sft.job(60, wsd(), seed=123), damaged=messages.append) == (18, 24)
    assert len(messages) == 1
    assert (
        f"sft/{key} cannot be resumed from: checkpoint/checkpoint-15/shards/rank-0-of-1.safetensors has" in messages[0]
    )


def test_an_extension_that_was_stopped_goes_on_from_its_own_checkpoint(
    sft: Bench, finished: tuple[Store, ArtifactReference], tmp_path: Path
) -> None:
    """Laid into the work folder, then killed before its first step; and the stored artifact is not touched by it."""
    store, short = copy_of(finished[0], tmp_path / "store"), finished[1]
    job = sft.job(24, wsd())
    source_run = find_source_run(store, job.spec, job.config, job.compute, {})
    assert source_run is not None
    with store.producer(job.spec, lambda whom: None) as folder:
        begin_with(source_run, store.open_work(folder, job.input_digests))
    unfinished = store.unfinished(job.spec, job.input_digests)
    assert unfinished is not None and unfinished[0] == 15
    made = run_stage(job, store, LOG)
    manifest = read_manifest(Path(made.path))
    assert manifest.extends is not None and manifest.extends.key == short.key and manifest.resumed_from_steps == (15,)
    found = store.find(sft.job(20, wsd()).spec)
    assert isinstance(found, Found) and store.verify(found) == []


def finish(store: Store, graph: Graph, name: str, checkpoint_step: int = 0) -> str:
    """Commit an artifact for a node, with a checkpoint where a step is given; its key."""
    node, spec = graph.nodes[name], graph.spec(name)
    inputs = {}
    for dotted, binding in node.bindings().items():
        upstream = store.find(graph.spec(binding.node))
        assert isinstance(upstream, Found)
        manifest = upstream.manifest
        inputs[dotted] = InputRecord(stage=manifest.spec.stage, key=manifest.key, digest=manifest.digest)
    with store.producer(spec, lambda whom: None) as folder:
        output = store.open_work(folder, {name: record.digest for name, record in inputs.items()}) / "output"
        output.mkdir()
        (output / "rows.jsonl").write_text(name)
        if checkpoint_step:
            checkpoint = output / "checkpoint" / f"checkpoint-{checkpoint_step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "trainer_state.json").write_text("{}")
            mark_complete(checkpoint)
        num_steps = getattr(node.config, "max_steps", None)
        known = {} if num_steps is None else {"num_steps": num_steps}
        outputs = example_outputs(node.stage, known, output)
        manifest = Manifest(
            key=folder.name, spec=spec, digest="", inputs=inputs, outputs=outputs, metrics={},
            files={}, environment={}, node=name, started_at="2026-11-01T10:00:00+00:00",
            finished_at="2026-11-01T12:34:56+00:00", duration_seconds=1.0,
        )  # fmt: skip
        store.commit(spec, output, lambda files, digest: manifest.model_copy(update={"files": files, "digest": digest}))
    return folder.name


def test_plan_says_where_it_would_go_on(tmp_path: Path) -> None:
    def graph(num_steps: int) -> Graph:
        sft = {"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "max_steps": num_steps, "schedule": wsd()}
        return Graph(load_recipe({"extends": "tiny", "sft": sft}), "sft", resolve=made_up_commit)

    def row_of(wanted: Graph, refresh: tuple[str, ...] = ()) -> PlanRow:
        return next(row for row in plan(wanted.recipe, "sft", refresh, store, wanted).rows if row.node == "sft")

    store, short, longer = Store(tmp_path), graph(20), graph(40)
    keys = {name: finish(store, short, name, 15 if name == "sft" else 0) for name in short.nodes}
    row = row_of(longer)
    assert (row.status, row.reason) == ("resumes", f"would go on from step 15 of 40, stored by {keys['sft'][:12]}")
    assert (row.step, row.num_steps, row.estimate.num_steps) == (15, 40, 25)
    assert row_of(longer, refresh=("sft",)).status == "runs"
    # Laid into the work folder: the checkpoint of a training of 20 steps, and 40 are planned.
    spec, node = longer.spec("sft"), longer.nodes["sft"]
    source_run = find_source_run(store, spec, node.config, longer.recipe.compute, {})
    assert source_run is not None
    with store.producer(spec, lambda whom: None) as folder:
        found = store.find(short.spec("sft"))
        assert isinstance(found, Found)
        digests = {name: record.digest for name, record in found.manifest.inputs.items()}
        begin_with(source_run, store.open_work(folder, digests))
    assert row_of(longer).reason == "at step 15 of 40"
