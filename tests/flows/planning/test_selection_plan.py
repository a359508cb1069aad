"""What `smoltulu plan` says of a selection: its artifacts, and what they cost before and after rows were counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.plan import Plan, plan
from smoltulu.flows.planning.reading_costs import Reading, known_tokens, reading_of, reading_seconds, work_of
from smoltulu.flows.recipe import load_recipe
from tests.golden_keys import made_up_commit

NUM_PARAMETERS, NUM_ROWS = 1_711_376_384, 939_343


def planned(store: Store, method: str, **overrides: Any) -> Plan:
    recipe = load_recipe("smoltulu-1130", {"selection": {"method": method}} | overrides)
    return plan(recipe, "selection", [], store, Graph(recipe, "selection", resolve=made_up_commit))


def test_plan_shows_the_artifacts_of_a_selection_and_their_cost(tmp_path: Path) -> None:
    made = planned(Store(tmp_path), "attention_influence", **{"compute.device_tflops": 100.0})
    rows = {row.node: row.estimate for row in made.rows}
    # Sixteen passes over 50 probes of 450 tokens; two over rows that have 2,048 tokens at most.
    assert rows["selection-heads"].flops == pytest.approx(2 * 16 * 50 * 450 * NUM_PARAMETERS)
    tokens, scores = NUM_ROWS * 2048, rows["influence-sft-0"]
    assert (scores.num_rows, scores.num_tokens, scores.flops) == (NUM_ROWS, tokens, 4.0 * NUM_PARAMETERS * tokens)
    assert scores.seconds == pytest.approx(4 * NUM_PARAMETERS * tokens / 100e12) and scores.basis == "stated"
    assert rows["selected-sft"].num_rows == NUM_ROWS
    (note,) = (note for note in made.notes if note.startswith("influence-sft-0"))
    assert "at most so much, as if each row had 2,048 tokens" in note and "selection.method=length" in note
    whole = load_recipe("smoltulu-1130", {"selection.method": "length", "selection.keep": {"share": 0.1}})
    laid_out = Graph(whole, resolve=made_up_commit)
    steps = {row.node: row.estimate.num_steps for row in plan(whole, None, [], Store(tmp_path), laid_out).rows}
    assert steps["sft"] == round(93_934 * 2 / 8 + 0.5)


@pytest.mark.parametrize(("method", "num_passes"), [("perplexity", 1), ("length", 0), ("random", 0)])
def test_passes_of_a_selection(tmp_path: Path, method: str, num_passes: int) -> None:
    scores = next(row for row in planned(Store(tmp_path), method).rows if row.node == "influence-sft-0").estimate
    assert scores.flops == (2.0 * num_passes * NUM_PARAMETERS * NUM_ROWS * 2048 if num_passes else None)


def test_costs_of_reading_by_hand() -> None:
    assert (work_of(10, 2, 3), work_of(10, 0, None)) == (120, 10)
    manifest = {
        "outputs": {"num_tokens": 100}, "spec": {"inputs": {"dataset": "k", "tokenizer": "t"}}, "duration_seconds": 5,
        "compute": {"device": "cpu", "num_processes": 2},
    }  # fmt: skip
    one = reading_of(manifest, 2, 10)
    assert one == Reading("k", "t", 100, True, "cpu", 2, 4000.0, 5.0)
    assert reading_of(manifest, 2, None) is None and reading_of({}, 2, 10) is None
    assert known_tokens([one], "k", "t") == 100
    assert known_tokens([one], "other", "t") is None is known_tokens([one], "k", "other")
    # Twice the work, by one process.
    assert reading_seconds(8000, [one], "cpu", 1, None, True) == 20
    assert reading_seconds(8000, [one], "cuda", 1, 4e-9, True) == pytest.approx(2)
    assert reading_seconds(8000, [one], "cuda", 1, None, True) is None
    assert reading_seconds(8000, [], "cuda", 1, 4e-9, False) is None
    # What counted tokens is no measure of what reads them with a model: its work is tokens, not FLOPs.
    counted = reading_of(manifest, 0, None)
    assert counted is not None and (counted.work, counted.has_model) == (100.0, False)
    assert reading_seconds(8000, [counted, one], "cpu", 1, None, True) == 20
    assert reading_seconds(8000, [counted], "cpu", 1, None, True) is None
    assert reading_seconds(50, [counted, one], "cpu", 2, None, False) == 2.5
