"""A recipe with mixtures and held-out rows on small models: from its files to the losses in the report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.data.held_out import asked
from smoltulu.tasks.data.rows import stored_rows
from tests.report_of import report_of
from tests.small_tiny import SMALL_TINY

SFT: dict[str, Any] = {"generated": "sft.jsonl", "format": "messages"}
PART = SFT | {"limit": 100, "share": 0.25, "max_repeats": 2}
RUN: dict[str, Any] = {name: value for name, value in SMALL_TINY.items() if not name.startswith("rlvr.")} | {
    "data.sft.sources": [SFT | {"repeats": 1.5, "num_held_out": 12}, PART],
    "data.preference.sources": [{"generated": "preference.jsonl", "format": "preference", "held_out": 0.1}],
    "evaluation": None, "verifier_audit": None, "pass_rates": None, "rlvr": None, "publish": None,
    "sft.max_steps": 4, "dpo.max_steps": 3, "reward_model.max_steps": 3, "preflight.dry_run": False,
    "sft.held_out": {"every_steps": 2, "keep": "best"}, "dpo.held_out": {"every_share": 0.5},
    "compute.launcher": "inline", "compute.device": "cpu", "compute.num_threads": 1, "compute.report_to": [],
}  # fmt: skip


def graph(overrides: dict[str, Any]) -> Graph:
    return Graph(load_recipe("tiny", overrides))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(store: Store) -> dict[str, ArtifactReference]:
    return run_graph(graph(RUN), store, logging.getLogger("test"))


def rows(made: dict[str, ArtifactReference], node: str) -> list[dict[str, Any]]:
    return list(stored_rows(Path(made[node].path) / "rows.parquet"))


@pytest.mark.slow
def test_no_held_out_row_is_trained_on(made: dict[str, ArtifactReference]) -> None:
    """The second source repeats rows of the first: what the one holds out, the other leaves out."""
    trained, aside = rows(made, "mixture-sft"), rows(made, "held-out-rows-sft")
    assert not {asked(row) for row in trained} & {asked(row) for row in aside} and aside
    first, second = made["mixture-sft"].outputs["shares"]
    assert first["num_held_out"] == len(aside) <= 12 and second["num_left_out"] > 0
    assert len({row["id"] for row in trained}) == len(trained) == first["num_rows"] + second["num_rows"]
    assert second["num_rows"] / len(trained) == pytest.approx(0.25, abs=0.01)
    assert made["preflight-sft-held-out"].outputs["num_source_rows"] == len(aside)
    tokens = made["preflight-sft"].outputs
    assert sum(tokens["tokens_by_source"].values()) == tokens["num_tokens"]


@pytest.mark.slow
def test_every_training_has_its_losses(made: dict[str, ArtifactReference]) -> None:
    steps = {
        node: [one["step"] for one in made[node].outputs["held_out_loss"]["losses"]]
        for node in ("sft", "reward-model", "dpo")
    }
    assert steps == {"sft": [0, 2, 4], "reward-model": [0, 1, 2, 3], "dpo": [0, 2, 3]}
    start = made["dpo"].outputs["held_out_loss"]["losses"][0]
    assert start["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy is its reference: log 2"
    assert made["sft"].metrics["held_out/loss"] == min(
        one["loss"] for one in made["sft"].outputs["held_out_loss"]["losses"]
    )


@pytest.mark.slow
def test_another_share_and_the_report(made: dict[str, ArtifactReference], store: Store) -> None:
    other = RUN | {"data.sft.sources": [SFT | {"repeats": 2, "num_held_out": 12}, PART]}
    keys, before = graph(other).keys(), {node: reference.key for node, reference in made.items()}
    same = {node for node, key in before.items() if keys[node] == key}
    assert {"dataset-sft", "contamination-sft", "held-out-rows-sft", "preflight-sft-held-out"} <= same
    page = report_of(graph(RUN), made, store)
    for said in ("Mixtures", "Held-out loss", "held_out/loss", "keep is best"):
        assert said in page
