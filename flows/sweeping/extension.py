"""Blocks that were added to a sweep in a store: by `smoltulu sweep NAME extend`, and at edges by its runs.

They lie in `extension.yaml` of the sweep's folder, as blocks of a sweep. The sweep's own file is never written. Take a
block out of it to take it back: its finished cells stay in the store and on record.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ValidationError

from smoltulu.artifacts.files import write_atomically
from smoltulu.flows.reading import Unreadable, read_file
from smoltulu.flows.sweeping.grid import cells_of
from smoltulu.flows.sweeping.scores import TaskScores, load_scores
from smoltulu.flows.sweeping.states import (
    CellRecord,
    alone,
    check_unchanged,
    records_of,
    remembered,
    states_of,
    sweep_folder,
)
from smoltulu.schemas.common import problems_of
from smoltulu.schemas.sweep import MAX_EXPONENT, MAX_STEP, LogRange, Place, SweepBlock, SweepSettings, places
from smoltulu.tasks.surface.optimum import find_optima

FILE = "extension.yaml"
#: Beginning of the name of a block that a run added at an edge.
EDGE = "edge-"


def with_extension(sweep: SweepSettings, folder: Path) -> SweepSettings:
    """A sweep with what was added to it here. ValueError where the file is none of blocks of this sweep."""
    file = folder / FILE
    if not file.exists():
        return sweep
    try:
        values = read_file(file)
        if not isinstance(values, dict) or values.keys() != {"blocks"} or not isinstance(values["blocks"], list):
            raise ValueError("it holds no `blocks:` with a list of them")
        return sweep.with_blocks([SweepBlock.model_validate(block) for block in values["blocks"]])
    except (Unreadable, OSError, ValueError) as error:
        why = "; ".join(problems_of(error)) if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{file}: {why}; correct it, or remove it: then the sweep has the blocks of its own file"
        ) from None


def write_extension(sweep: SweepSettings, folder: Path, blocks: Sequence[SweepBlock]) -> SweepSettings:
    """Add blocks to what was added to a sweep before. Returns it with all of them; the last ones are these.

    A name that was taken since they were made (a run adds cells while somebody extends its sweep) becomes a free one.
    """
    with alone(folder):
        whole = with_extension(sweep, folder)
        for block in blocks:
            taken = {one.name for one in whole.blocks}
            name = next(_free_names(whole, f"{block.name.rpartition('-')[0]}-")) if block.name in taken else block.name
            whole = whole.with_blocks([block.model_copy(update={"name": name})])
        added = [written(block) for block in whole.blocks[len(sweep.blocks) :]]
        text = "# Added to the sweep in this store; the file of the sweep itself is as it was.\n"
        text += yaml.safe_dump({"blocks": added}, sort_keys=False, default_flow_style=None)
        write_atomically(folder / FILE, text)
    return whole


@dataclass(frozen=True)
class Added:
    """Blocks that were added, the file that they stand in, and the cells that none before them had."""

    blocks: tuple[SweepBlock, ...]
    file: Path
    num_cells: int


def add(
    asked: SweepSettings,
    store_root: Path,
    *,
    like: str | None = None,
    edges: int | None = None,
    best: int | None = None,
    dry_run: bool = False,
    seeds: Sequence[int] = (),
    rates: Sequence[float] = (),
    batches: Sequence[float] = (),
    budgets: Sequence[int] = (),
) -> Added:
    """Add blocks to a sweep in a store: `blocks_like` a block; at most `edges` cells beyond edges; or `seeds` in the
    `best` places of each class.

    Raises:
        ValueError: no such block; blocks that are none of the sweep, that add nothing, that the recipe does not allow;
            finished cells that would be other trainings now.
    """
    folder = sweep_folder(store_root, asked.name)
    before = with_extension(asked, folder)
    blocks: list[SweepBlock] = []
    if before.kind == "selection" and (edges is not None or best is not None):
        raise ValueError(
            f"sweep {asked.name} compares arms and has no best place; add seeds, rates, batches or budgets"
        )
    if edges is not None or best is not None:
        states = states_of(store_root, folder, known_of(before, folder))
        arms = dict.fromkeys(one.cell.place.arm for one in states if one.state == "done")
        for arm in arms if edges is not None else ["main"]:
            scores = load_scores(before, store_root, states, arm)
            whole = before.with_blocks(blocks)
            if edges is not None:
                blocks += edge_blocks(whole, scores, edges - sum(len(one.seeds) for one in blocks))
            elif best is not None:
                blocks += best_blocks(whole, scores, best, seeds)
    else:
        named = {block.name: block for block in before.blocks}
        if like is not None and like not in named:
            raise ValueError(f"sweep {asked.name} has no block {like!r}; its blocks: {', '.join(named)}")
        blocks = blocks_like(before, named[like] if like else before.blocks[0], seeds, rates, batches, budgets)
    after = before.with_blocks(blocks)
    num_new = len(places(after)) - len(places(before))
    if not num_new:
        why = "no best learning rate is the last one of its grid" if edges else "all of these cells are there already"
        raise ValueError(f"sweep {asked.name}: {why}; nothing was added")
    check_unchanged(store_root, folder, records_of(cells_of(after)))
    if not dry_run:
        blocks = list(write_extension(asked, folder, blocks).blocks[-len(blocks) :])
    return Added(tuple(blocks), folder / FILE, num_new)


def known_of(sweep: SweepSettings, folder: Path) -> list[CellRecord]:
    """The cells that runs of a sweep have asked for, without those of sizes and arms that it has no more."""
    return [
        record for record in remembered(folder) if record.place.size in sweep.sizes and record.place.arm in sweep.arms
    ]


def written(block: SweepBlock) -> dict[str, Any]:
    """A block as it stands in a file, without what is left at its default."""
    return block.model_dump(mode="json", exclude_defaults=True)


def blocks_like(
    sweep: SweepSettings,
    like: SweepBlock,
    seeds: Sequence[int] = (),
    rates: Sequence[float] = (),
    batches: Sequence[float] = (),
    budgets: Sequence[int] = (),
) -> list[SweepBlock]:
    """Blocks with the axes of `like`, but for those that are given. Rates and batches are exponents of 2.

    Several where the given exponents are no range with one step.
    """
    of_rates = ranges_of(rates) if rates else [like.log2_learning_rate]
    of_batches = ranges_of(batches) if batches else [like.log2_batch]
    names = _free_names(sweep, "more-")
    return [
        SweepBlock(
            name=next(names),
            log2_learning_rate=rate,
            log2_batch=batch,
            seeds=tuple(seeds) or like.seeds,
            max_tokens=tuple(budgets) or like.max_tokens,
            sizes=like.sizes,
            arms=like.arms,
        )
        for rate, batch in product(of_rates, of_batches)
    ]


def ranges_of(exponents: Sequence[float]) -> list[LogRange]:
    """Exponents as few ranges, each with one step: -9, -8, -7, -6.5 is -9 to -7 and -6.5."""
    if len(set(exponents)) != len(exponents):
        raise ValueError(f"{list(exponents)} has a value twice; give each once")
    left = sorted(exponents)
    found = []
    while left:
        run = left[:1]
        step = left[1] - left[0] if len(left) > 1 else 1.0
        while len(run) < len(left) and abs(left[len(run)] - run[-1] - step) < 1e-9:
            run.append(left[len(run)])
        # Two and a gap: the second may belong to what follows.
        if len(run) == 2 < len(left) or step > MAX_STEP:
            run, step = run[:1], 1.0
        found.append(LogRange(low=run[0], high=run[-1], step=step if len(run) > 1 else 1.0))
        left = left[len(run) :]
    return found


def _free_names(sweep: SweepSettings, beginning: str) -> Iterator[str]:
    taken = {block.name for block in sweep.blocks}
    return (name for number in range(1, 1 << 20) if (name := f"{beginning}{number}") not in taken)


def num_edge_cells(sweep: SweepSettings) -> int:
    """Cells that runs have added at edges so far."""
    return sum(re.fullmatch(rf"{EDGE}\d+", name) is not None for name in places(sweep).values())


def best_blocks(
    sweep: SweepSettings, scores: Sequence[TaskScores], number: int, seeds: Sequence[int]
) -> list[SweepBlock]:
    """These seeds in the `number` best places of each class, at the budget and size with the most places.

    A class's places are ranked by the mean over its tasks (one score of each) of the score in standard deviations.
    """
    chosen: dict[Place, None] = {}
    for name in dict.fromkeys(one.task.task_class for one in scores):
        ranks: dict[Place, float] = defaultdict(float)
        for of_task in (one for one in _first_scores(scores) if one.task.task_class == name):
            means = _main_surface(of_task)
            spread = float(np.std(list(means.values()))) or 1.0
            for place, mean in means.items():
                ranks[place] += (mean - float(np.mean(list(means.values())))) / spread
        chosen |= dict.fromkeys(sorted(ranks, key=lambda place: (-ranks[place], place.name))[:number])
    names = _free_names(sweep, "best-")
    return [_one_place(next(names), place, tuple(seeds)) for place in chosen]


def _first_scores(scores: Sequence[TaskScores]) -> list[TaskScores]:
    """Of each task the score that is named first."""
    return list({one.task.task: one for one in reversed(scores)}.values())[::-1]


def _main_surface(of_task: TaskScores) -> dict[Place, float]:
    """Mean score over seeds of the places with the commonest budget and size; larger is better, `seed` is 0."""
    values: dict[Place, list[float]] = defaultdict(list)
    for record, mean, diverged in zip(
        of_task.of, of_task.cells.items.mean(axis=1), of_task.cells.diverged, strict=True
    ):
        values[record.place.model_copy(update={"seed": 0})].append(-math.inf if diverged else float(mean))
    common = Counter((place.max_tokens, place.size) for place in values).most_common(1)[0][0]
    return {
        place: float(np.mean(here))
        for place, here in values.items()
        if (place.max_tokens, place.size) == common and min(here) > -math.inf
    }


def _one_place(name: str, place: Place, seeds: tuple[int, ...]) -> SweepBlock:
    return SweepBlock(
        name=name,
        log2_learning_rate=LogRange(low=place.log2_learning_rate, high=place.log2_learning_rate),
        log2_batch=LogRange(low=place.log2_batch, high=place.log2_batch),
        seeds=seeds,
        max_tokens=(place.max_tokens,),
        sizes=(place.size,),
        arms=(place.arm,),
    )


class _Beyond(NamedTuple):
    """A place next to an edge that holds an optimum, and the seeds that are there at the edge. `place.seed` is 0."""

    place: Place
    seeds: tuple[int, ...]


def edge_blocks(sweep: SweepSettings, scores: Sequence[TaskScores], most: int) -> list[SweepBlock]:
    """One more learning rate, with all seeds that are there, wherever the best of a task is the lowest or highest.

    At most `most` cells; first the places where most tasks want more. A rate whose neighbour diverged is no edge. Of a
    task the score that is named first counts, as in verdicts: an accuracy at its floor has its best rate anywhere.
    """
    wanted = Counter(beyond for of_task in _first_scores(scores) for beyond in _edges(of_task))
    names, known = _free_names(sweep, EDGE), places(sweep)
    blocks = []
    for beyond in sorted(wanted, key=lambda one: (-wanted[one], one.place.name)):
        place, rate = beyond.place, beyond.place.log2_learning_rate
        new = tuple(seed for seed in beyond.seeds if place.model_copy(update={"seed": seed}) not in known)
        if not new or len(new) > most or not -MAX_EXPONENT <= rate < 0:
            continue
        most -= len(new)
        blocks.append(_one_place(next(names), place, new))
    return blocks


def _edges(of_task: TaskScores) -> Iterator[_Beyond]:
    cells = of_task.cells
    for optimum in find_optima(cells).optima:
        if optimum.flaw not in ("lowest rate", "highest rate"):
            continue
        is_here = (
            (cells.log2_batch == optimum.log2_batch)
            & (cells.log2_tokens == optimum.log2_tokens)
            & (cells.log2_size == optimum.log2_size)
            & ~cells.diverged
        )
        here = [of_task.of[number].place for number in np.flatnonzero(is_here)]
        rates = sorted({place.log2_learning_rate for place in here}, reverse=optimum.flaw == "highest rate")
        seeds = sorted(place.seed for place in here if place.log2_learning_rate == rates[0])
        if len(rates) > 1:
            following = round(2 * rates[0] - rates[1], 12)
            yield _Beyond(here[0].model_copy(update={"log2_learning_rate": following, "seed": 0}), tuple(seeds))
