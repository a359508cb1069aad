"""`smoltulu plan`: what would run and why, what it would take, also without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smoltulu.artifacts.checkpoints import mark_complete
from smoltulu.artifacts.nearest import SpecIndex, differences, flat
from smoltulu.artifacts.shared.door import SharedStore
from smoltulu.artifacts.shared.remote import Remote
from smoltulu.artifacts.store import Found, Store
from smoltulu.flows.cli.plan import as_dict, show, summary
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.machine.machine import PROJECT
from smoltulu.flows.planning.estimates import (
    NOTHING,
    Cost,
    Estimate,
    closest,
    closest_rows,
    estimated_seconds,
    estimated_tokens,
    totals,
)
from smoltulu.flows.planning.plan import NearestArtifact, Plan, PlanRow, explain, plan
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import InputRecord, Manifest
from smoltulu.schemas.budget import tokens_of_steps
from smoltulu.schemas.preflight import DryRun, LengthReport, PreflightOutputs
from smoltulu.tasks.data.hub import HubUnreachable, Reference, SourceUnavailable, resolve_commits
from smoltulu.tasks.engine.environment import environment
from smoltulu.tasks.report.text import local_minute
from smoltulu.tasks.trainer.disk import num_checkpoints_kept
from tests.example_outputs import example_outputs
from tests.tiny_model import build_tiny_model

NUM_PARAMETERS = 1_711_376_384  # SmolLM2-1.7B
ROWS = 1000
ROWS_BYTES = 100


def commit_of(reference: Reference) -> str:
    """A Hub that knows every name."""
    return hashlib.sha1("/".join(reference).encode()).hexdigest()


def silent(reference: Reference) -> str:
    raise HubUnreachable(f"{reference.repository}: no answer")


def graph_of(recipe: str, resolve: Callable[[Reference], str] = commit_of, **overrides: Any) -> Graph:
    return Graph(load_recipe(recipe, overrides), unresolved="keep", resolve=resolve)


def preflight_outputs(subject: str, **changes: Any) -> dict[str, Any]:
    """All rows are left, of 500 tokens each, 100 of them trained; the dry run took four, as smoltulu-1130 asks."""
    run = DryRun(
        subject=subject, device="cpu", precision="float32", per_device_train_batch_size=4, asked_batch_size=4,
        activation_checkpointing=True, packing=True, num_tokens=4000, seconds=1.0, peak_memory_bytes=70 * 10**9,
    )  # fmt: skip
    outputs = PreflightOutputs(
        file="rows.parquet", num_rows=ROWS, num_source_rows=ROWS, num_tokens=500 * ROWS, num_trained_tokens=100 * ROWS,
        longest=900, lengths=LengthReport(mean=500.0, percentiles={"100": 900}), dry_run=run,
    )  # fmt: skip
    return outputs.model_dump(mode="json") | changes


def inputs_of(store: Store, graph: Graph, name: str) -> dict[str, InputRecord]:
    """What a node would be made from now."""
    inputs = {}
    for dotted, binding in graph.nodes[name].bindings().items():
        upstream = store.find(graph.spec(binding.node))
        assert isinstance(upstream, Found), upstream
        inputs[dotted] = InputRecord(
            stage=graph.nodes[binding.node].stage.name, key=upstream.manifest.key, digest=upstream.manifest.digest
        )
    return inputs


def open_work(store: Store, folder: Path, inputs: dict[str, InputRecord]) -> Path:
    return store.open_work(folder, {name: record.digest for name, record in inputs.items()})


def finish(store: Store, graph: Graph, name: str, text: str = "", size: int = NUM_PARAMETERS, **changes: Any) -> Found:
    """Commit an artifact for a node as a run would, with contents that only matter by their size."""
    node, spec = graph.nodes[name], graph.spec(name)
    inputs = inputs_of(store, graph, name)
    outputs: dict[str, Any] = {}
    if node.stage.name in ("dataset", "contamination"):
        outputs = {"file": "rows.parquet", "num_rows": ROWS}
    elif node.stage.name == "preflight":
        outputs = preflight_outputs(node.config.subject)
    elif node.stage.name == "base_model":
        outputs = {"num_parameters": size}
    elif hasattr(node.config, "effective_batch_size"):
        batch = node.config.effective_batch_size
        num_steps = node.config.budget.num_steps(ROWS, None)
        outputs = {
            "num_parameters": size, "num_steps": num_steps, "num_tokens": num_steps * batch * 500,
        }  # fmt: skip
    with store.producer(spec, lambda whom: None) as folder:
        output = open_work(store, folder, inputs) / "output"
        output.mkdir()
        (output / "rows.parquet").write_text(text.ljust(ROWS_BYTES, "x"))
        outputs = example_outputs(node.stage, outputs, output)
        manifest = {
            "key": graph.key(name), "spec": spec, "inputs": inputs, "outputs": outputs, "metrics": {},
            "environment": environment(), "compute": graph.recipe.compute.of(node.stage.name).model_dump(),
            "node": name, "started_at": "2026-11-01T10:00:00+00:00", "finished_at": "2026-11-01T12:34:56+00:00",
            "duration_seconds": 10.0 * outputs.get("num_steps", 6),
        } | changes  # fmt: skip
        return store.commit(spec, output, lambda files, digest: Manifest(files=files, digest=digest, **manifest))


def finish_all(store: Store, graph: Graph, **changes: Any) -> None:
    for name in graph.nodes:
        finish(store, graph, name, **changes)


def rows_of(planned: Plan) -> dict[str, PlanRow]:
    return {row.node: row for row in planned.rows}


def test_a_local_base_model_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    """By its headers whenever a graph is made, and tensor by tensor by a plan, unless a run has taken it."""
    base = build_tiny_model(tmp_path / "base")
    recipe = load_recipe("tiny", {"base_model.scratch": None, "base_model.path": str(base)})
    store = Store(tmp_path / "store")
    assert rows_of(plan(recipe, "base_model", [], store))["base-model"].status == "runs"
    weights = load_file(base / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "o_proj" not in name}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors are missing \(model\.layers\.0\.self_attn\.o_proj\.weight, model"):
        plan(recipe, "base_model", [], store)
    finish(store, graph := Graph(recipe, "base_model"), "base-model")
    assert rows_of(plan(recipe, "base_model", [], store, graph))["base-model"].status == "cached"
    save_file({f"module.{name}": value for name, value in weights.items()}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"named as DistributedDataParallel"):
        Graph(recipe)


def make(graph: Graph, store: Store, refresh: tuple[str, ...] = ()) -> dict[str, PlanRow]:
    return rows_of(plan(graph.recipe, None, refresh, store, graph))


# --- The acceptance: 1130 beside a finished 1207 ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_1207(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which every stage of smoltulu-1207 is finished."""
    store = Store(tmp_path_factory.mktemp("store"))
    finish_all(store, graph_of("smoltulu-1207"))
    return store


