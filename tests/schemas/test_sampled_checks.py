"""Recipes in which a model writes rows: what is refused when they are read, and what is only said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.sampled_checks import circle, dependencies

PAIRS: dict[str, Any] = {"model": "sft", "prompts": "rlvr", "score": "verifier", "make": "pairs"}
BEST: dict[str, Any] = PAIRS | {"model": "base_model", "make": "best"}
BY_REWARD = PAIRS | {"score": "reward_model"}


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("tiny", {name.replace("__", "."): value for name, value in overrides.items()})


def source(name: str) -> list[dict[str, str]]:
    return [{"sampled": name}]


def test_sampled_rows_stand_beside_others_and_need_no_format() -> None:
    made = recipe(
        sampled={"a": BEST, "b": PAIRS},
        data__sft__sources=[{"generated": "sft.jsonl", "format": "messages"}, {"sampled": "a", "limit": 5}],
        data__preference__sources=source("b"),
    )
    assert made.data.sft is not None and made.data.preference is not None
    assert [(one.label, one.format) for one in made.data.sft.sources] == [("sft.jsonl", "messages"), ("a", "messages")]
    assert made.data.preference.sources[0].format == "preference"
    assert made.sampled_notes() == [] and made.sampled["a"].num_samples == 8
    # As a flow hands it on.
    assert load_recipe(made.model_dump(mode="json")) == made


def test_pairs_of_dpo_alone_and_for_both() -> None:
    assert [recipe().rows_of(block) for block in ("sft", "reward_model", "dpo", "rlvr")] == [
        "sft", "preference", "preference", "rlvr",
    ]  # fmt: skip
    own = recipe(sampled={"a": BY_REWARD}, data__dpo__sources=source("a"))
    assert [own.rows_of(block) for block in ("reward_model", "dpo")] == ["preference", "dpo"]


@pytest.mark.parametrize(
    ("overrides", "way"),
    [
        ({"sampled": {"a": BEST | {"model": "sft"}}, "data__sft__sources": source("a")},
         "sampled.a needs sft, sft needs data.sft, data.sft needs sampled.a"),
        ({"sampled": {"a": PAIRS | {"model": "dpo"}}, "data__preference__sources": source("a")},
         "sampled.a needs dpo, dpo needs data.preference, data.preference needs sampled.a"),
        ({"sampled": {"a": BEST | {"model": "dpo"}}, "data__sft__sources": source("a")},
         "sampled.a needs dpo, dpo needs sft, sft needs data.sft, data.sft needs sampled.a"),
        ({"sampled": {"a": PAIRS | {"model": "rlvr"}}, "data__dpo__sources": source("a")},
         "sampled.a needs rlvr, rlvr needs dpo, dpo needs data.dpo, data.dpo needs sampled.a"),
        # The reward model learns from the pairs that it ranks.
        ({"sampled": {"a": BY_REWARD}, "data__preference__sources": source("a")},
         "sampled.a needs reward_model, reward_model needs data.preference, data.preference needs sampled.a"),
        # Its start is DPO, whose pairs it ranks.
        ({"sampled": {"a": BY_REWARD}, "data__dpo__sources": source("a"), "reward_model__start_from": "dpo"},
         "sampled.a needs reward_model, reward_model needs dpo, dpo needs data.dpo, data.dpo needs sampled.a"),
        # Prompts of its own rows; and two that wait for each other.
        ({"sampled": {"a": BY_REWARD | {"prompts": "sft", "make": "best", "model": "base_model"}},
          "data__sft__sources": source("a")}, "sampled.a needs data.sft, data.sft needs sampled.a"),
        # The base model is pre-trained on the texts of data.sft where there is no world.
        ({"sampled": {"a": BEST}, "data__sft__sources": source("a"), "world": None, **{
            f"data__{name}": None for name in ("preference", "preference_eval", "verified_eval")},
          "data__rlvr__sources": [{"path": "/x.jsonl", "format": "rlvr"}], "reward_model": None, "dpo": None,
          "rlvr": None, "evaluation": None, "contamination": None, "verifier_audit": None, "pass_rates": None},
         "sampled.a needs base_model, base_model needs data.sft, data.sft needs sampled.a"),
    ],
)  # fmt: skip
def test_a_circle_is_refused_with_the_way_round(overrides: dict[str, Any], way: str) -> None:
    with pytest.raises(RecipeError, match="goes in a circle, so none of it can be made first: ") as error:
        recipe(**overrides)
    assert way in str(error.value) and "data.dpo is for DPO alone" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampled": {"on_policy": PAIRS}, "data__preference__sources": source("on_polcy")},
         r"data.preference: source {sampled: on_polcy}: no entry of sampled is called 'on_polcy' \(did you mean "
         r"'on_policy'\?\); entries: on_policy"),
        ({"data__preference__sources": source("a")}, "entries: none; add a block sampled"),
        ({"sampled": {"a": PAIRS}, "data__sft__sources": source("a")},
         "makes pairs, and data.sft takes SFT rows; set sampled.a.make to best"),
        ({"sampled": {"a": BEST}, "data__dpo__sources": source("a")},
         "makes best, and data.dpo takes pairs; set sampled.a.make to pairs"),
        ({"sampled": {"a": BEST}, "data__rlvr__sources": [{"sampled": "a", "format": "rlvr"}]},
         "data.rlvr: source {sampled: a}: rows that a model wrote are for data.sft, data.preference, data.dpo"),
        ({"sampled": {"a": BEST}, "data__sft__sources": [{"sampled": "a", "format": "question_answer"}]},
         "its rows have the format messages and fields of the usual names; leave both out"),
        ({"sampled": {"a": BEST}, "contamination__audit": {"sources": [{"sampled": "a", "format": "messages"}]}},
         "not for benchmarks, audits or evaluations"),
        ({"sampled": {"a": BY_REWARD}, "reward_model": None, "rlvr__critic": {"initial": "policy"}},
         "sampled.a: score is reward_model, and the recipe has none; add a block reward_model, or set score to"),
        ({"sampled": {"a": PAIRS | {"ties": "reward_model"}}, "reward_model": None,
          "rlvr__critic": {"initial": "policy"}}, "sampled.a: ties is reward_model, and the recipe has none"),
        ({"sampled": {"a": PAIRS | {"prompts": "sft"}}}, "score verifier needs prompts with verifiers and truths"),
        ({"sampled": {"a": PAIRS | {"num_samples": 1}}}, "make pairs compares samples of a prompt, and num_samples"),
        ({"sampled": {"a": PAIRS | {"temperature": 0}}}, "temperature 0 is greedy, so all 8 samples"),
        ({"sampled": {"a": BEST | {"temperature": 0, "num_samples": 1, "top_p": 0.9}}}, "top_p 0.9 has no meaning"),
        ({"sampled": {"a": PAIRS | {"top_p": 1.5}}}, r"sampled.a.top_p: .* less than or equal to 1; given: 1.5"),
        ({"sampled": {"a": PAIRS | {"top_p": 0}}}, r"sampled.a.top_p: .* greater than 0; given: 0"),
        ({"sampled": {"a": PAIRS | {"model": "stf"}}}, "sampled.a.model: .*'base_model', 'sft', 'dpo' or 'rlvr'"),
        ({"sampled": {"a": PAIRS | {"temprature": 1}}},
         r"sampled.a.temprature: no such field \(did you mean 'temperature'\?\); allowed: score, make"),
        ({"sampled": {"a": {**PAIRS, "model": None}}}, "exactly one of model and checkpoint .* got neither"),
        ({"sampled": {"a": PAIRS | {"checkpoint": {"path": "/m"}}}}, "exactly one of model and checkpoint .* got both"),
        ({"sampled": {"a": PAIRS | {"chat_template": "chatml"}}}, "chat_template 'chatml' is for a checkpoint"),
        ({"sampled": {"a": {**PAIRS, "model": None, "checkpoint": {"scratch": {}}}}}, "not scratch"),
        ({"sampled": {"A-1": PAIRS}}, "should match pattern"),
        ({"sampled": {"a": PAIRS}, "data__rlvr": None, "rlvr": None, "verifier_audit": None, "pass_rates": None},
         "sampled.a: asks the prompts of data.rlvr; add it, or set prompts"),
        ({"sampled": {"a": PAIRS | {"model": "dpo"}}, "dpo": None}, "samples the model of dpo; add a block dpo"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**overrides)


def test_what_nothing_is_trained_on_is_said() -> None:
    (note,) = recipe(sampled={"a": PAIRS}).sampled_notes()
    assert note.startswith("sampled.a: no data source takes its rows") and "{sampled: a} to data.preference" in note
    (note,) = recipe(sampled={"a": PAIRS}, data__dpo__sources=source("a"), dpo=None).sampled_notes()
    assert note.startswith("data.dpo: has pairs for DPO alone")
    # Of the last model there is nothing to train here, but another recipe may take the rows.
    assert len(recipe(sampled={"a": PAIRS | {"model": "rlvr"}}).sampled_notes()) == 1


@given(st.dictionaries(st.sampled_from("abcde"), st.lists(st.sampled_from("abcde"), max_size=3), max_size=5))
def test_a_way_round_is_one(needs: dict[str, list[str]]) -> None:
    """Against the closure of the relation, by brute force."""
    reached = {name: set(needs.get(name, [])) for name in "abcde"}
    for _ in range(5):
        reached = {name: there.union(*(reached[one] for one in there)) for name, there in reached.items()}
    for name in "abcde":
        way = circle(needs, name)
        assert bool(way) == (name in reached[name])
        if way:
            assert way[0] == way[-1] == name and len(set(way)) == len(way) - 1
            assert all(need in needs[made] for made, need in pairwise(way))


def test_a_recipe_without_samples_has_no_circle() -> None:
    needs = dependencies(recipe())
    assert needs["dpo"] == ["sft", "data.preference"] and needs["rlvr"] == ["sft", "data.rlvr", "dpo", "reward_model"]
    assert not any(circle(needs, name) for name in needs)
