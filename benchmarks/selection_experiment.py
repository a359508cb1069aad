"""What `smoltulu sweep selection-tiny` found, beside the truth that no stage knows: which rows were useless.

    smoltulu sweep selection-tiny --store STORE
    python benchmarks/selection_experiment.py STORE

Prints, for every arm, the share of useful rows among those that it kept, skill by skill; how well its scores tell
useful from useless rows of a skill (the share of pairs that they put in the right order, ties as half; 0.5 is a guess);
and how often random rows differ from random rows: all pairs of runs, and groups of seeds as the verdict compares them.
`--simulate 3000` does the latter with made-up runs, without a store.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.extension import with_extension
from smoltulu.flows.sweeping.gather import Gathered, gather
from smoltulu.flows.sweeping.grid import load_sweep
from smoltulu.flows.sweeping.selection_results import experiment_of
from smoltulu.flows.sweeping.states import CellRecord, sweep_folder
from smoltulu.schemas.sweep import SweptTask
from smoltulu.tasks.comparison.paired import holm
from smoltulu.tasks.selection_experiment.compare import compare
from smoltulu.tasks.selection_experiment.verdict import ArmScores, groups_of_runs, pairs_of_runs, units
from smoltulu.tasks.world.skills import SKILLS

_NUM_DRAWS = 2000
_GROUPS = ((3, 5), (5, 5), (3, 3))


@dataclass(frozen=True)
class Fates:
    """Rows of a selection, (R,) each: their skill, whether they are useful and kept, and their scores (nan: none)."""

    skills: np.ndarray
    useful: np.ndarray
    kept: np.ndarray
    scores: np.ndarray


def fates_of(store: Path, cell: CellRecord) -> Fates | None:
    """Of the selection that a cell was trained on; None for one that took all rows."""
    import pyarrow.parquet as pq

    folder = _folder(store, cell.stage, cell.training)
    for _ in range(2):  # training <- tokenised rows <- selection
        record = read_manifest(folder).inputs["dataset"]
        folder = _folder(store, record.stage, record.key)
    if record.stage != "selection":
        return None
    table = pq.read_table(folder / "fates.parquet")
    truth = _truth(store, folder)
    sources = np.array(table["source"].to_pylist())
    numbers = [int(one.partition("#")[0].partition(":")[2]) for one in table["id"].to_pylist()]
    useful = [number not in truth[SKILLS[source]] for source, number in zip(sources, numbers, strict=True)]
    scores = np.array([np.nan if one is None else one for one in table["score"].to_pylist()])
    return Fates(sources, np.array(useful), np.array(table["kept"].to_pylist()), scores)


def _truth(store: Path, folder: Path) -> dict[str, set[int]]:
    """Skill -> numbers of its useless rows, from the world that the rows of a selection were read from."""
    record = read_manifest(folder).inputs["dataset"]
    while record.stage != "world":
        folder = _folder(store, record.stage, record.key)
        inputs = read_manifest(folder).inputs
        record = inputs.get("world") or inputs["dataset"]
    world = _folder(store, record.stage, record.key)
    return {skill: set(rows) for skill, rows in json.loads((world / "useless_rows.json").read_text()).items()}


def _folder(store: Path, stage: str, key: str) -> Path:
    folder = layout.key_path(store, stage, key)
    pointer = layout.read_pointer(folder)
    assert pointer is not None, f"{folder} was removed; run the sweep again"
    return folder / pointer.name


def in_right_order(scores: np.ndarray, useful: np.ndarray) -> float:
    """Share of pairs of a useful and a useless row of which the useful one scores more; ties are half."""
    able = ~np.isnan(scores)
    good, bad = scores[able & useful], scores[able & ~useful]
    pairs = good[:, None] - bad[None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def print_kept(found: Gathered) -> None:
    """The share of useful rows that each arm kept, and how well its scores tell them."""
    print("| arm | seeds | useful of kept | " + " | ".join(SKILLS) + " |")
    print("|---|---:|---:|" + "---:|" * len(SKILLS))
    orders = {}
    for arm, scores in found.scores.items():
        fates = [one for cell in scores[0].of if (one := fates_of(found.store_root, cell)) is not None]
        if not fates:
            continue
        of_skill = [np.mean([one.useful[one.kept & (one.skills == n)].mean() for one in fates]) for n in range(8)]
        whole = np.mean([one.useful[one.kept].mean() for one in fates])
        print(f"| {arm} | {len(fates)} | {whole:.1%} | " + " | ".join(f"{share:.0%}" for share in of_skill) + " |")
        if not np.isnan(fates[0].scores).all():
            orders[arm] = [in_right_order(*(part[fates[0].skills == n] for part in (fates[0].scores, fates[0].useful)))
                           for n in range(8)]  # fmt: skip
    print("\n| arm | " + " | ".join(SKILLS) + " |\n|---|" + "---:|" * len(SKILLS))
    for arm, values in orders.items():
        print(f"| {arm} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


def print_null(found: Gathered) -> None:
    """How often random rows differ from random rows."""
    roles = found.sweep.selection
    assert roles is not None
    classes = units(found.sweep.tasks)
    main = max({cell.place.max_tokens for cell in found.cells if cell.place.arm == roles.random})
    scores = found.scores[roles.random]
    here = [number for number, cell in enumerate(scores[0].of) if cell.place.max_tokens == main]
    runs = ArmScores({one.task: one.cells.items[here] for one in scores})
    pairs = pairs_of_runs(runs, classes)
    print(f"\n{pairs.num_found} of {pairs.num_pairs} pairs of {pairs.num_runs} runs differ: {pairs.share:.1%}")
    for sizes in _GROUPS:
        share = groups_of_runs(runs, classes, sizes, _NUM_DRAWS, 0).share
        print(f"{sizes[0]} against {sizes[1]} of them, {_NUM_DRAWS:,} draws: {share:.1%}")


def simulate(num: int) -> None:
    """The rule on made-up runs of two classes without any effect: items differ most, then seeds, then answers."""
    tasks = [
        SweptTask.model_validate({"task": f"t{n}", "metric": "acc,none", "task_class": name})
        for n, name in enumerate(("one", "one", "two"))
    ]
    classes = units(tasks)
    for sizes in _GROUPS:
        draws = np.random.default_rng(11)
        found = 0
        for _ in range(num):
            sides = [
                {task: draws.normal(0, 0.1, (size, 1)) + draws.normal(0, 0.3, (size, 40)) for task in tasks}
                for size in sizes
            ]
            p_values = [
                compare(*([side[task] for task in own] for side in sides)).p_value  # type: ignore[arg-type]
                for own in classes.values()
            ]
            found += min(holm(p_values)) < 0.05
        print(f"{sizes[0]} against {sizes[1]} seeds: a difference in {found / num:.1%} of {num:,} experiments")


def simulate_one_draw(num: int) -> None:
    """As `simulate`, but which rows were drawn moves runs too, and the first arm has the same rows in every run.

    That is a selector which knows nothing: its rows are one random draw, against draws anew.
    """
    for sizes in _GROUPS:
        for spread in (0.05, 0.1):
            draws = np.random.default_rng(12)
            found = 0
            for _ in range(num):
                p_values = []
                for num_tasks in (2, 1):
                    sides = [
                        [
                            draws.normal(0, spread, (size if anew else 1, 1))
                            + draws.normal(0, 0.1, (size, 1))
                            + draws.normal(0, 0.3, (size, 40))
                            for _ in range(num_tasks)
                        ]
                        for size, anew in zip(sizes, (False, True), strict=True)
                    ]
                    p_values.append(compare(*sides, is_one_draw=True).p_value)
                found += min(holm(p_values)) < 0.05
            print(f"one draw of {sizes[0]} seeds against {sizes[1]} draws, which spread {spread / 0.1:g} times as much "
                  f"as seeds: {found / num:.1%} of {num:,}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="store that the sweep was run in")
    parser.add_argument("--sweep", default="selection-tiny")
    parser.add_argument("--simulate", type=int, default=0)
    options = parser.parse_args()
    if options.simulate:
        simulate(options.simulate)
        simulate_one_draw(options.simulate)
    if options.store is None:
        return
    store = options.store.absolute()
    sweep = with_extension(load_sweep(options.sweep), sweep_folder(store, options.sweep))
    found = gather(sweep, store)
    print("\n".join(experiment_of(found).lines()), end="\n\n")
    print_kept(found)
    print_null(found)


if __name__ == "__main__":
    main()