def test_plan_of_1130_on_an_empty_store(tmp_path: Path) -> None:
    rows = make(graph_of("smoltulu-1130"), Store(tmp_path / "store"))
    assert {(row.status, row.reason) for row in rows.values()} == {("runs", "never made")}
    # Nothing alike was made, so nothing is known but what the recipe says itself: the size of the model, and RLVR's
    # 64,000 episodes, of which 32 make a batch that is gone over four times.
    model = 4 * NUM_PARAMETERS
    assert {name: row.estimate for name, row in rows.items() if row.estimate != Estimate()} == {
        **{name: Estimate(disk_bytes=model) for name in ("dpo", "reward-model")},
        # 939,343 rows, twice, 8 a step.
        "sft": Estimate(num_steps=234_836, disk_bytes=model),
        # Its answers are as long as allowed, at most; the critic is kept beside the policy.
        "pass-rates": Estimate(flops=rows["pass-rates"].estimate.flops),
        "rlvr": Estimate(
            num_steps=8000, flops=(2 + 2 + 2 + 2 + 2 * 6 * 4) * NUM_PARAMETERS * 64_000 * 4096, disk_bytes=2 * model
        ),
    }
    assert not (tmp_path / "store").exists()


def test_plan_counts_held_out_answers_and_the_best_weights(tmp_path: Path, with_1207: Store) -> None:
    held_out = {"num_prompts": 100, "num_samples": 2, "every_steps": 1000, "kinds": ["validate_title"]}
    graph = graph_of("smoltulu-1130", **{"rlvr.held_out": held_out, "rlvr.keep": "best"})
    # At 0, 1000, ..., 8000: nine times two hundred prompts, with two answers each.
    more = 2 * NUM_PARAMETERS * 9 * 200 * 2 * 4096
    for store in (Store(tmp_path / "store"), with_1207):
        before = make(graph_of("smoltulu-1130"), store)["rlvr"].estimate
        after = make(graph, store)["rlvr"].estimate
        assert after.flops is not None and before.flops is not None and after.flops - before.flops == more
        assert after.disk_bytes == before.disk_bytes
    assert after.peak_disk_bytes is not None and before.peak_disk_bytes is not None
    # Policy and critic, one more than checkpoints are kept.
    kept = num_checkpoints_kept(graph.compute, is_extendable=False)
    assert after.peak_disk_bytes - before.peak_disk_bytes == kept * 2 * 4 * NUM_PARAMETERS


def test_plan_of_1130_beside_a_finished_1207_explains_the_difference(with_1207: Store) -> None:
    rows = make(graph_of("smoltulu-1130"), with_1207)
    data = ("dataset", "benchmark", "contamination", "languages", "preflight", "verifier-audit")
    kept = {"base-model", "evaluation-base-model"} | {name for name in rows if name.startswith(data)}
    assert {name for name, row in rows.items() if row.status == "cached"} == kept
    assert rows["base-model"].reason == f"made {local_minute('2026-11-01T12:34:56+00:00')}"

    keys = graph_of("smoltulu-1207").keys()

    def nearest(name: str) -> str:
        return f"differs from the nearest ({keys[name][:12]}, 2026-11-01) in "

    assert {name: row.reason.removeprefix(nearest(name)) for name, row in rows.items() if name not in kept} == {
        "sft": "learning_rate: 3.1e-06 -> 9e-05, effective_batch_size: 32 -> 8",
        "evaluation-sft": "input model (sft) is another artifact",
        "reward-model": "learning_rate: 7.5e-07 -> 4e-05, effective_batch_size: 8 -> 4, "
        "input model (dpo) is another artifact",
        "evaluation-reward-model": "input model (reward-model) is another artifact",
        "reference-logps": "input model (sft) is another artifact",
        "dpo": "learning_rate: 5e-07 -> 8e-07, effective_batch_size: 32 -> 12, input model (sft) is another artifact, "
        "input reference_logps (reference-logps) is another artifact",
        "evaluation-dpo": "input model (dpo) is another artifact",
        "evaluation-dpo-implicit-reward": "input model (dpo) is another artifact, "
        "input reference_model (sft) is another artifact",
        "pass-rates": "input model (dpo) is another artifact",
        "rlvr": "input model (dpo) is another artifact, input reward_model (reward-model) is another artifact",
        "evaluation-rlvr": "input model (rlvr) is another artifact",
        "publish": "recipe_name: smoltulu-1207 -> smoltulu-1130, input model (rlvr) is another artifact, "
        "input evaluation-sft is another artifact, input evaluation-dpo is another artifact, and 8 more",
    }
    sft = rows["sft"].nearest
    assert sft is not None and sft.key == keys["sft"]
    assert sft.changes == {"config.learning_rate": (3.1e-6, 9e-5), "config.effective_batch_size": (32, 8)}


