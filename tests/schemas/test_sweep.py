"""A sweep's grid: which cells it has, what they set, and what is no grid."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.sweep import LogRange, Place, SweepSettings, overrides_of, places

BLOCK: dict[str, Any] = {
    "name": "main",
    "log2_learning_rate": {"low": -12, "high": -8},
    "log2_batch": {"low": 2, "high": 4},
    "seeds": [0, 1],
    "max_tokens": [1000],
}
SWEEP: dict[str, Any] = {
    "name": "small",
    "recipe": "tiny",
    "stage": "sft",
    "blocks": [BLOCK],
    "tasks": [{"task": "tiny_arithmetic", "metric": "exact_match,none", "task_class": "reasoning"}],
}


def sweep(**changes: Any) -> SweepSettings:
    return SweepSettings.model_validate(SWEEP | changes)


def test_a_range_by_hand() -> None:
    assert LogRange(low=-3, high=-2, step=0.5).exponents == (-3.0, -2.5, -2.0)
    assert LogRange(low=4, high=4).exponents == (4.0,)


def test_every_place_is_there_once_and_blocks_share_theirs() -> None:
    wider = BLOCK | {"name": "wider", "log2_learning_rate": {"low": -13, "high": -8}}
    both = places(sweep(blocks=[BLOCK, wider]))
    assert len(places(sweep())) == 5 * 3 * 2 and len(both) == 6 * 3 * 2
    assert set(places(sweep())) <= set(both)
    assert [block for place, block in both.items() if place.log2_learning_rate == -13] == ["wider"] * 6


def test_an_extension_leaves_the_cells_that_are_there_as_they_are() -> None:
    before = sweep()
    after = sweep(blocks=[BLOCK, BLOCK | {"name": "more", "seeds": [2], "max_tokens": [500, 1000]}])
    for place in places(before):
        assert place in places(after) and overrides_of(before, place) == overrides_of(after, place)


def test_ranges_that_name_a_value_by_other_steps_name_the_same_cell() -> None:
    assert LogRange(low=-3, high=-2, step=0.1).exponents[::2] == LogRange(low=-3, high=-2, step=0.2).exponents


def test_no_two_places_have_one_name() -> None:
    where = [("base", "main"), ("main", "main"), ("base", "base"), ("a-b", "main"), ("a", "b"), ("base", "a-b")]
    names = {
        Place(log2_learning_rate=-10, log2_batch=5, seed=3, max_tokens=4000, size=size, arm=arm).name
        for size, arm in where
    }
    assert len(names) == len(where)


def test_what_a_cell_sets() -> None:
    place = Place(log2_learning_rate=-10, log2_batch=5, seed=3, max_tokens=4000, arm="half-life")
    one = sweep(
        arms={"main": {}, "half-life": {"beta2_half_life_batch": 8, "overrides": {"sft.weight_decay": 0.1}}},
        overrides={"evaluation.seed": 7},
    )
    assert overrides_of(one, place) == {
        "evaluation.seed": 7, "sft.weight_decay": 0.1, "sft.learning_rate": 2.0**-10, "sft.effective_batch_size": 32,
        "sft.seed": 3, "sft.max_tokens": 4000, "sft.adam_beta2": 0.999**4,
    }  # fmt: skip
    assert place.name == "lr-10-b5-t4000-s3-half-life"


def test_a_budget_of_rlvr_is_in_episodes() -> None:
    place = Place(log2_learning_rate=-17, log2_batch=7, seed=0, max_tokens=6144)
    assert overrides_of(sweep(stage="rlvr"), place)["rlvr.num_episodes"] == 6144


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"blocks": [BLOCK | {"log2_learning_rate": {"low": -8, "high": -12}}]}, "exchange them"),
        ({"blocks": [BLOCK | {"log2_learning_rate": {"low": -12, "high": -8, "step": 3}}]}, "end at -9"),
        ({"blocks": [BLOCK | {"log2_learning_rate": {"low": -12, "high": -9}}]}, "kind: scan"),
        ({"blocks": [BLOCK | {"log2_batch": {"low": 2, "high": 3}}]}, "kind: scan"),
        ({"blocks": [BLOCK | {"log2_batch": {"low": 2, "high": 4, "step": 0.5}}]}, "whole rows"),
        ({"blocks": [BLOCK | {"log2_batch": {"low": -1, "high": 4}}]}, "whole rows"),
        (
            {"blocks": [BLOCK | {"log2_learning_rate": 3e-4}]},
            "0.0003 is no range; grids are spaced by powers of 2: give",
        ),
        ({"blocks": [BLOCK | {"log2_learning_rate": [1e-5, 2e-5, 5e-5]}]}, "is no range; grids are spaced by powers"),
        (
            {"blocks": [BLOCK | {"log2_learning_rate": {"low": -3, "high": 1}}]},
            "a learning rate of 2^1: rates are below 1",
        ),
        ({"blocks": [BLOCK | {"log2_batch": {"low": 4, "high": 128}}]}, "from -40 to 40; for 128 itself write 7"),
        ({"blocks": [BLOCK | {"log2_batch": {"low": -64, "high": 4}}]}, "low -64 is an exponent of 2, from -40 to 40"),
        ({"blocks": [BLOCK | {"max_tokens": [15]}]}, "max_tokens 15 is less than one step with a batch of 16 rows"),
        ({"tasks": [SWEEP["tasks"][0] | {"task_class": ""}]}, "task 'tiny_arithmetic' has no task_class; name one"),
        ({"blocks": [BLOCK | {"seeds": [1, 1]}]}, "seeds [1, 1] has a value twice"),
        ({"blocks": [BLOCK | {"max_tokens": [0]}]}, "from 1 on"),
        ({"blocks": [BLOCK, BLOCK]}, "share a name"),
        ({"blocks": [BLOCK | {"sizes": ["large"]}]}, "no 'large'; known: ['base']"),
        ({"blocks": [BLOCK | {"arms": ["lora"]}]}, "no 'lora'; known: ['main']"),
        ({"sizes": {"base": {}, "large": {"num_parameters": 9}}}, "sizes.base: give its num_parameters"),
        ({"sizes": {"base": {"num_parameters": 9}, "wide": {"num_parameters": 9}}}, "same num_parameters"),
        ({"arms": {"main": {"overrides": {"compute.store": "x"}}}}, "arms.main sets compute.store; a sweep has one"),
        ({"sizes": {"base": {"overrides": {"compute": {"store": "x"}}}}}, "sizes.base sets compute.store"),
        ({"tasks": [{"task": "gsm8k", "metric": "acc,none"}]}, "task_class"),
        ({"tasks": SWEEP["tasks"] * 2}, "stands twice"),
        ({"blocks": [BLOCK | {"max_tokens": list(range(16, 2000))}]}, "20,000 are allowed at most"),
    ],
)
def test_what_is_no_grid_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        sweep(**changes)


def test_a_scan_may_have_any_shape() -> None:
    block = BLOCK | {"log2_learning_rate": {"low": -9, "high": -9}, "log2_batch": {"low": 3, "high": 3}, "seeds": [0]}
    assert len(places(sweep(kind="scan", blocks=[block]))) == 1


def test_two_answers_for_one_field_are_refused() -> None:
    place = next(iter(places(sweep())))
    with pytest.raises(ValueError, match=r"sets 'sft.learning_rate', which is set already"):
        overrides_of(sweep(overrides={"sft.learning_rate": 1e-3}), place)
