"""Near-duplicates in the graph of a recipe: what is compared with what, what depends on it, and the run's report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from smoltulu.flows.graphs.nodes import Binding
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.recipe import load_recipe, recipe_stages
from smoltulu.schemas.near_duplicates import NearDuplicateOutputs
from smoltulu.schemas.recipe import Recipe
from smoltulu.tasks.engine.stores import open_store


def graph(**overrides: Any) -> Graph:
    return Graph(load_recipe("tiny", overrides))


def test_it_is_off_unless_asked_for() -> None:
    assert not [name for name in graph().nodes if name.startswith("near-duplicates")]
    assert "near_duplicates" not in recipe_stages(load_recipe("tiny"))


def test_every_trained_set_is_compared_with_what_is_held_out() -> None:
    made = graph(near_duplicates={"policy": "remove"})
    for name in ("sft", "preference", "rlvr"):
        node = made.nodes[f"near-duplicates-{name}"]
        assert node.inputs == {
            "dataset": Binding(f"contamination-{name}", "file"),
            "others": {
                "preference_eval": Binding("dataset-preference-eval", "file"),
                "verified_eval": Binding("dataset-verified-eval", "file"),
            },
            "index": Binding("benchmark-index"),
        }
    assert made.nodes["preflight-sft"].inputs["dataset"] == Binding("near-duplicates-sft", "file")
    assert made.nodes["preflight-rlvr"].inputs["dataset"] == Binding("near-duplicates-rlvr", "file")


def test_trained_sets_are_compared_with_those_before_them_only() -> None:
    made = graph(near_duplicates={"against": ["rlvr", "sft"]})
    others = {
        name: made.nodes[f"near-duplicates-{name}"].inputs.get("others") for name in ("sft", "preference", "rlvr")
    }
    before = {"sft": Binding("near-duplicates-sft", "file")}
    assert others == {"sft": None, "preference": before, "rlvr": before}
    assert "index" not in made.nodes["near-duplicates-sft"].inputs


def test_its_rules_change_its_key_and_what_is_made_of_its_rows() -> None:
    one, other = (graph(near_duplicates={"threshold": value}).keys() for value in (0.8, 0.7))
    changed = {name for name in one if one[name] != other[name]}
    assert {"near-duplicates-sft", "preflight-sft", "sft"} <= changed
    assert not changed & {"dataset-sft", "contamination-sft", "benchmark-index", "dataset-preference-eval"}
    plain = graph().keys()
    assert all(one[name] == plain[name] for name in ("contamination-sft", "dataset-verified-eval"))
    # A set that it is compared with is in its key.
    fewer = graph(near_duplicates={"threshold": 0.8, "against": ["benchmarks"]}).keys()
    assert fewer["near-duplicates-sft"] != one["near-duplicates-sft"]


def test_a_set_that_is_named_and_not_there_is_said() -> None:
    def notes(**overrides: Any) -> list[str]:
        return load_recipe("tiny", overrides).near_duplicate_notes()

    assert notes() == notes(near_duplicates={}) == []
    (note,) = notes(near_duplicates={"against": ["dpo"]})
    assert note == "near_duplicates.against: nothing is compared with dpo: there is no data.dpo"
    (note,) = notes(near_duplicates={"against": ["benchmarks"]}, contamination=None)
    assert note.endswith("there is no block contamination")


def test_until_contamination_stops_before_it() -> None:
    recipe: Recipe = load_recipe("tiny", {"near_duplicates": {}})
    names = Graph(recipe, "contamination").nodes
    assert not [name for name in names if name.startswith("near-duplicates")]
    assert "near-duplicates-rlvr" in Graph(recipe, "near_duplicates").nodes


def test_the_stage_runs_in_a_recipe(tmp_path: Path) -> None:
    """The real thing on a file, without a training: a copy in capitals goes, its manifest names what it was made of."""
    words = ["lighthouse", "river", "violin", "market", "teacher"]
    texts = [f"Please write a short and quiet poem about the old {word} at the end of the road" for word in words]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "No."}] for text in texts]
    turns.append([{"role": "user", "content": texts[2].upper()}, {"role": "assistant", "content": "Yes."}])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    blocks = ("contamination", "reward_model", "dpo", "rlvr", "pass_rates", "verifier_audit", "evaluation", "publish")
    recipe = load_recipe(
        "tiny",
        {
            "near_duplicates": {"policy": "remove", "threshold": 0.9},
            "data": {"sft": {"sources": [{"path": str(file), "format": "messages"}]}},
            "compute.store": str(tmp_path / "store"),
            "world": None,
            **dict.fromkeys(blocks),
        },
    )
    store = open_store(recipe.compute)
    references = run_graph(Graph(recipe, "near_duplicates"), store, logging.getLogger("test"))
    made = references["near-duplicates-sft"]
    outputs = NearDuplicateOutputs.model_validate(made.outputs)
    assert (outputs.num_rows_read, outputs.num_removed, outputs.num_rows) == (6, 1, 5)
    manifest = json.loads((Path(made.path) / "manifest.json").read_text())
    assert manifest["inputs"]["dataset"]["key"] == references["dataset-sft"].key
    assert "itself" in (Path(made.path) / outputs.page_file).read_text()