def test_plan_says_in_words_that_data_is_new_or_changed(tmp_path: Path) -> None:
    """It said `input  (None) is new, : {} -> none`: the empty inputs and externals of the nearest artifact."""
    file, store = tmp_path / "rows.jsonl", Store(tmp_path / "store")
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    file.write_text(row)
    finish_all(store, Graph(load_recipe("tiny"), "sft"))

    def reason() -> str:
        own = load_recipe("tiny", {"data.sft.sources": [{"path": str(file), "format": "messages"}]})
        graph = Graph(own, "sft")
        said = make(graph, store)["dataset-sft"].reason
        finish_all(store, graph)
        return said.partition(") in ")[2]

    assert reason() == "data.sources.0.generated: sft.jsonl -> none, your data is new, it had an input world besides"
    file.write_text(row * 2)
    assert reason() == "your data has another content"
    # And the other way round: what has no inputs is compared with what has some.
    changes = {"config.x": (1, 2)} | differences({"inputs": {}}, {"inputs": {"world": "k"}})
    near = NearestArtifact("k" * 64, "", changes)
    said = explain(near, {"inputs.world": "world"}, set())
    assert said == f"differs from the nearest ({'k' * 12}) in x: 1 -> 2, input world is new"


NAMES = st.sampled_from(["inputs", "externals", "a", "b"])
VALUES = st.recursive(st.integers(0, 2), lambda values: st.dictionaries(NAMES, values, max_size=2))
SPECS = st.dictionaries(NAMES, VALUES, min_size=1)


