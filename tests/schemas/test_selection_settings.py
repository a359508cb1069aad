"""The block `selection`: what is refused, what is only said, and what enters which config."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.selection import SelectionSettings

TARGETS = {"sources": [{"generated": "sft.jsonl", "format": "messages", "limit": 8}]}


def recipe(selection: dict[str, Any] | None, **overrides: Any) -> Recipe:
    more = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_recipe("tiny", {"selection": selection} | more)


def settings(**values: Any) -> SelectionSettings:
    return SelectionSettings.model_validate({"method": "attention_influence"} | values)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"keep": {"share": 0}}, "selection.keep.share: .* greater than 0; given: 0"),
        ({"keep": {"share": 1.2}}, "selection.keep.share: .* less than or equal to 1; given: 1.2"),
        ({"keep": {"token_share": -0.5}}, "selection.keep.token_share: .* greater than 0; given: -0.5"),
        ({"keep": {"share": float("nan")}}, "selection.keep.share: .*finite"),
        ({"keep": {"tokens": 0}}, "selection.keep.tokens: .* greater than or equal to 1"),
        ({"keep": {"share": 0.5, "tokens": 10}},
         "give exactly one of share, token_share, tokens, threshold; given: share, tokens"),
        ({"keep": {}}, "give exactly one of share, .*; given: none"),
        ({"keep": {"within": "source", "share": 0.5}}, "selection.keep.within: .*'domain' or 'all'"),
        ({"method": "longest"}, "selection.method: .*'length'"),
        ({"methd": "length"}, r"no such field \(did you mean 'method'\?\)"),
        ({"min_weight": -1}, "selection.min_weight: .* greater than or equal to 0; given: -1"),
        ({"use": "weight", "min_weight": 2}, "min_weight 2 is above max_weight 1.5.*keep.order to lowest"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens 20 is above max_tokens 10: no row is between"),
        ({"min_tokens": 4096}, "min_tokens 4,096 is above max_length 2,048.*raise max_length"),
        ({"method": "random", "keep": {"threshold": 0.5}}, "keep.threshold: method random scores nothing"),
        ({"method": "rds_plus", "targets": TARGETS, "keep": {"threshold": 2}},
         "keep.threshold 2 would keep no row or every row: scores of method rds_plus are from -1 to 1"),
        ({"keep": {"threshold": -1.5}}, "scores of method attention_influence are at least -1"),
        ({"method": "length", "keep": {"threshold": 4096}}, "scores of method length are from 1 to 2,048"),
        ({"method": "length", "keep": {"threshold": 99}, "max_tokens": 90}, "from 1 to 90; give one of these"),
        ({"method": "rds_plus"}, "targets: method rds_plus ranks rows by how alike .*; add targets"),
        ({"method": "rds_plus", "targets": TARGETS, "sets": ["sft", "rlvr"]}, "sft, rlvr have rows of different kinds"),
        ({"use": "weight", "sets": ["sft", "rlvr"]}, "weighs the loss of SFT rows alone, and sets has rlvr"),
        ({"sets": ["sft", "sft"]}, "names a set twice"),
        ({"sets": []}, "selection.sets: "),
        ({"sets": ["dpo"]}, "there is no data.dpo to select from; sets of this recipe: sft, preference, rlvr"),
        ({"model": {}}, "exactly one of repository, path, scratch"),
    ],
)  # fmt: skip
def test_selection_settings_that_mean_nothing_are_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe({"method": "attention_influence"} | selection)


def test_selection_is_refused_after_a_policy_that_changes_texts() -> None:
    with pytest.raises(RecipeError, match=r"policy: span changes texts after they were scored.*set it to remove"):
        recipe({"method": "length"}, contamination__policy="span")
    assert recipe({"method": "none"}, contamination__policy="span").selector is None


def test_targets_of_a_selection_are_data_sources_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="generated data needs a world block"):
        load_recipe("smoltulu-1130", {"selection": {"method": "rds_plus", "targets": TARGETS}})
    mixed = {"sources": [{"generated": "sft.jsonl", "format": "messages", "num_rows": 5}]}
    with pytest.raises(RecipeError, match=r"are for training sets .*sft, preference, dpo, rlvr"):
        recipe({"method": "rds_plus", "targets": mixed})


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"method": "length", "probes": {"num_probes": 8}, "by": "turn"}, [
            "probes does nothing: method length masks no heads", "by does nothing: method length asks no model"]),
        ({"method": "perplexity", "seed": 1, "targets": TARGETS, "max_weight": 3}, [
            "targets does nothing: method perplexity compares with no target set",
            "seed does nothing: it is for method random", "max_weight does nothing: they are for use: weight"]),
        ({"method": "rds_plus", "targets": TARGETS, "by": "turn"}, ["by does nothing: RDS+ scores whole rows"]),
        ({"use": "weight", "keep": {"share": 0.5}}, ["keep.share does nothing: use: weight keeps all rows"]),
        ({"use": "weight", "min_weight": 1.0, "max_weight": 1.0}, ["are both 1: all rows weigh the same"]),
        ({"keep": {"threshold": 0.1, "within": "all"}}, ["keep.within changes no kept row"]),
        ({"keep": {"threshold": -9}, "use": "weight"}, ["keep.threshold does nothing: use: weight keeps all rows"]),
        ({"max_length": 100}, ["selection.max_length 100 is below sft.max_length 128: rows between are not scored"]),
        ({"max_tokens": 4096}, ["max_tokens 4,096 is above max_length 2,048"]),
        ({"sets": ["rlvr"], "by": "step"}, ["by does nothing: prompts of data.rlvr have no trained turns"]),
        ({"sets": ["rlvr"]}, []),
        ({"method": "none", "keep": {"share": 0.5}}, ["method is none, so keep does nothing"]),
        ({"method": "none", "model": {"repository": "a/b"}}, []),
    ],
)  # fmt: skip
def test_selection_settings_that_do_nothing_are_told(selection: dict[str, Any], words: list[str]) -> None:
    made = recipe({"method": "attention_influence"} | selection)
    notes = made.selection_notes()
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True)), notes
    # As a flow hands it on: every field is given then.
    assert load_recipe(made.model_dump(mode="json")).selection_notes() == notes


def test_selection_of_a_set_that_nothing_is_trained_on_is_told() -> None:
    (note,) = recipe(
        {"method": "length", "sets": ["rlvr"]}, rlvr=None, pass_rates=None, verifier_audit=None
    ).selection_notes()
    assert note == "selection.sets: data.rlvr is selected from, and nothing here is trained on it"


def test_methods_with_one_scorer_share_the_scores_config() -> None:
    counts = settings(method="random", seed=3, over="whole", by="turn").scores_config("sft")
    assert counts == settings(method="length", mask="zero_output").scores_config("sft")
    influence = settings(by="turn").scores_config("sft")
    assert (influence.scorer, influence.mask, influence.by) == ("attention_influence", "uniform", "turn")
    # What is kept changes no score; a prompt has no trained token.
    assert settings(by="turn", keep={"tokens": 5}, max_tokens=9).scores_config("sft") == influence
    assert settings(by="turn").scores_config("rlvr").by == "row"
    assert settings().scores_config("rlvr").over == "whole"
    assert settings(method="perplexity", mask="zero_output").scores_config("sft").mask is None


def test_selection_config_has_only_what_it_reads() -> None:
    labels = ("a",)
    plain = settings().stage_config("sft", labels)
    assert plain == settings(seed=4, min_weight=0.1, by="turn", over="whole").stage_config("sft", labels)
    assert settings(method="random", seed=4).stage_config("sft", labels).seed == 4
    weighs = settings(use="weight", by="turn", min_weight=0.1, keep={"share": 0.5}).stage_config("sft", labels)
    assert weighs == settings(use="weight", by="turn", min_weight=0.1, keep={"tokens": 5}).stage_config("sft", labels)
    assert (weighs.by, weighs.min_weight, weighs.keep.share) == ("turn", 0.1, 1.0)
    assert settings(method="length", use="weight", by="turn").stage_config("sft", labels).by == "row"
