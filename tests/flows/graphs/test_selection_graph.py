"""Where a selection stands in the graph, and what its keys hang on."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe, recipe_stages
from tests.golden_keys import made_up_commit

ONE: dict[str, Any] = {"generated": "sft.jsonl", "format": "messages"}
TWO = [ONE, ONE | {"limit": 100}]
SELECTOR = {"scratch": {"seed": 1, "vocab_size": 1280, "num_steps": 5}}


def graph(until: str | None = None, selection: dict[str, Any] | None = None, **overrides: Any) -> Graph:
    """Of the recipe `tiny`, with two sources."""
    more = {name.replace("__", "."): value for name, value in overrides.items()}
    settings = {"method": "attention_influence", "model": SELECTOR} | (selection or {})
    recipe = load_recipe("tiny", {"data.sft.sources": TWO, "selection": settings} | more)
    return Graph(recipe, until, resolve=made_up_commit)


def changed(one: Graph, other: Graph) -> set[str]:
    """Nodes of either whose key the other does not have under this name."""
    before, after = one.keys(), other.keys()
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def of_selection(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("selec", "influence", "dataset"))}


def test_no_selection_makes_no_node_and_changes_no_key() -> None:
    recipe = load_recipe("tiny", {"selection": None})
    for method in ({"method": "none"}, {"method": "none", "model": SELECTOR, "keep": {"share": 0.5}}):
        off = load_recipe("tiny", {"selection": method})
        assert Graph(off).keys() == Graph(recipe).keys()
        assert "selection" not in recipe_stages(off)


def test_nodes_of_a_selection() -> None:
    made = graph()
    assert made.nodes["preflight-sft"].bindings()["dataset"].node == "selected-sft"
    assert {name: one.node for name, one in made.nodes["selected-sft"].bindings().items()} == {
        "dataset": "contamination-sft", "scores.0": "influence-sft-0", "scores.1": "influence-sft-1",
        "heads": "selection-heads",
    }  # fmt: skip
    assert {name: one.node for name, one in made.nodes["influence-sft-1"].bindings().items()} == {
        "dataset": "dataset-sft-1", "tokenizer": "base-model", "model": "selector-model", "heads": "selection-heads",
    }  # fmt: skip
    names = list(made.nodes)
    assert names.index("selection-heads") < names.index("influence-sft-0") < names.index("selected-sft")
    assert names.index("selected-sft") < names.index("preflight-sft")
    # The rows of others are as they were; the base model's tokenizer is made of all rows.
    assert made.nodes["preflight-dpo"].bindings()["dataset"].node == "contamination-preference"
    assert not of_selection(changed(made, graph(selection={"method": "none"}))) - {
        "selector-model", "selection-heads", "selected-sft",
        *(f"{kind}-sft-{number}" for kind in ("influence", "dataset") for number in (0, 1)),
    }  # fmt: skip


def test_another_amount_runs_only_the_selection_and_what_follows() -> None:
    made = graph()
    for keep in ({"share": 0.5}, {"tokens": 500}, {"threshold": 0.1}, {"token_share": 0.2, "within": "all"}):
        found = changed(made, graph(selection={"keep": keep}))
        assert of_selection(found) == {"selected-sft"} and {"preflight-sft", "sft", "dpo"} <= found
        assert "preflight-dpo" not in found
    for more in ({"min_tokens": 9}, {"max_tokens": 99}):
        assert of_selection(changed(made, graph(selection=more))) == {"selected-sft"}


def test_what_does_nothing_is_in_no_key() -> None:
    made = graph()
    for more in ({"gate": "warn"}, {"seed": 5}, {"min_weight": 0.2}):
        assert changed(made, graph(selection=more)) == set()


def test_a_new_source_scores_only_itself() -> None:
    made, more = graph(), graph(data__sft__sources=[*TWO, ONE | {"limit": 7}])
    assert of_selection(changed(made, more)) == {
        "dataset-sft", "dataset-sft-2", "influence-sft-2", "selected-sft",
    }  # fmt: skip
    # Nor does one that was alone: it was read once, as the set itself.
    alone = graph(data__sft__sources=[ONE])
    assert alone.nodes["influence-sft-0"].bindings()["dataset"].node == "dataset-sft"
    assert "dataset-sft-0" not in alone.nodes
    assert alone.keys()["influence-sft-0"] == made.keys()["influence-sft-0"]
    # The order of sources is no part of it either.
    swapped = graph(data__sft__sources=TWO[::-1]).keys()
    assert [swapped[f"influence-sft-{number}"] for number in (1, 0)] == [
        made.keys()[f"influence-sft-{number}"] for number in (0, 1)
    ]
    # Nor are mixture and checks.
    other = graph(data__sft__sources=[ONE | {"repeats": 2}, TWO[1]], contamination=None)
    assert other.keys()["influence-sft-0"] == made.keys()["influence-sft-0"]
    assert other.nodes["selected-sft"].bindings()["dataset"].node == "mixture-sft"


def test_methods_share_what_they_can() -> None:
    length, random, other_seed = (
        graph(selection={"method": method, "seed": seed})
        for method, seed in (("length", 0), ("random", 0), ("random", 1))
    )
    assert not {"selection-heads", "selector-model"} & length.nodes.keys()
    assert "model" not in length.nodes["influence-sft-0"].inputs
    assert of_selection(changed(length, random)) == {"selected-sft"} == of_selection(changed(random, other_seed))
    influence = graph()
    # Heads are found once for all masks of the same kind; the mask is in scores too.
    assert of_selection(changed(influence, graph(selection={"mask": "zero_output"}))) == {
        "selection-heads", "influence-sft-0", "influence-sft-1", "selected-sft",
    }  # fmt: skip
    assert of_selection(changed(influence, graph(selection={"over": "whole"}))) == {
        "influence-sft-0", "influence-sft-1", "selected-sft",
    }  # fmt: skip
    assert "selection-heads" in changed(influence, graph(chat_template="chatml"))


def test_the_base_model_scores_where_no_other_is_named() -> None:
    for model in (None, load_recipe("tiny").base_model.model_dump(mode="json")):
        made = graph(selection={"model": model})
        assert "selector-model" not in made.nodes
        assert made.nodes["selection-heads"].bindings()["model"].node == "base-model"


def test_targets_of_rds_plus_are_checked_and_their_rows_stay() -> None:
    targets = {"sources": [ONE | {"limit": 8}]}
    made = graph(selection={"method": "rds_plus", "targets": targets})
    scores = made.nodes["influence-sft-0"].bindings()
    assert (scores["targets"].node, scores["targets_hits"].node) == ("dataset-targets", "contamination-targets")
    assert made.nodes["contamination-targets"].config.settings.policy == "report"  # type: ignore[attr-defined]
    assert "near-duplicates-targets" not in made.nodes and "heads" not in scores
    bare = graph(selection={"method": "rds_plus", "targets": targets}, contamination=None)
    assert "targets_hits" not in bare.nodes["influence-sft-0"].inputs


def test_selection_of_pairs_and_prompts() -> None:
    made = graph(selection={"method": "length", "sets": ["preference", "rlvr"]})
    for block, name in (("reward-model", "preference"), ("dpo", "preference"), ("rlvr", "rlvr")):
        assert made.nodes[f"preflight-{block}"].bindings()["dataset"].node == f"selected-{name}"
    assert made.nodes["influence-preference-0"].config.trained_turns == "last"  # type: ignore[attr-defined]
    made = graph(selection={"sets": ["preference"]}, dpo__trained_turns="all")
    assert made.nodes["influence-preference-0"].config.trained_turns == "all"  # type: ignore[attr-defined]
    influence = graph(selection={"sets": ["rlvr"], "by": "turn"}).nodes["influence-rlvr-0"].config
    assert (influence.over, influence.by) == ("whole", "row")  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", [{"share": 0.7}, {"share": 0.3, "num_held_out": 5}, {"weight": 2}, {"num_rows": 9}])
def test_a_source_of_any_mixture_is_scored_by_itself(rule: dict[str, Any]) -> None:
    rest = {name: 1 - value if name == "share" else value for name, value in rule.items() if name != "num_held_out"}
    made = graph(data__sft__sources=[ONE | rule, TWO[1] | rest])
    assert made.nodes["selected-sft"].bindings()["dataset"].node == "mixture-sft"
    assert made.keys()["influence-sft-0"] == graph().keys()["influence-sft-0"]


def test_what_a_method_does_not_read_is_not_looked_for() -> None:
    asked: list[Any] = []

    def resolve(reference: Any) -> str:
        asked.append(reference.repository)
        return made_up_commit(reference)

    idle = {"model": {"repository": "a/b"}, "targets": {"sources": [{"repository": "c/d", "format": "messages"}]}}
    for method, wanted in (("length", []), ("perplexity", ["a/b"]), ("rds_plus", ["c/d", "a/b"])):
        asked.clear()
        Graph(load_recipe("tiny", {"selection": idle | {"method": method}}), resolve=resolve)
        assert asked == wanted


def test_weights_go_to_sft_alone() -> None:
    made = graph(selection={"use": "weight"})
    assert made.nodes["sft"].bindings()["weights"].node == "selected-sft"
    assert "weights" not in made.nodes["dpo"].inputs | graph().nodes["sft"].inputs
    assert of_selection(changed(made, graph(selection={"use": "weight", "max_weight": 2}))) == {"selected-sft"}


def test_until_of_a_selection() -> None:
    assert "selection-heads" in graph("selection_heads").nodes
    assert not {"influence-sft-0", "preflight-sft"} & graph("selection_heads").nodes.keys()
    assert (
        "influence-sft-1" in graph("selection_scores").nodes and "selected-sft" not in graph("selection_scores").nodes
    )
    assert list(graph("selection").nodes)[-1] == "selected-sft"
    assert "selection-heads" not in graph("base_model").nodes
    # Rows that nothing is trained on are selected too; a training that is not asked for selects nothing.
    alone = {name: None for name in ("rlvr", "verifier_audit", "pass_rates")}
    assert "selected-rlvr" in graph("selection", {"method": "length", "sets": ["rlvr"]}, **alone).nodes
    assert "selected-preference" not in graph("sft", {"method": "length", "sets": ["sft", "preference"]}).nodes
    assert "selection_scores" in recipe_stages(load_recipe("tiny", {"selection.method": "length"}))


def test_held_out_rows_and_samples_are_of_all_rows() -> None:
    made = graph(
        data__sft__sources=[ONE | {"num_held_out": 9}, TWO[1]],
        sampled={"a": {"model": "sft", "prompts": "rlvr", "score": "verifier", "make": "pairs"}},
        data__dpo={"sources": [{"sampled": "a"}]},
        selection={"method": "length", "sets": ["sft", "rlvr", "dpo"]},
    )
    assert made.nodes["preflight-sft-held-out"].bindings()["dataset"].node == "held-out-rows-sft"
    assert made.nodes["samples-a"].bindings()["dataset"].node == "contamination-rlvr"
    # Rows that a model writes are selected once they are there.
    assert made.nodes["preflight-dpo"].bindings()["dataset"].node == "selected-dpo"
    assert made.nodes["influence-dpo-0"].bindings()["dataset"].node == "dataset-dpo"
    assert made.nodes["dataset-dpo"].bindings()["sampled.a"].node == "sampled-rows-a"
