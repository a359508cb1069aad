"""Sweeps over learning rate and batch size, measured: `python benchmarks/surface.py PART`.

power       what the analysis says of surfaces whose truth is known (below)
speed       cells per hour of `surface-tiny` beside loops over TRL (surface_speed.py); on a quiet machine
slice-135m  three cells of `surface-135m-short` on the real model, a CPU and minutes; variables as in recipe `real-135m`
toy         two metrics that want rates octaves apart, again (surface_toy.py); goes on where it was stopped

Of `power`: planted are scores that lose 1 at one octave off the optimum, with `noise` a seed's standard deviation in
the same unit, on the grid of the preset `surface-135m`: 9 learning rates x 6 batches x 3 seeds, and two more budgets
with 5 rates around the ridge x 3 batches. Printed is how often each word is spoken, how often it is false, and how
often the 95 % intervals hold the truth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from smoltulu.tasks.surface.accounts import ACCOUNTS, TOLERANCE, fit_slopes, verdicts
from smoltulu.tasks.surface.optimum import Cells, find_optima

Floats = NDArray[np.float64]
BATCHES = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
RATES = np.arange(-16.0, -7)
NUM_ITEMS, NUM_RESAMPLES = 20, 200


@dataclass(frozen=True)
class World:
    """A truth, and what is measured of it.

    loss        score that is lost at so many octaves off the optimum, at a budget
    scatter     standard deviation of the optima about the plane, octaves
    budgets     log2 tokens -> batch sizes; the first has all rates, the others 5 around the ridge
    keep        which cells are there
    """

    name: str
    alpha: float
    gamma: float
    noise: float = 1.0
    loss: Callable[[Floats, Floats], Floats] = lambda x, tokens: x**2
    scatter: float = 0.0
    num_seeds: int = 3
    center: float = -12.3
    budgets: dict[float, tuple[float, ...]] = field(
        default_factory=lambda: {26.0: BATCHES, 24.0: (3.0, 5.0, 7.0), 28.0: (3.0, 5.0, 7.0)}
    )
    keep: Callable[..., Any] | None = None

    def cells(self, draws: np.random.Generator) -> Cells:
        """One world: seeds have levels, items too."""
        rows = []
        for number, (tokens, batches) in enumerate(self.budgets.items()):
            for batch in batches:
                best = self.center + self.alpha * (batch - 4.5) + self.gamma * (tokens - 26)
                best += self.scatter * draws.normal()
                rates = np.arange(-2, 3) + np.round(best + draws.normal(0, 0.3)) if number else RATES
                rows += [(u, batch, tokens, best, seed) for u in rates for seed in range(self.num_seeds)]
        u, batch, tokens, best, seed = np.array(rows).T
        levels = draws.normal(0, 3, (40, 40, 10))[batch.astype(int), tokens.astype(int), seed.astype(int)]
        score = levels - self.loss(u - best, tokens) + self.noise * draws.normal(size=len(u))
        items = score[:, None] + 0.5 * draws.normal(size=NUM_ITEMS) + 0.5 * draws.normal(size=(len(u), NUM_ITEMS))
        made = [u, batch, tokens, np.full(len(u), 27.0), seed.astype(int), np.zeros(len(u), bool), items]
        if self.keep is not None:
            there = self.keep(draws, u, best, seed)
            made = [column[there] for column in made]
        return Cells(*made)


def _lopsided(x: Floats, tokens: Floats) -> Floats:
    return np.where(x < 0, 0.6, 1.6) * x**2


def _flatter(x: Floats, tokens: Floats) -> Floats:
    return 2 ** ((tokens - 26) / 4) * x**2  # half as steep at a quarter of the tokens, twice at four times


def worlds() -> Iterator[World]:
    """Every account at two noises, truths between accounts, shapes that no parabola has, grids that tell nothing."""
    for noise in (1.0, 2.0):
        for name, (alpha, gamma) in ACCOUNTS.items():
            yield World(f"{name.partition(':')[0]}, noise {noise:g}", alpha, gamma, noise)
    for alpha, gamma in ((0.75, 0.0), (0.25, 0.0), (1.0, -0.5), (0.5, -0.25)):
        yield World(f"between: {alpha:g}, {gamma:g}", alpha, gamma)
    yield World("lopsided", 0.5, 0.0, loss=_lopsided)
    yield World("flatter at small budgets", 0.5, 0.0, loss=_flatter)
    yield World("optima scatter by 0.3", 0.5, 0.0, scatter=0.3)
    yield World("a fifth of the cells missing", 0.5, 0.0, keep=lambda draws, u, *_: draws.random(len(u)) > 0.2)
    yield World(
        "five more seeds at the best rate only", 0.5, 0.0, num_seeds=8,
        keep=lambda draws, u, best, seed: (seed < 3) | (np.abs(u - best) <= 0.5),
    )  # fmt: skip
    yield World("one budget", 1.0, 0.0, budgets={26.0: BATCHES})
    yield World("one seed", 1.0, 0.0, num_seeds=1)
    yield World("ridge below the grid", 0.0, 0.0, center=-17.5)


def power(num_worlds: int, only: str) -> None:
    """Print a row for every world."""
    print("| truth | holds α | holds γ | standard error α, γ | supported | excluded | not identified | false |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for number, world in enumerate(worlds()):
        if only not in world.name:
            continue
        draws = np.random.default_rng([14, number])
        held, errors, spoken, num_false = [], [], Counter[str](), 0
        for _ in range(num_worlds):
            slopes = fit_slopes(find_optima(world.cells(draws), NUM_RESAMPLES))
            words = verdicts(slopes)
            if {"alpha", "gamma"} <= set(slopes.names):
                truth = ((slopes.interval(name), true) for name, true in _truth(world))
                held.append([low <= true <= high if np.isfinite(low) else np.nan for (low, high), true in truth])
                errors.append(slopes.stderr)
            near = [name for name, point in ACCOUNTS.items() if _is_within(world, point)]
            true = [name for name, point in ACCOUNTS.items() if point == (world.alpha, world.gamma)]
            spoken.update(words[name] for name in true or ACCOUNTS)
            num_false += any(
                word == ("excluded" if name in true else "supported" if name not in near else "")
                for name, word in words.items()
            )
        print(_row(world, held, errors, spoken, num_false, num_worlds), flush=True)


def _truth(world: World) -> tuple[tuple[str, float], ...]:
    return ("alpha", world.alpha), ("gamma", world.gamma)


def _is_within(world: World, point: tuple[float, float]) -> bool:
    return max(abs(world.alpha - point[0]), abs(world.gamma - point[1])) <= TOLERANCE


def _row(world: World, held: list, errors: list, spoken: Counter, num_false: int, num_worlds: int) -> str:
    """Shares of the word of the true account; of all accounts where none is true."""
    shares = [f"{spoken[word] / spoken.total():.1%}" for word in ("supported", "excluded", "not identified")]
    of_slopes = ["-", "-", "-"]
    if held and np.isfinite(np.array(held)).any():
        covered, middle = np.nanmean(held, axis=0), np.nanmedian(errors, axis=0)
        of_slopes = [f"{covered[0]:.1%}", f"{covered[1]:.1%}", ", ".join(f"{one:.3f}" for one in middle)]
    return f"| {world.name} | {' | '.join(of_slopes + shares)} | {num_false / num_worlds:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["power", "speed", "slice-135m", "toy"])
    parser.add_argument("--folder", type=Path, default=Path("surface-benchmark"), help="store and runs, kept")
    parser.add_argument("--worlds", type=int, default=500, help="power: simulations of each truth")
    parser.add_argument("--only", default="", help="power: truths whose name holds this")
    parser.add_argument("--rates", type=int, default=3, help="speed: learning rates, four cells each")
    parser.add_argument("--workers", type=int, default=2, help="toy: runs at a time")
    parser.add_argument("--minutes", type=float, default=60.0, help="toy: start no run after so many")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.part == "power":
        began = time.process_time()
        power(given.worlds, given.only)
        print(f"{time.process_time() - began:.0f} s of CPU")
    elif given.part == "speed":
        from benchmarks.surface_speed import speed

        speed(folder, given.rates)
    elif given.part == "slice-135m":
        from benchmarks.surface_speed import slice_135m

        slice_135m(folder)
    else:
        from benchmarks.surface_toy import toy

        toy(folder / "toy", given.workers, given.minutes)


if __name__ == "__main__":
    main()
