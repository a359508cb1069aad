"""A sweep of kind `selection`: roles of its arms, seeds that a verdict needs, and fields that follow the seed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.sweep import SweepSettings, overrides_of, places

ARMS: dict[str, Any] = {
    "selected": {"overrides": {"selection.method": "perplexity"}},
    "rds": {"overrides": {"selection.method": "rds_plus"}},
    "random": {"overrides": {"selection.method": "random"}, "follows_seed": ["selection.seed"]},
    "longest": {"overrides": {"selection.method": "length"}},
    "full": {"overrides": {"selection.method": "none"}},
}
ONE = {"low": -10, "high": -10}
MAIN: dict[str, Any] = {
    "name": "main",
    "log2_learning_rate": ONE,
    "log2_batch": {"low": 3, "high": 3},
    "seeds": [0, 1, 2, 3, 4],
    "max_tokens": [4096],
    "arms": ["random", "longest", "selected", "rds"],
}
BESIDE: dict[str, Any] = MAIN | {"name": "beside", "seeds": [0, 1, 2], "arms": ["full"]}
VALUES: dict[str, Any] = {
    "name": "chosen",
    "recipe": "tiny-skills",
    "stage": "sft",
    "kind": "selection",
    "overrides": {"selection.keep.token_share": 0.25},
    "selection": {"selectors": ["selected", "rds"], "full": "full"},
    "arms": ARMS,
    "blocks": [MAIN, BESIDE, BESIDE | {"name": "epochs", "max_tokens": [16384]}],
    "tasks": [{"task": "skill_copy", "metric": "exact_match,none", "task_class": "pattern"}],
}


def sweep(**changes: Any) -> SweepSettings:
    return SweepSettings.model_validate(VALUES | changes)


def test_random_draws_anew_with_every_seed_and_nothing_else_does() -> None:
    made = sweep()
    assert made.selection is not None and made.selection.arms == ("selected", "rds", "random", "longest", "full")
    drawn = {
        (place.arm, place.seed): overrides_of(made, place).get("selection.seed")
        for place in places(made)
        if place.max_tokens == 4096
    }
    assert [drawn["random", seed] for seed in range(5)] == [0, 1, 2, 3, 4]
    assert {value for (arm, _), value in drawn.items() if arm != "random"} == {None}
    assert {overrides_of(made, place)["sft.seed"] for place in places(made)} == {0, 1, 2, 3, 4}


def test_a_field_that_follows_the_seed_is_set_by_nothing_else() -> None:
    random = {"overrides": {"selection.method": "random", "selection.seed": 7}, "follows_seed": ["selection.seed"]}
    made = sweep(arms=ARMS | {"random": random})
    with pytest.raises(ValueError, match=r"follows_seed sets 'selection\.seed', which is set already"):
        overrides_of(made, next(iter(places(made))))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selection": None}, "belong together"),
        ({"kind": "scan"}, "belong together"),
        ({"selection": {"selectors": ["chosen"]}}, "there is no arm 'chosen'"),
        ({"selection": {"selectors": ["random"]}}, "an arm has two roles"),
        ({"selection": {"selectors": []}}, "at least 1"),
        ({"selection": {"selectors": ["rds"], "longest": "nothing"}}, "there is no arm 'nothing'"),
        ({"arms": ARMS | {"random": {"overrides": {"selection.method": "random"}}}}, r"add follows_seed: \[selection"),
        ({"blocks": [MAIN | {"seeds": [0, 1, 2, 3]}, BESIDE]}, "arm random has 4 seeds; give it 5 at least"),
        ({"blocks": [MAIN, BESIDE | {"seeds": [0, 1]}]}, "arm full has 2 seeds; give it 3 at least"),
        ({"blocks": [MAIN]}, "arm full is never beside the others"),
        ({"blocks": [MAIN | {"arms": ["random", "selected", "rds"]}, BESIDE]}, "put these arms into one block"),
        ({"max_edge_cells": 4}, "leave out max_edge_cells"),
    ],
)
def test_what_is_no_experiment_with_selection(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        sweep(**changes)


def test_arms_of_a_setting_may_stand_in_several_blocks() -> None:
    more = MAIN | {"name": "more", "arms": ["random"], "seeds": [5, 6]}
    split = [
        MAIN | {"arms": ["random", "longest"]},
        MAIN | {"name": "judged", "arms": ["selected", "rds"]},
        BESIDE,
        more,
    ]
    assert len(places(sweep(blocks=split))) == 20 + 3 + 2