@given(SPECS, SPECS)
def test_differences_name_a_field_and_its_value_never_an_empty_container_beside_its_fields(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    changes = differences(old, new)
    assert (changes == {}) == (old == new)
    for name, values in changes.items():
        assert "{}" not in values or not any(other.startswith(f"{name}.") for other in changes)


def test_plan_estimates_1130_from_1207(with_1207: Store) -> None:
    graph = graph_of("smoltulu-1130")
    planned = plan(graph.recipe, None, [], with_1207, graph)
    rows = rows_of(planned)
    # 1000 rows / 8 = 125 steps an epoch, two epochs; 500 tokens a row; the 1207 arm took 10 s a step of 32 rows.
    checkpoint = 12 * NUM_PARAMETERS + 12_000
    assert rows["sft"].estimate == Estimate(
        num_steps=250,
        num_tokens=250 * 8 * 500,
        flops=6.0 * NUM_PARAMETERS * 1_000_000,
        disk_bytes=4 * NUM_PARAMETERS,
        # Eight bytes a token; saved once in 250 steps, and once more while it is written.
        peak_disk_bytes=8 * 1000 * 500 + 2 * checkpoint,
        seconds=250 * 10.0 * 8 / 32,
    )
    # 1000 pairs / 12, one epoch.
    assert rows["dpo"].estimate.num_steps == 84
    # An epoch is 1000 pairs, not 84 times 12: the last batch is short.
    assert rows["dpo"].estimate.flops == 6.0 * NUM_PARAMETERS * 1000 * 500
    # 8000 steps are 160 saves: the newest two, the best and the one being written.
    # Each holds the critic too.
    assert rows["rlvr"].estimate.peak_disk_bytes == 8 * ROWS_BYTES + 4 * 2 * checkpoint
    # The 1207 arm says 500 tokens for a row of every step, and four of its steps went over the same rollouts. A token
    # is written and read by policy, reference and critic, then policy and critic are trained on it four times.
    assert rows["rlvr"].estimate.num_tokens == 64_000 * 4 * 500
    assert rows["rlvr"].estimate.flops == (2 + 2 + 2 + 2 + 2 * 6 * 4) * NUM_PARAMETERS * 64_000 * 4 * 500
    # 500 prompts, 8 answers of at most 2048 tokens each, 2 FLOPs a parameter and token.
    assert rows["pass-rates"].estimate.flops == 2.0 * NUM_PARAMETERS * 500 * 8 * 2048
    # What has no steps takes what its like took.
    assert rows["evaluation-sft"].estimate == Estimate(disk_bytes=100, peak_disk_bytes=100, seconds=60.0)
    assert rows["base-model"].estimate == NOTHING
    assert planned.totals["num_steps"] == (250 + 250 + 84 + 8000, 0)
    # What stays, and on top what the greediest stage (RLVR; one at a time) has besides.
    stays = 5 * 4 * NUM_PARAMETERS + 8 * ROWS_BYTES
    extra = 8 * ROWS_BYTES + 4 * 2 * checkpoint - 2 * 4 * NUM_PARAMETERS
    assert planned.totals["peak_disk_bytes"] == (stays + extra, 0)


def test_time_of_what_nobody_ran_is_that_of_the_stated_device(tmp_path: Path) -> None:
    changes = {"compute.device_tflops": 100.0, "compute.stages": {"rlvr": {"num_processes": 4}}}
    graph = graph_of("smoltulu-1130", **changes)
    rows = {row.node: row for row in plan(graph.recipe, None, [], Store(tmp_path / "store"), graph).rows}
    flops = rows["rlvr"].estimate.flops
    assert flops is not None and rows["rlvr"].estimate.seconds == flops / (4 * 100e12)
    # Its FLOPs are not known before its rows are.
    assert rows["sft"].estimate.seconds is None


#: Divided among eight devices, the 8B recipe fits.
WHOLE = {"compute.parallel": "ddp"}


@pytest.mark.parametrize(("recipe", "changes", "too_large"), [
    ("tulu3-8b", WHOLE, {"sft": "128 GB", "dpo": "128 GB", "reward-model": "128 GB", "rlvr": "161 GB"}),
    # An adapter leaves 4 bytes a parameter, and with it SFT and DPO fit.
    ("tulu3-8b", {"sft.lora": {}, "dpo.lora": {}} | WHOLE, {"reward-model": "128 GB", "rlvr": "161 GB"}),
    ("tulu3-8b", {"compute.device_memory_gb": None} | WHOLE, {}),
    ("tulu3-8b", {"compute.device_memory_gb": 141} | WHOLE, {"rlvr": "161 GB"}),
    # 16 bytes a parameter on eight devices; RLVR holds 20, and the policy once more while it writes.
    ("tulu3-8b", {}, {}),
    ("tulu3-8b", {"compute.device_memory_gb": 40}, {"rlvr": "52.2 GB"}),
    ("tulu3-8b", {"compute.device_memory_gb": 40, "compute.stages.rlvr.parallel": "ddp"}, {"rlvr": "161 GB"}),
    ("smoltulu-1130", {}, {}),
    # Policy and critic at 16 bytes a parameter, and the reference at 4.
    ("smoltulu-1130", {"compute.device_memory_gb": 48}, {"rlvr": "61.6 GB"}),
    ("smoltulu-1130", {"compute.device_memory_gb": 48, "rlvr.beta": 0}, {"rlvr": "54.8 GB"}),
    # Of a policy with an adapter the weights, which are its reference's too; the critic's moments may be elsewhere.
    ("smoltulu-1130", {"compute.device_memory_gb": 30, "rlvr.lora": {}}, {"rlvr": "34.2 GB"}),
    ("smoltulu-1130", {"compute.device_memory_gb": 30, "rlvr.lora": {}, "rlvr.critic.offload_optimizer": True}, {}),
    ("smoltulu-1130", {"compute.device_memory_gb": 24, "rlvr": None}, dict.fromkeys(
        ("sft", "dpo", "reward-model"), "27.4 GB")),
])  # fmt: skip
def test_plan_says_what_cannot_fit_into_the_stated_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, changes: dict[str, Any], too_large: dict[str, str]
) -> None:
    """From the size of the model that the recipe states: nothing was made, and nothing is asked of the Hub."""
    graph = graph_of(recipe, **changes)
    planned = plan(graph.recipe, None, [], Store(tmp_path / "store"), graph)
    said = {note.partition(" ")[0]: note for note in planned.notes if "cannot run on the stated machine" in note}
    assert said.keys() == too_large.keys()
    for name, needed in too_large.items():
        assert f"{needed} before any activation" in said[name]
        is_sharded = graph.compute_of(graph.nodes[name]).is_sharded
        assert ("lora block" in said[name]) == (
            not is_sharded and graph.recipe.trainings[name.replace("-", "_")].model_dump().get("lora", ...) is None
        )
        assert ("all weights" in said[name]) == (not is_sharded)
        assert said[name].split() and " ".join(said[name].split()) in printed(planned, capsys)


