"""A mixture in the graph: behind all checks, and its rules in no key before it."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.flows.graphs.nodes import Binding
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError, load_recipe

SFT: dict[str, Any] = {"generated": "sft.jsonl", "format": "messages"}
PAIRS: dict[str, Any] = {"generated": "preference.jsonl", "format": "preference"}


def graph(**overrides: Any) -> Graph:
    return Graph(load_recipe("tiny", {name.replace("__", "."): value for name, value in overrides.items()}))


def sources(*given: dict[str, Any], base: dict[str, Any] = SFT) -> list[dict[str, Any]]:
    return [base | one for one in given]


def keys(made: Graph) -> dict[str, str]:
    return {name: made.key(name) for name in made.nodes}


def test_another_share_reads_and_checks_nothing_again() -> None:
    plain = keys(graph(data__sft__sources=sources({}, {"limit": 9})))
    first = keys(graph(data__sft__sources=sources({"share": 0.3}, {"limit": 9})))
    second = keys(graph(data__sft__sources=sources({"share": 0.2}, {"limit": 9}), data__sft__seed=4))
    assert first.keys() - plain.keys() == {"mixture-sft"}
    same = {name for name in first if plain.get(name) == first[name] == second[name]}
    assert {"dataset-sft", "contamination-sft", "dataset-preference", "base-model", "preflight-dpo"} <= same
    assert not same & {"mixture-sft", "preflight-sft", "sft", "dpo", "publish"}
    assert first["mixture-sft"] != second["mixture-sft"]


def test_the_order_of_the_nodes() -> None:
    made = graph(data__sft__sources=sources({"repeats": 2}))
    assert made.nodes["mixture-sft"].inputs["dataset"] == Binding("contamination-sft", "file")
    assert made.nodes["preflight-sft"].inputs["dataset"] == Binding("mixture-sft", "file")
    assert "preflight-sft-held-out" not in made.nodes and "held_out" not in made.nodes["sft"].inputs


def test_held_out_rows_go_to_every_training_of_their_set() -> None:
    made = graph(data__preference__sources=sources({"held_out": 0.1}, base=PAIRS))
    for block in ("reward-model", "dpo"):
        held_out = made.nodes[f"preflight-{block}-held-out"]
        assert held_out.inputs["dataset"] == Binding("held-out-rows-preference", "file")
        assert held_out.config.settings.dry_run is False and held_out.config.settings.max_overlong_share == 1
        assert made.nodes[block].inputs["held_out"] == Binding(f"preflight-{block}-held-out", "file")
        assert made.nodes[block].inputs["held_out_rows"] == Binding("held-out-rows-preference", "file")
    assert made.nodes["reference-logps-held-out"].inputs["dataset"] == Binding("preflight-dpo-held-out", "file")
    assert made.nodes["dpo"].inputs["held_out_reference_logps"] == Binding("reference-logps-held-out", "file")
    assert "held_out" not in made.nodes["sft"].inputs
    assert len(set(keys(made).values())) == len(made.nodes), "held-out rows are no other node's rows"
    # Another share and seed leave the held-out rows, their tokens and their reference alone.
    other = keys(graph(data__preference__sources=sources({"held_out": 0.1, "repeats": 2}, base=PAIRS),
                       data__preference__seed=3))  # fmt: skip
    same = {name for name, key in keys(made).items() if other[name] == key}
    assert {"held-out-rows-preference", "preflight-dpo-held-out", "reference-logps-held-out"} <= same
    assert not same & {"mixture-preference", "preflight-dpo", "dpo", "reward-model"}
    # What decides about the weights changes the training and what follows, no row.
    best = graph(data__preference__sources=sources({"held_out": 0.1}, base=PAIRS), dpo__held_out={"keep": "best"})
    before, after = keys(made), keys(best)
    assert {name for name in before if before[name] != after[name]} == {
        "dpo", "evaluation-dpo", "evaluation-dpo-implicit-reward", "pass-rates", "rlvr", "evaluation-rlvr", "publish",
    }  # fmt: skip


def test_languages_change_no_other_key() -> None:
    plain, told = keys(graph()), keys(graph(languages={"detector": "lingua"}))
    assert told.keys() - plain.keys() == {"languages-sft", "languages-preference", "languages-rlvr"}
    assert all(told[name] == key for name, key in plain.items())


@pytest.mark.parametrize(("overrides", "said"), [
    ({"data__rlvr__sources": [{"generated": "rlvr.jsonl", "format": "rlvr", "held_out": 0.1}]}, "set rlvr.held_out"),
    ({"data__preference_eval__sources": sources({"repeats": 2}, base=PAIRS)}, "this one is read as it is"),
    ({"contamination__audit": {"sources": sources({"share": 1})}}, "this one is read as it is"),
    ({"sft__held_out": {"keep": "best"}}, r"sft\.held_out: no source of data\.sft holds rows out"),
])  # fmt: skip
def test_where_no_mixture_can_be(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        graph(**overrides)
