"""Blocks that are added to a sweep in a store: by hand, and where a best learning rate is the last one of its grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltulu.flows.sweeping.extension import (
    FILE,
    add,
    best_blocks,
    blocks_like,
    edge_blocks,
    known_of,
    num_edge_cells,
    ranges_of,
    with_extension,
    write_extension,
    written,
)
from smoltulu.flows.sweeping.grid import cells_of, load_sweep
from smoltulu.flows.sweeping.scores import TaskScores, load_scores
from smoltulu.flows.sweeping.states import CellRecord, remember, states_of, sweep_folder, write_outcome
from smoltulu.schemas.sweep import Place, SweepBlock, SweepSettings, places
from smoltulu.tasks.surface.optimum import Cells
from tests import planted_sweep
from tests.flows.test_sweep import BLOCK, SMALL, SWEEP

SURFACE = BLOCK | {"log2_learning_rate": {"low": -12, "high": -8}, "log2_batch": {"low": 2, "high": 4}, "seeds": [0, 1]}


def sweep(**changes: Any) -> SweepSettings:
    return load_sweep(SWEEP | {"kind": "surface", "blocks": [SURFACE]} | changes)


def test_exponents_as_few_ranges_by_hand() -> None:
    def told(*exponents: float) -> list[tuple[float, ...]]:
        return [one.exponents for one in ranges_of(exponents)]

    assert told(-9, -8, -7) == [(-9, -8, -7)]
    assert told(-7, -9) == [(-9, -7)]
    assert told(-6.5, -9, -8, -7) == [(-9, -8, -7), (-6.5,)]
    assert told(2, 7, 8, 9) == [(2,), (7, 8, 9)]
    assert told(5) == [(5,)]
    assert told(-10, -1) == [(-10,), (-1,)], "a step of 9 octaves is none"
    with pytest.raises(ValueError, match="has a value twice"):
        ranges_of([1, 1])


def test_blocks_like_another_by_hand() -> None:
    first = sweep().blocks[0]
    (seeds,) = blocks_like(sweep(), first, seeds=[3, 4])
    assert seeds == first.model_copy(update={"name": "more-1", "seeds": (3, 4)})
    lower, upper = blocks_like(sweep(), first, rates=[-13, -6, -5], budgets=[500])
    assert (lower.name, upper.name, upper.max_tokens) == ("more-1", "more-2", (500,))
    assert lower.log2_learning_rate.exponents == (-13,) and upper.log2_learning_rate.exponents == (-6, -5)
    again = blocks_like(sweep().with_blocks([lower, upper]), first, batches=[5])
    assert again[0].name == "more-3" and again[0].log2_batch.exponents == (5,)


def scores(best_of: dict[float, float], diverged: tuple[float, ...] = ()) -> TaskScores:
    """A parabola for every batch with its optimum at `best_of[batch]`, seeds half an item apart. Noise-free."""
    at = [place for place in places(sweep()) if place.log2_batch in best_of]
    bad = np.array([place.log2_learning_rate in diverged for place in at])
    values = np.array([-((place.log2_learning_rate - best_of[place.log2_batch]) ** 2) for place in at])
    luck = np.array([0.01 * place.seed for place in at])
    items = (values + luck)[:, None] + np.array([0.0, 0.5])
    items[bad] = np.nan
    cells = Cells(
        log2_lr=np.array([place.log2_learning_rate for place in at]),
        log2_batch=np.array([place.log2_batch for place in at]),
        log2_tokens=np.log2([place.max_tokens for place in at]),
        log2_size=np.zeros(len(at)),
        seed=np.array([place.seed for place in at]),
        diverged=bad,
        items=items,
    )
    of = [CellRecord(place=one, block="first", stage="sft", training="0" * 64, evaluation="1" * 64) for one in at]
    return TaskScores(sweep().tasks[0], cells, items.mean(axis=1), tuple(of))


def told(blocks: list[SweepBlock]) -> list[tuple[float, float, tuple[int, ...]]]:
    return [(one.log2_learning_rate.low, one.log2_batch.low, one.seeds) for one in blocks]


def test_edges_get_the_next_rate_with_all_seeds() -> None:
    inside_low_high = scores({2: -10.2, 3: -12.4, 4: -7.9})
    assert told(edge_blocks(sweep(), [inside_low_high], 100)) == [(-13, 3, (0, 1)), (-7, 4, (0, 1))]
    # Where another task wants the lower edge too, it comes first; there is room for one place of two cells only.
    low_high = scores({3: -12.4, 4: -7.9})
    both = [scores({3: -10, 4: -7.9}), replace(low_high, task=low_high.task.model_copy(update={"task": "other"}))]
    assert told(edge_blocks(sweep(), both, 3)) == [(-7, 4, (0, 1))]
    assert edge_blocks(sweep(), both, 1) == []
    assert told(edge_blocks(sweep(), [scores({3: -10}), scores({3: -12.4})], 9)) == [], "a task's second score"


def test_a_rate_whose_neighbour_diverged_is_no_edge() -> None:
    assert edge_blocks(sweep(), [scores({2: -8.0}, diverged=(-8,))], 100) == []


def test_what_was_added_at_an_edge_is_not_added_again() -> None:
    added = edge_blocks(sweep(), [scores({4: -7.9})], 100)
    wider = sweep().with_blocks(added)
    assert (num_edge_cells(sweep()), num_edge_cells(wider)) == (0, 2)
    assert edge_blocks(wider, [scores({4: -7.9})], 100) == []
    assert num_edge_cells(sweep(blocks=[SURFACE | {"name": "edge-of-stability"}])) == 0, "a name of the user's"


def test_an_extension_lies_in_the_store_and_the_sweep_is_as_it_was(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path / "store", "small")
    assert with_extension(sweep(), folder) == sweep()
    (first,) = blocks_like(sweep(), sweep().blocks[0], seeds=[7])
    write_extension(sweep(), folder, [first])
    (second,) = blocks_like(with_extension(sweep(), folder), first, budgets=[3000])
    whole = write_extension(sweep(), folder, [second])
    assert whole == with_extension(sweep(), folder) and whole.blocks[1:] == (first, second)
    assert written(second)["name"] == "more-2" and "sizes" not in written(second)


def test_two_who_extend_a_sweep_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path / "store", "small")
    (first,) = blocks_like(sweep(), sweep().blocks[0], seeds=[7])
    (second,) = blocks_like(sweep(), sweep().blocks[0], seeds=[8])
    assert first.name == second.name == "more-1"
    write_extension(sweep(), folder, [first])
    whole = write_extension(sweep(), folder, [second])
    assert [(one.name, one.seeds) for one in whole.blocks[1:]] == [("more-1", (7,)), ("more-2", (8,))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "it holds no `blocks:`"),
        ("blocks: 3", "it holds no `blocks:`"),
        ("blocks: [{name: more-1}]", "log2_learning_rate: Field required"),
        ("blocks: [", "extension.yaml: .*; correct it, or remove it"),
        ("a: &a [*a]", "extension.yaml: .*; correct it, or remove it"),
        (
            "blocks: [{name: first, log2_learning_rate: {low: -9, high: -9}, log2_batch: {low: 3, high: 3}, "
            "max_tokens: [2000]}]",
            "share a name",
        ),
    ],
)
def test_an_extension_that_is_none_says_what_to_do(tmp_path: Path, text: str, said: str) -> None:
    folder = sweep_folder(tmp_path / "store", "small")
    folder.mkdir(parents=True)
    (folder / FILE).write_text(text)
    with pytest.raises(ValueError, match=said):
        with_extension(sweep(), folder)


def test_add_refuses_what_adds_nothing_or_would_change_finished_cells(tmp_path: Path) -> None:
    root = tmp_path / "store"
    asked = load_sweep(SWEEP)
    folder = sweep_folder(root, "small")
    with pytest.raises(ValueError, match="all of these cells are there already; nothing was added"):
        add(asked, root, seeds=[0])
    with pytest.raises(ValueError, match="has no block 'second'; its blocks: first"):
        add(asked, root, like="second", seeds=[1])
    shown = add(asked, root, seeds=[1, 2], dry_run=True)
    assert shown.num_cells == 4 and not shown.file.exists()
    assert add(asked, root, seeds=[1, 2]).num_cells == 4
    first = remember(root, folder, cells_of(with_extension(asked, folder)))[0]
    write_outcome(folder, first, "diverged", "loss is nan")
    other = load_sweep(SWEEP | {"overrides": SMALL | {"sft.weight_decay": 0.3}})
    with pytest.raises(ValueError, match="1 of its cells have ended and would be other trainings now"):
        add(other, root, seeds=[5])
    assert Place(log2_learning_rate=-9, log2_batch=3, seed=2, max_tokens=2000) in places(with_extension(asked, folder))


def test_cells_of_a_size_that_was_taken_out_are_left_out(tmp_path: Path) -> None:
    asked = planted_sweep.settings(sizes={"base": {"num_parameters": 1}, "large": {"num_parameters": 2}})
    large = asked.blocks[0].model_copy(update={"name": "large", "sizes": ("large",), "max_tokens": (1 << 14,)})
    planted_sweep.plant(tmp_path / "store", asked.with_blocks([large]), planted_sweep.parabola())
    smaller = planted_sweep.settings()
    folder = sweep_folder(tmp_path / "store", smaller.name)
    states = states_of(tmp_path / "store", folder, known_of(smaller, folder))
    assert {one.cell.place.size for one in states} == {"base"} and len(
        load_scores(smaller, tmp_path / "store", states)
    ) == 2


def test_edges_need_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was never run in this store"):
        add(load_sweep(SWEEP), tmp_path / "store", edges=3)


def test_more_seeds_in_the_best_places_of_each_class_by_hand() -> None:
    """Reasoning is best at (-10, batch 3), then at its neighbours; pattern at (-9, batch 4)."""

    def of(task: str, task_class: str, best: Place) -> TaskScores:
        made = scores({2: -10, 3: -10, 4: -10})
        at = [record.place for record in made.of]
        apart = [
            abs(one.log2_learning_rate - best.log2_learning_rate) + 2 * abs(one.log2_batch - best.log2_batch)
            for one in at
        ]
        cells = replace(made.cells, items=-np.array(apart)[:, None])
        return replace(made, task=made.task.model_copy(update={"task": task, "task_class": task_class}), cells=cells)

    at = places(sweep())
    first = next(one for one in at if (one.log2_learning_rate, one.log2_batch) == (-10, 3))
    second = next(one for one in at if (one.log2_learning_rate, one.log2_batch) == (-9, 4))
    both = [of("a", "reasoning", first), of("b", "pattern", second), of("b", "pattern", first)]
    assert told(best_blocks(sweep(), both, 1, [5, 6])) == [(-10, 3, (5, 6)), (-9, 4, (5, 6))]
    three = told(best_blocks(sweep(), both[:1], 3, [5]))
    assert three[0] == (-10, 3, (5,)) and {one[:2] for one in three[1:]} == {(-11, 3), (-9, 3)}