def test_nothing_is_taken_from_other_data(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish_all(store, Graph(load_recipe("tiny"), "sft"))
    rows = make(Graph(load_recipe("tiny", {"world.num_sft": 77}), "sft"), store)
    # Another world has other rows: how many, and so how many steps, nobody knows.
    assert rows["dataset-sft"].estimate == rows["contamination-sft"].estimate == Estimate()
    assert rows["sft"].estimate.num_steps is None
    # A world of the same sizes from another seed is as much work all the way down.
    rows = make(Graph(load_recipe("tiny", {"world.seed": 7}), "sft"), store)
    assert rows["dataset-sft"].estimate.seconds == 60.0
    assert rows["sft"].estimate.num_steps == 63 and rows["sft"].estimate.num_tokens == ROWS * 500


def test_a_larger_model_takes_longer(with_1207: Store, tmp_path: Path) -> None:
    store, graph = Store(shutil.copytree(with_1207.root, tmp_path / "store")), graph_of("tulu3-8b")
    for name in graph.nodes:
        upstream = name == "base-model" or name.startswith(("dataset", "benchmark", "contamination"))
        if upstream and not isinstance(store.find(graph.spec(name)), Found):
            finish(store, graph, name, size=2 * NUM_PARAMETERS)
    rows = make(graph, store)
    assert rows["evaluation-base-model"].estimate.seconds == 120.0
    assert rows["publish"].estimate.disk_bytes == 2 * ROWS_BYTES
    # 8 steps an epoch of 128 rows; eight processes, so twice 10 s of 32 rows on one become 10 s.
    assert rows["sft"].estimate.num_steps == 16
    assert rows["sft"].estimate.seconds == pytest.approx(16 * 10.0 * (128 / 32) * 2 / 8)


def test_plan_offline_says_what_it_cannot_know(with_1207: Store) -> None:
    graph = graph_of("smoltulu-1130", silent)
    planned = plan(graph.recipe, None, [], with_1207, graph)
    rows, keys = rows_of(planned), graph_of("smoltulu-1207").keys()
    assert all(row.provisional and row.status == "runs" for row in rows.values())
    assert rows["contamination-sft"].reason == (
        f"cached as {keys['contamination-sft'][:12]}, 2026-11-01 if the unresolved revisions are still those that it "
        "was made from"
    )
    assert rows["sft"].reason == (
        f"differs from the nearest ({keys['sft'][:12]}, 2026-11-01) in learning_rate: 3.1e-06 -> 9e-05, "
        "effective_batch_size: 32 -> 8, perhaps in unresolved revisions"
    )
    assert rows["sft"].estimate.num_steps == 250  # of rows and a model like these
    assert len(planned.unresolved) == 26 and sum(item.needed for item in planned.unresolved) == 6
    text = "\n".join(summary(planned))
    assert "allenai/tulu-3-sft-mixture@main" in text and "22 more" in text and "it needs 6 of 26" in text


def test_plan_marks_only_what_hangs_on_an_unresolved_revision(tmp_path: Path) -> None:
    gated = "cais/mmlu"

    def resolve(reference: Reference) -> str:
        if reference.repository == gated:
            raise SourceUnavailable(f"Hub dataset {gated!r} is gated")
        return commit_of(reference)

    graph = graph_of("smoltulu-1130", resolve)
    planned = plan(graph.recipe, None, [], Store(tmp_path), graph)
    sure = {row.node for row in planned.rows if not row.provisional}
    of_data = {name for name in graph.nodes if name.startswith(("dataset", "languages"))}
    assert sure == {"base-model", "evaluation-base-model"} | of_data
    # A benchmark may be missing: the run goes on without it, and so do its keys.
    assert [item.needed for item in planned.unresolved] == [False]
    assert "is gated" in "\n".join(summary(planned)) and "stop" not in "\n".join(summary(planned))
    strict = Graph(graph.recipe, resolve=resolve)
    assert strict.keys() == graph.keys()


def test_flows_still_refuse_what_cannot_be_resolved() -> None:
    with pytest.raises(HubUnreachable, match="no answer"):
        Graph(load_recipe("smoltulu-1130"), resolve=silent)


# --- The preflight's figures ------------------------------------------------------------------------------------------


def printed(planned: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal shows, with the lines that a table wraps in one."""
    show(planned, as_json=False)
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_plan_of_1130_shows_the_figures_of_its_preflights(with_1207: Store, capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_of("smoltulu-1130")
    planned = plan(graph.recipe, None, [], with_1207, graph)
    rows = rows_of(planned)
    figures = {name: row.preflight for name, row in rows.items() if row.preflight is not None}
    assert list(figures) == ["sft", "dpo", "reward-model", "rlvr"]
    sft = figures["sft"]
    assert (sft.node, sft.num_rows, sft.num_tokens, sft.trained_share, sft.longest, sft.max_length) == (
        "preflight-sft", ROWS, 500 * ROWS, 0.2, 900, 4096,
    )  # fmt: skip
    assert sft.peak_memory_bytes == 70 * 10**9 and sft.notes == ()
    # Two epochs of 1000 rows in batches of 8; one of 12 and one of 4; 8000 by the recipe.
    assert [figures[name].num_steps for name in ("sft", "dpo", "reward-model", "rlvr")] == [250, 84, 250, 8000]
    assert figures["rlvr"].trained_share is None
    # A dry run that was made with other machinery says so. RLVR trains 8 rows at once.
    assert figures["rlvr"].notes == ("per_device_train_batch_size 4 -> 8",)
    adapters = graph_of("smoltulu-1130", **{"sft.lora": {"r": 8}})
    with_adapters = rows_of(plan(adapters.recipe, None, [], with_1207, adapters))["sft"].preflight
    assert with_adapters is not None and with_adapters.notes == ("trains every weight -> LoRA of rank 8",)

    text = printed(planned, capsys)
    assert "sft 1,000 of 1,000 none 20.00 % 500k 900 of 4,096 250 70 GB cpu, float32, 4 rows" in text
    assert "now other: per_device_train_batch_size 4 -> 8" in text
    assert "preflight not run yet" not in text

    record = {stage["node"]: stage for stage in json.loads(json.dumps(as_dict(planned)))["stages"]}
    assert record["sft"]["preflight"]["num_steps"] == 250
    assert record["sft"]["preflight"]["dry_run"]["seconds"] == 1.0
    assert record["preflight-sft"]["preflight"] is None and record["publish"]["preflight"] is None


def test_plan_says_how_to_get_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_of("smoltulu-1130")
    planned = plan(graph.recipe, None, [], Store(tmp_path / "store"), graph)
    assert not any(row.preflight for row in planned.rows)
    text = printed(planned, capsys)
    assert "preflight not run yet: preflight-sft, preflight-reward-model, preflight-dpo, preflight-rlvr" in text
    assert "-p recipe=smoltulu-1130 -p until=preflight` makes it in minutes" in text


def test_tokens_of_a_preflight_stand_above_those_of_a_similar_training(with_1207: Store, tmp_path: Path) -> None:
    store, graph = Store(shutil.copytree(with_1207.root, tmp_path / "store")), graph_of("smoltulu-1130")
    finish(store, graph, "preflight-sft", outputs=preflight_outputs("sft", num_rows=990, num_tokens=123_000))
    rows = make(graph, store)
    # 124 steps an epoch; the trainings of this store took 500 tokens a row.
    assert rows["sft"].estimate.num_steps == 248 and rows["sft"].estimate.num_tokens == 246_000
    assert rows["sft"].preflight is not None and rows["sft"].preflight.num_steps == 248
    # A budget in tokens: 123,000 / 990 are 124.24 a row, 993.9 a step.
    graph = graph_of("smoltulu-1130", **{"sft.max_tokens": 10_000})
    assert make(graph, store)["sft"].estimate.num_steps == 11


def test_figures_of_another_version_are_not_shown(with_1207: Store, tmp_path: Path) -> None:
    store, graph = Store(shutil.copytree(with_1207.root, tmp_path / "store")), graph_of("smoltulu-1130")
    finish(store, graph, "preflight-sft", outputs={"file": "rows.parquet", "num_of_another_time": 3})
    rows = make(graph, store)
    assert rows["sft"].preflight is None and rows["dpo"].preflight is not None


# --- Resolving revisions ----------------------------------------------------------------------------------------------


def references(number: int) -> list[Reference]:
    return [Reference("dataset", f"someone/set-{i}", "main") for i in range(number)]


def test_one_silence_is_enough() -> None:
    asked: list[Reference] = []

    def resolve(reference: Reference) -> str:
        asked.append(reference)
        raise HubUnreachable("no network")

    pinned = Reference("model", "someone/pinned", "a" * 40)
    found = resolve_commits([*references(25), pinned], lambda r: r.revision if r == pinned else resolve(r))
    assert len(asked) == 1
    assert all(isinstance(error, HubUnreachable) and "no network" in str(error) for error in list(found.values())[:-1])
    assert found[pinned] == "a" * 40  # in full: nobody needs to be asked


def test_a_refusal_does_not_stop_the_others_and_they_are_asked_at_once() -> None:
    meeting = threading.Barrier(8, timeout=30)  # breaks unless eight are asked for at a time

    def resolve(reference: Reference) -> str:
        if reference == references(1)[0]:
            raise SourceUnavailable("gated")
        meeting.wait()
        return commit_of(reference)

    found = resolve_commits(references(17) * 2, resolve)
    assert isinstance(found[references(1)[0]], SourceUnavailable)
    assert list(found)[1:] == references(17)[1:]
    assert [found[r] for r in references(17)[1:]] == [commit_of(r) for r in references(17)[1:]]


def test_plan_offline_as_a_command_is_light_and_does_not_fail(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom smoltulu.flows.cli.main import app\n"
        "try:\n    app(['plan', 'smoltulu-1130', '--json'])\n"
        "except SystemExit as e:\n    print('exit', e.code, file=sys.stderr)\n"
        "heavy = ('torch', 'transformers', 'trl', 'datasets', 'prefect', 'lm_eval', 'numpy', 'pyarrow', 'numba')\n"
        "print('heavy', [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, text=True, capture_output=True, timeout=60, check=True,
        env={**os.environ, "SMOLTULU_STORE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert "exit 0" in done.stderr and "heavy []" in done.stderr
    printed = json.loads(done.stdout)
    assert len(printed["stages"]) == len(graph_of("smoltulu-1130").nodes)
    # The base model is pinned; whatever hangs on a data set is not.
    certain = {stage["node"] for stage in printed["stages"] if not stage["provisional"]}
    assert len(printed["unresolved"]) == 25 and certain == {"base-model", "evaluation-base-model"}
    assert printed["stages"][0]["estimate"]["num_steps"] is None


# --- Statuses -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    """A store in which every stage of `tiny` up to DPO is finished."""
    root, graph = tmp_path_factory.mktemp("finished"), Graph(load_recipe("tiny"), "dpo")
    finish_all(Store(root), graph)
    return root, graph


@pytest.fixture
def tiny(finished: tuple[Path, Graph], tmp_path: Path) -> tuple[Store, Graph]:
    """A copy of it, to be changed."""
    root, graph = finished
    return Store(shutil.copytree(root, tmp_path / "store")), graph


def test_all_cached(tiny: tuple[Store, Graph]) -> None:
    store, graph = tiny
    planned = plan(graph.recipe, "dpo", [], store, graph)
    assert {row.status for row in planned.rows} == {"cached"} and not any(row.notes for row in planned.rows)
    assert summary(planned) == [f"{len(graph.nodes)} cached"]


def test_damaged_and_what_hangs_on_it(tiny: tuple[Store, Graph]) -> None:
    store, graph = tiny
    found = store.find(graph.spec("sft"))
    assert isinstance(found, Found)
    (found.folder / "rows.parquet").write_text("short")
    rows = make(graph, store)
    assert (rows["sft"].status, rows["sft"].reason) == (
        "runs", f"damaged: rows.parquet has 5 bytes instead of {ROWS_BYTES:,}",
    )  # fmt: skip
    assert rows["dpo"].status == "runs" and rows["dpo"].reason == (
        "cached if reference-logps, sft comes out the same as before"
    )
    assert rows["evaluation-dpo-implicit-reward"].reason == "cached if dpo, sft comes out the same as before"
    assert rows["base-model"].status == "cached"


def test_stale_and_refresh(tiny: tuple[Store, Graph]) -> None:
    store, graph = tiny
    finish(store, graph, "sft", "other weights")
    rows = make(graph, store, ("reward_model",))
    assert rows["sft"].status == "cached"
    assert rows["dpo"].reason == "stale: its input model was made again with another content"
    assert (rows["reward-model"].status, rows["reward-model"].reason) == ("runs", "asked for again (refresh)")


def checkpoint(store: Store, graph: Graph, name: str, step: int, num_steps: int) -> None:
    with store.producer(graph.spec(name), lambda whom: None) as folder:
        saved = open_work(store, folder, inputs_of(store, graph, name)) / "checkpoints" / f"checkpoint-{step}"
        saved.mkdir()
        (saved / "trainer_state.json").write_text(json.dumps({"max_steps": num_steps}))
        mark_complete(saved)


def test_a_checkpoint_of_other_rows_is_not_resumed_from(tmp_path: Path) -> None:
    store, graph = Store(tmp_path), Graph(load_recipe("tiny"), "sft")
    for name in list(graph.nodes)[: list(graph.nodes).index("sft")]:
        finish(store, graph, name)
    checkpoint(store, graph, "sft", 20, 998)
    finish(store, graph, "preflight-sft", "other rows")
    assert make(graph, store)["sft"].status == "runs"


def test_resumes_at_step_n_of_m(tmp_path: Path) -> None:
    store, graph = Store(tmp_path), Graph(load_recipe("tiny"), "sft")
    for name in list(graph.nodes)[: list(graph.nodes).index("sft")]:
        finish(store, graph, name)
    checkpoint(store, graph, "sft", 20, 998)
    row = make(graph, store)["sft"]
    assert (row.status, row.reason, row.step, row.num_steps) == ("resumes", "at step 20 of 998", 20, 998)
    # 63 steps are an epoch of 500,000 tokens: what is left is that of 998 steps without that of the first 20.
    assert row.estimate.num_steps == 978
    assert row.estimate.num_tokens == tokens_of_steps(998, ROWS, 500 * ROWS, 16) - 20 * 16 * 500

    # Left-overs of a generation that was committed are no unfinished work.
    finish(store, graph, "sft")
    checkpoint(store, graph, "sft", 40, 998)
    assert make(graph, store)["sft"].status == "cached"
    assert make(graph, store, ("sft",))["sft"].reason == "at step 40 of 998"
    (store.folder(graph.spec("sft")) / "work" / "generation").write_text("gen-0001")
    assert make(graph, store, ("sft",))["sft"].reason == "asked for again (refresh)"


def test_drift_is_a_note_on_cached_rows(tiny: tuple[Store, Graph], capsys: pytest.CaptureFixture[str]) -> None:
    store, graph = tiny
    now = environment()
    packages = dict(now["packages"])  # type: ignore[call-overload]
    version = packages["torch"]
    then = now | {"packages": packages | {"torch": "2.12.0"}, "git_commit": "a" * 40}
    finish(store, graph, "evaluation-sft", environment=then)
    planned = plan(graph.recipe, "dpo", [], store, graph)
    row = rows_of(planned)["evaluation-sft"]
    assert row.status == "cached" and row.notes[0] == f"torch 2.12.0 -> {version}"
    assert now["git_commit"] is None or row.notes[1].startswith("code aaaaaaaaaaaa -> ")
    show(planned, as_json=False)
    assert f"made with something else than now: torch 2.12.0 -> {version} (evaluation-sft)" in capsys.readouterr().out


def test_json_has_all_that_the_table_shortens(with_1207: Store) -> None:
    graph = graph_of("smoltulu-1130")
    printed = json.loads(json.dumps(as_dict(plan(graph.recipe, None, [], with_1207, graph))))
    stages = {stage["node"]: stage for stage in printed["stages"]}
    assert stages["sft"]["nearest"]["changes"]["config.learning_rate"] == {"old": 3.1e-6, "new": 9e-5}
    assert stages["sft"]["key"] == graph.key("sft") and stages["sft"]["estimate"]["num_steps"] == 250
    assert stages["base-model"]["estimate"] is None and stages["base-model"]["nearest"] is None
    assert len(stages["publish"]["nearest"]["changes"]) > 5
    assert printed["totals"]["num_steps"] == {"value": 8584, "num_unknown": 0}


# --- The nearest artifact ---------------------------------------------------------------------------------------------


def test_flat_goes_by_names_where_there_are_any() -> None:
    value = {"a": {"b": 1, "c": []}, "tasks": [{"name": "x", "limit": 2}], "rows": [{"n": 1}, "two"], "none": {}}
    assert flat(value) == {
        "a.b": 1, "a.c": "[]", "tasks.x.name": "x", "tasks.x.limit": 2, "rows.0.n": 1, "rows.1": "two", "none": "{}",
    }  # fmt: skip


def test_an_inserted_benchmark_is_one_difference_not_all_that_follow() -> None:
    old = {"benchmarks": [{"name": name} for name in "abc"]}
    new = {"benchmarks": [{"name": name} for name in "aXbc"]}
    assert differences(old, new) == {"benchmarks.X.name": (None, "X")}


def test_differences_tell_true_from_one_and_keep_the_order_of_the_new() -> None:
    assert differences({"x": 1, "gone": 0}, {"z": 1, "x": True, "a": None}) == {
        "z": (None, 1), "x": (1, True), "a": (None, None), "gone": (0, None),
    }  # fmt: skip
    assert list(differences({"x": 1}, {"z": 1, "x": 2, "a": 3})) == ["z", "x", "a"]
    assert differences({"lr": 1}, {"lr": 1.0}) == {}


def test_nearest_passes_over_what_was_only_begun_and_what_cannot_be_read(tmp_path: Path) -> None:
    store, graph = Store(tmp_path), Graph(load_recipe("tiny"), "base_model")
    finish(store, graph, "world")
    other = Graph(load_recipe("tiny", {"world.seed": 1, "world.num_sft": 5}))
    with store.producer(other.spec("world"), lambda whom: None):
        pass
    broken = store.folder(Graph(load_recipe("tiny", {"world.seed": 2})).spec("world"))
    broken.mkdir()
    (broken / "spec.json").write_text("{")
    wanted = Graph(load_recipe("tiny", {"world.seed": 1})).spec("world")
    (near,) = SpecIndex(store.root).ranked(wanted.model_dump())
    assert near.key == graph.key("world") and near.changes == {"config.seed": (0, 1)}


def test_of_equally_near_artifacts_the_one_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (0, 1, 2):
        graph = Graph(load_recipe("tiny", {"world.seed": seed}))
        pointer = finish(store, graph, "world").folder.parent / "current"
        os.utime(pointer, ns=(0, (5, 9, 7)[seed] * 10**9))
    wanted = Graph(load_recipe("tiny", {"world.seed": 3})).spec("world")
    assert SpecIndex(store.root).ranked(wanted.model_dump())[0].changes == {"config.seed": (1, 3)}


# --- Estimates ----------------------------------------------------------------------------------------------------


SEEN = Cost(
    num_steps=100, num_timed_steps=50, num_tokens=40_000, seconds=200.0, effective_batch_size=4, num_parameters=1000,
    device="cuda", num_processes=1, dataset="a", max_length=128,
)  # fmt: skip


def test_estimates_by_hand() -> None:
    # 40,000 tokens in 100 steps of 4 rows: 100 a row; 10 steps of 8 rows.
    assert estimated_tokens(10, 8, SEEN) == 8000
    assert estimated_tokens(10, 8, None) is None
    # Four passes over every rollout: a fourth of the rollouts in as many steps.
    assert estimated_tokens(10, 8, SEEN, num_passes=4) == 2000
    assert estimated_tokens(10, 8, replace(SEEN, num_passes=2)) == 16000
    # 4 s a step (timed since the resume); twice the batch, three times the model, two processes.
    assert estimated_seconds(10, 8, 3000, 2, SEEN) == pytest.approx(10 * 4 * 2 * 3 / 2)
    assert estimated_seconds(10, 8, None, 1, SEEN) is None and estimated_seconds(10, 8, 3000, 1, None) is None


def test_the_closest_stage_is_of_the_same_device_then_of_the_nearest_size_then_of_the_same_rows() -> None:
    def cost(**changes: Any) -> Cost:
        return Cost(**{**vars(SEEN), **changes})

    assert closest([SEEN], 1000, "cpu") is None
    assert closest([cost(num_timed_steps=0)], 1000, "cuda") is None
    small, large, same = cost(num_parameters=100), cost(num_parameters=20_000), cost(dataset="b")
    assert closest([small, large], 1000, "cuda") == small  # ten times smaller beats twenty times larger
    assert closest([SEEN, same], 1000, "cuda", "b") == same
    assert closest_rows([SEEN, cost(dataset="b", max_length=4)], "b", 128) == cost(dataset="b", max_length=4)
    assert closest_rows([SEEN, cost(max_length=512)], "z", 400) == cost(max_length=512)
    assert closest_rows([cost(num_tokens=0)], "a", 128) is None


def test_totals_say_how_much_is_not_in_them() -> None:
    first = Estimate(num_steps=3, disk_bytes=10, peak_disk_bytes=30, seconds=1.0)
    second = Estimate(num_steps=4, disk_bytes=20, peak_disk_bytes=90)
    sums = totals([first, second, Estimate()])
    assert sums["num_steps"] == (7, 1) and sums["seconds"] == (1.0, 2) and sums["flops"] == (0, 3)
    assert sums["peak_disk_bytes"] == (10 + 20 + 70, 1)
    assert totals([first, second], num_parallel=2)["peak_disk_bytes"] == (10 + 20 + 70 + 20, 0)
    assert totals([])["num_tokens"] == (0, 0)


# --- The shared store -----------------------------------------------------------------------------------------------


def test_what_the_shared_store_holds_is_cached(tiny: tuple[Store, Graph], tmp_path: Path) -> None:
    store, graph = tiny
    remote = Remote((tmp_path / "shared").as_uri(), beat_seconds=0.2, stale_seconds=1.0)
    remote.check()
    for name in ("world", "dataset-sft"):
        found = store.find(graph.spec(name))
        assert isinstance(found, Found)
        with remote.lease(graph.nodes[name].stage.name, graph.key(name), lambda whom: None) as lease:
            assert lease is not None and remote.push(found.folder, lease)
    elsewhere = SharedStore(tmp_path / "elsewhere", remote)
    rows = rows_of(plan(graph.recipe, None, [], elsewhere, graph))
    assert {name: row.status for name, row in rows.items() if row.status != "runs"} == {
        "world": "cached", "dataset-sft": "cached",
    }  # fmt: skip
    assert rows["dataset-sft"].reason.startswith(
        f"in the shared store, made {local_minute('2026-11-01T12:34:56+00:00')}"
    )

    assert not elsewhere.root.exists()

    blocked = SharedStore(elsewhere.root, Remote(f"{__file__}/store"))
    planned = plan(graph.recipe, None, [], blocked, graph)
    assert {row.status for row in planned.rows} == {"runs"} and "was not looked at" in planned.notes[0]
    assert len(planned.notes) == 1
