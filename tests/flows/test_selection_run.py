"""A recipe with a selection on a small world: from its files to the trained model and the report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.planning.plan import plan
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.data.rows import stored_rows
from tests.report_of import report_of
from tests.small_tiny import SMALL_TINY

SFT: dict[str, Any] = {"generated": "sft.jsonl", "format": "messages"}
RUN: dict[str, Any] = {name: value for name, value in SMALL_TINY.items() if not name.startswith(("rlvr.", "dpo."))} | {
    "data.sft.sources": [SFT | {"repeats": 1.5, "num_held_out": 12}, SFT | {"limit": 60}],
    **dict.fromkeys(("evaluation", "verifier_audit", "pass_rates", "rlvr", "publish", "dpo", "reward_model")),
    **dict.fromkeys(("data.preference", "data.rlvr", "data.preference_eval", "data.verified_eval")),
    "sft.max_steps": 4, "preflight.dry_run": False,
    "compute.launcher": "inline", "compute.device": "cpu", "compute.num_threads": 1, "compute.report_to": [],
    "selection": {"method": "length", "keep": {"token_share": 0.3}},
}  # fmt: skip
LOG = logging.getLogger("test")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(store: Store) -> dict[str, ArtifactReference]:
    return run_graph(Graph(load_recipe("tiny", RUN)), store, LOG)


def rows(made: dict[str, ArtifactReference], node: str) -> list[dict[str, Any]]:
    return list(stored_rows(Path(made[node].path) / "rows.parquet"))


def again(store: Store, changes: dict[str, Any], until: str | None = None) -> dict[str, ArtifactReference]:
    return run_graph(Graph(load_recipe("tiny", RUN | changes), until), store, LOG)


def outcomes(made: dict[str, ArtifactReference]) -> set[str]:
    """Nodes that ran."""
    return {node for node, reference in made.items() if reference.outcome != "Cached"}


def test_the_selection_of_a_run_keeps_its_budget(made: dict[str, ArtifactReference]) -> None:
    everything, kept = rows(made, "mixture-sft"), rows(made, "selected-sft")
    outputs = made["selected-sft"].outputs
    assert outputs["num_rows_read"] == len(everything) and outputs["num_rows"] == len(kept)
    assert kept == [row for row in everything if row["id"] in {one["id"] for one in kept}]
    assert made["preflight-sft"].outputs["num_source_rows"] == len(kept)
    assert made["preflight-sft"].outputs["num_tokens"] == outputs["num_kept_tokens"], "the tokens are those of SFT"
    for source in outputs["by_source"].values():
        assert abs(source["num_kept_tokens"] - 0.3 * source["num_tokens"]) < 40
    assert made["preflight-sft-held-out"].outputs["num_source_rows"] == 12


def test_another_amount_of_a_selection_runs_only_what_follows(made: dict[str, ArtifactReference], store: Store) -> None:
    other = {"selection": {"method": "random", "keep": {"share": 0.5}}}
    assert outcomes(again(store, other, "selection")) == {"selected-sft"}
    planned = {row.node: row.status for row in plan(load_recipe("tiny", RUN | other), None, [], store).rows}
    assert {node for node, status in planned.items() if status == "runs"} == {"preflight-sft", "sft"}
    # As the plan says why: the nearest is of another amount.
    share = {"selection": RUN["selection"] | {"keep": {"share": 0.9}}}
    reasons = {row.node: row.reason for row in plan(load_recipe("tiny", RUN | share), "selection", [], store).rows}
    assert "keep.share" in reasons["selected-sft"]
    # What one scorer counted is known to the next.
    asks = {"selection": {"method": "perplexity"}}
    costs = {row.node: row.estimate for row in plan(load_recipe("tiny", RUN | asks), None, [], store).rows}
    counted = made["influence-sft-0"].outputs["num_tokens"]
    assert costs["influence-sft-0"].num_tokens == counted
    assert costs["influence-sft-0"].flops == 2 * counted * made["base-model"].outputs["num_parameters"]
    # A new source scores only itself.
    third = RUN["data.sft.sources"] + [SFT | {"limit": 20}]
    found = outcomes(again(store, {"data.sft.sources": third}, "selection"))
    assert {node for node in found if node.startswith(("influence", "selected"))} == {"influence-sft-2", "selected-sft"}


def test_weights_of_a_selection_reach_sft(made: dict[str, ArtifactReference], store: Store) -> None:
    weighs = {"selection": {"method": "perplexity", "use": "weight", "by": "turn", "keep": {"share": 1}}}
    found = again(store, weighs)
    assert outcomes(found) == {"influence-sft-0", "influence-sft-1", "selected-sft", "preflight-sft", "sft"}
    assert found["selected-sft"].outputs["num_rows"] == made["selected-sft"].outputs["num_rows_read"]
    assert found["sft"].outputs["num_steps"] == 4


def test_a_selection_is_in_the_report(made: dict[str, ArtifactReference], store: Store) -> None:
    page = report_of(Graph(load_recipe("tiny", RUN)), made, store)
    outputs = made["selected-sft"].outputs
    assert f"Method length: {outputs['num_rows']:,} of {outputs['num_rows_read']:,} rows" in page
    assert "ranked below the cut" in page
    # The sources, which are read once more to be scored, are told once.
    assert '<th scope="row" class="tight">sft-0</th>' not in page
