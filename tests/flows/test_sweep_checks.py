"""What a sweep refuses before anything is trained, each with what was given, what is allowed, what to do."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.flows.recipe import RecipeError, load_recipe, preset_names
from smoltulu.flows.sweeping.checks import IN_STEPS, check_apart, check_fractions, check_steps
from smoltulu.flows.sweeping.grid import cells_of, load_sweep
from smoltulu.flows.sweeping.states import records_of
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.schedules import Budgets
from tests.flows.test_sweep import BLOCK, SMALL, SWEEP

TWO_BATCHES = BLOCK | {"log2_batch": {"low": 3, "high": 4}}
WSD = {"kind": "wsd", "warmup_ratio": 0.1, "decay_ratio": 0.2}


def made(changes: dict[str, Any]) -> tuple[Any, list[Any]]:
    sweep = load_sweep(SWEEP | changes)
    return sweep, list(cells_of(sweep))


def scheduled(schedule: dict[str, Any], block: dict[str, Any] = TWO_BATCHES) -> tuple[Any, list[Any]]:
    plain = {"sft.lr_scheduler_type": "linear", "sft.warmup_ratio": 0.0}
    return made({"blocks": [block], "overrides": SMALL | plain | {"sft.schedule": schedule}})


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"kind": "linear", "warmup_steps": 5}, "warmup_steps 5, which is another share .* give warmup_ratio instead"),
        ({"kind": "wsd", "decay_steps": 3}, "decay_steps 3, .* give decay_ratio instead"),
        (
            WSD | {"decay_shape": "half-life", "half_life_steps": 2},
            "half_life_steps 2, .* give another decay_shape instead",
        ),
    ],
)
def test_schedules_in_steps_are_refused_where_cells_have_other_numbers_of_steps(
    schedule: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=f"sweep small: sft.schedule has {told}"):
        check_fractions(*scheduled(schedule))
    check_fractions(*scheduled(schedule, BLOCK))  # one batch, one budget: all cells have the same schedule
    check_fractions(*scheduled(WSD))


@pytest.mark.parametrize("name", preset_names())
def test_the_shipped_recipes_have_schedules_in_shares(name: str) -> None:
    """So that a sweep over any of them compares equal schedules."""
    recipe = load_recipe(name)
    for stage in (recipe.sft, recipe.dpo, recipe.reward_model, recipe.rlvr):
        schedule = getattr(stage, "schedule", None)
        assert not isinstance(schedule, Budgets)
        assert not any(getattr(schedule, field, 0) for field in IN_STEPS)


def test_an_arm_that_changes_nothing_is_a_duplicate() -> None:
    arms = {"main": {}, "again": {"overrides": {"sft.adam_beta2": 0.999}}}
    sweep, cells = made({"arms": arms, "blocks": [BLOCK | {"arms": list(arms)}]})
    with pytest.raises(
        ValueError, match="arm again has duplicates of the cells of size base, arm main at all 2 places"
    ):
        check_apart(sweep, records_of(cells))
    half_life = {"main": {}, "again": {"beta2_half_life_batch": 8}}  # 0.999 at batch 8, as main has
    sweep, cells = made({"arms": half_life, "blocks": [BLOCK | {"arms": list(half_life)}]})
    check_apart(sweep, records_of(cells))


def rows(cell: Any, num_rows: int, num_tokens: int) -> dict[str, ArtifactReference]:
    node = cell.graph.nodes[cell.training].bindings()["dataset"].node
    key = cell.graph.key(node)
    outputs = {"num_rows": num_rows, "num_tokens": num_tokens}
    return {key: ArtifactReference(stage="preflight", node=node, key=key, digest="d", path="p", outputs=outputs)}


def test_a_budget_of_less_than_one_step_is_refused_once_rows_are_counted() -> None:
    """8 rows of 300 tokens are 2,400 tokens; the cells have 2,000, which is 6 rows."""
    sweep, cells = made({})
    with pytest.raises(ValueError, match=r"max_tokens 2,000 is less than one step, which has 2,400 tokens .* 6 rows"):
        check_steps(sweep, cells, rows(cells[0], 100, 30_000))


def test_budgets_that_are_rounded_up_and_checkpoints_that_never_come_are_told() -> None:
    """Steps of 8 x 160 = 1,280 tokens: 2,000 are 1.56 steps, so 2, which are 2,560 tokens, 28 % more."""
    sweep, cells = made({})
    rounded, unsaved = check_steps(sweep, cells, rows(cells[0], 100, 16_000))
    assert "(2 steps) has 28% more tokens than its max_tokens" in rounded
    assert unsaved.startswith("compute.save_steps 250 is never reached: the longest cell has 2 steps.")
    # 8 x 50 = 400 tokens: 5 whole steps, and a checkpoint at the second.
    sweep, cells = made({"overrides": SMALL | {"compute.stages.sft.save_steps": 2}})
    assert check_steps(sweep, cells, rows(cells[0], 100, 5_000)) == []
    sweep, cells = made({"overrides": SMALL | {"compute.stages": {}, "compute.save_steps": 500}})
    assert check_steps(sweep, cells, rows(cells[0], 100, 5_000)) == [], "the default is nobody's wish"


def test_rows_that_are_not_there_are_not_judged() -> None:
    sweep, cells = made({})
    assert check_steps(sweep, cells, {}) == []


def test_a_batch_that_the_devices_cannot_form_takes_fewer_of_them() -> None:
    _, cells = made({"overrides": SMALL | {"compute.num_processes": 3}})
    node = cells[0].graph.nodes["sft"]
    assert node.config.effective_batch_size == 8  # type: ignore[attr-defined]
    assert cells[0].graph.compute_of(node).num_processes == 2


def test_a_size_has_no_store_of_its_own() -> None:
    sizes = {"base": {"num_parameters": 10}, "larger": {"num_parameters": 20, "overrides": {"compute.store": "/other"}}}
    told = "sizes.larger sets compute.store; a sweep has one store"
    with pytest.raises(RecipeError, match=told):
        made({"sizes": sizes, "blocks": [BLOCK | {"sizes": ["base", "larger"]}]})
