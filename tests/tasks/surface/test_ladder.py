"""Planted ladders: the best rate of a larger model is found from smaller ones, with its interval; or it is not told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smoltulu.tasks.surface.ladder import STEP_LAW, confirm, growth, predict, step_law_batch
from smoltulu.tasks.surface.optimum import Cells, Optima, Optimum, find_optima

SIZES, BATCHES, BUDGETS = (20.0, 22.0, 24.0), (3.0, 5.0), (20.0, 22.0)
TARGET = (4.0, 23.0, 27.0)
ALPHA, GAMMA, DELTA, AT_ZERO = 0.5, -0.25, -0.4, 2.0


def truth(batch: float, tokens: float, size: float) -> float:
    return AT_ZERO + ALPHA * batch + GAMMA * tokens + DELTA * size


def exact(places: list[tuple[float, float, float]], scatter: Any = 0.0, flaw: Any = "") -> Optima:
    """Optima without noise of seeds, three seeds each."""
    optima = tuple(
        Optimum(batch, tokens, size, truth(batch, tokens, size) + one, 0.0, 3, flaw)
        for (batch, tokens, size), one in zip(places, np.broadcast_to(scatter, len(places)), strict=True)
    )
    return Optima(optima, -1.0, np.zeros((50, len(places))), np.zeros((50, len(places))))


def grid(sizes: Any = SIZES, batches: Any = BATCHES, budgets: Any = BUDGETS) -> list[tuple[float, float, float]]:
    return [(b, t, n) for n in sizes for t in budgets for b in batches]


def test_a_line_is_followed_exactly() -> None:
    found = predict(exact(grid()), *TARGET)
    assert found.log2_lr == pytest.approx(2 + 0.5 * 4 - 0.25 * 23 - 0.4 * 27)  # -12.55
    assert found.log2_lr == pytest.approx(-12.55)
    assert found.slopes == pytest.approx((ALPHA, GAMMA, DELTA))
    assert (found.num_optima, found.num_spare, found.problems) == (12, 8, ())
    assert found.high - found.low == pytest.approx(0, abs=1e-6)


def test_extrapolation_by_hand() -> None:
    """Sizes 0, 1, 2 with optima 0, 1, 1 (one batch, one budget), the target at size 4.

    Slope 1/2, mean 2/3, so 2/3 + (4 - 1) / 2 = 13/6. Rests -1/6, 1/3, -1/6: sum of squares 1/6, one to spare.
    Weights of the prediction: 1/3 + (4 - 1) (n - 1) / 2 = -7/6, 1/3, 11/6: sum of squares 4.8333. t(1, .975) = 12.7062.
    """
    optima = tuple(Optimum(3, 20, size, u, 0.0, 1) for size, u in ((0, 0), (1, 1), (2, 1)))
    found = predict(Optima(optima, -1.0, np.zeros((50, 3)), np.zeros((50, 3))), 3, 20, 4)
    assert found.log2_lr == pytest.approx(13 / 6)
    assert found.high - found.log2_lr == pytest.approx(12.7062 * np.sqrt(1 / 6 * (1 + 4.8333)), rel=1e-4)
    assert found.slopes[2] == pytest.approx(0.5) and np.isnan(found.slopes[:2]).all()


def test_the_wider_of_two_errors_counts() -> None:
    """Two sizes at one place: only seeds tell an error. Weights at size 2 of sizes 0 and 1: -1 and 2."""
    draws = np.random.default_rng(0)
    over_seeds = draws.normal(0, 0.1, (20_000, 2))
    optima = tuple(Optimum(3, 20, size, 0.0, 0.1, 3) for size in (0.0, 1.0))
    found = predict(Optima(optima, -1.0, over_seeds, np.zeros((20_000, 2))), 3, 20, 2)
    # variance 0.01 (1 + 4); four degrees of freedom: 2.7764
    assert found.high - found.log2_lr == pytest.approx(2.7764 * np.sqrt(0.05), rel=0.02)
    assert any("nothing tells whether it is a line" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (grid(sizes=(20.0,)), r"all usable optima have size 2\^20 and the target has 2\^27"),
        (grid(batches=(3.0,)), r"batch size 2\^3 and the target has 2\^4: .* add a second one to the proxies"),
        (grid(budgets=(20.0,)), r"have budget 2\^20 and the target has 2\^23"),
        ([(3.0, n, n) for n in SIZES] + [(5.0, n, n) for n in SIZES], "change together and not as the target's do"),
    ],
)
def test_what_was_not_varied_is_not_predicted(places: Any, told: str) -> None:
    found = predict(exact(places), *TARGET)
    assert np.isnan(found.log2_lr)
    with pytest.raises(ValueError, match=told):
        raise ValueError("; ".join(found.problems))


def test_tokens_that_grow_with_size_predict_a_target_that_does_the_same() -> None:
    """20 tokens a parameter everywhere: gamma and delta are not known apart, and need not be."""
    places = [(batch, size + np.log2(20), size) for size in SIZES for batch in BATCHES]
    found = predict(exact(places), 4.0, 27 + np.log2(20), 27.0)
    assert found.log2_lr == pytest.approx(truth(4.0, 27 + np.log2(20), 27.0))
    assert np.isnan(found.slopes[1:]).all() and found.slopes[0] == pytest.approx(ALPHA)


def test_optima_at_edges_are_left_out_and_named() -> None:
    good, bad = exact(grid()), exact(grid(sizes=(25.0,)), 3.0, "highest rate")
    both = Optima((*good.optima, *bad.optima), -1.0, np.zeros((50, 16)), np.zeros((50, 16)))
    found = predict(both, *TARGET)
    assert found.log2_lr == pytest.approx(truth(*TARGET)) and found.num_optima == 12
    assert len(found.problems) == 4 and "highest rate; extend the grid" in found.problems[0]
    none = predict(bad, *TARGET)
    assert np.isnan(none.log2_lr) and none.problems[-1] == "no proxy has a usable optimum"


def planted(draws: np.random.Generator, scatter: float, noise: float = 1.0, num_seeds: int = 3) -> Cells:
    """One octave off an optimum costs 1; seeds and items have levels."""
    rows = []
    for size in SIZES:
        for batch in (3.0, 5.0, 7.0):
            best = truth(batch, 22.0, size) + scatter * draws.normal()
            rates = np.arange(-2, 3) + np.round(best + draws.normal(0, 0.3))
            rows += [(u, batch, size, best, seed) for u in rates for seed in range(num_seeds)]
    u, batch, size, best, seed = np.array(rows).T
    levels = draws.normal(0, 3, (40, 40, 10))[batch.astype(int), size.astype(int), seed.astype(int)]
    score = levels - (u - best) ** 2 + noise * draws.normal(size=len(u))
    items = score[:, None] + 0.5 * draws.normal(size=20) + 0.5 * draws.normal(size=(len(u), 20))
    return Cells(u, batch, np.full(len(u), 22.0), size, seed.astype(int), np.zeros(len(u), bool), items)


@pytest.mark.parametrize("scatter", [0.0, 0.3])
def test_planted_ladders_are_recovered(scatter: float) -> None:
    """Bias and coverage; 500 worlds are in `benchmarks/ladder.py intervals`."""
    draws, errors, num_held = np.random.default_rng(5), [], 0
    for _ in range(60):
        found = predict(find_optima(planted(draws, scatter), num_resamples=100), 5.0, 22.0, 26.0)
        wanted = truth(5.0, 22.0, 26.0) + scatter * draws.normal()
        errors.append(found.log2_lr - wanted)
        num_held += found.low <= wanted <= found.high
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(60)
    assert num_held >= 52


def target_cells(means: dict[float, list[float]], num_seeds: int = 1, diverged: Any = ()) -> Cells:
    """Octaves from a prediction of 2^-9 -> score of every item."""
    rows = [(octave, seed) for octave in means for seed in range(num_seeds)]
    octave, seed = np.array(rows).T
    same = np.full(len(rows), 5.0)
    items = np.array([means[one] for one in octave])
    return Cells(octave - 9, same, same, same, seed.astype(int), np.isin(octave, diverged), items)


def test_regret_by_hand() -> None:
    """Items 0 and 2 choose the rate, items 1 and 3 report: 2x is best by (3 + 5), and better by (1 + 3) / 2 there."""
    found = confirm(target_cells({-1.0: [0, 0, 0, 0], 0.0: [2, 1, 2, 1], 1.0: [3, 2, 5, 4]}), -9.0)
    assert (found.octaves, found.best, found.is_edge) == ((-1.0, 0.0, 1.0), 1.0, True)
    assert found.regret == pytest.approx(2.0)
    assert found.regret_stderr == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))
    assert found.means == pytest.approx((0.0, 1.5, 3.5))
    assert np.isnan(found.optimum)  # 0, 1.5, 3.5 bends upwards


def test_a_prediction_that_is_the_best_has_no_regret() -> None:
    """Means -1, 0, -2: the parabola -1.5 x² - 0.5 x is highest at -1/6."""
    found = confirm(target_cells({-1.0: [-1] * 4, 0.0: [0] * 4, 1.0: [-2] * 4}, num_seeds=2), -9.0)
    assert (found.best, found.regret, found.regret_stderr, found.is_edge) == (0.0, 0.0, 0.0, False)
    assert found.optimum == pytest.approx(-1 / 6)


def test_a_prediction_that_diverges_costs_everything() -> None:
    found = confirm(target_cells({-1.0: [1, 1], 0.0: [np.nan] * 2, 1.0: [np.nan] * 2}, diverged=(0.0, 1.0)), -9.0)
    assert found.regret == np.inf and found.best == -1.0 and found.means == (1.0, -np.inf, -np.inf)


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (target_cells({-1.0: [1, 1], 1.0: [1, 1]}), "no cell has the predicted rate"),
        (target_cells({0.0: [1]}), "at least two"),
        (target_cells({0.0: [np.nan] * 2}, diverged=(0.0,)), "every rate of the confirmation diverged"),
    ],
)
def test_what_is_no_confirmation(cells: Cells, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        confirm(cells, -9.0)


def test_growth_with_width_by_hand() -> None:
    """One layer doubles with every octave, one stays, one halves every second octave."""
    slopes = growth((32, 64, 128), np.array([[1.0, 3.0, 4.0], [2.0, 3.0, 2.8284271], [4.0, 3.0, 2.0]]))
    assert slopes == pytest.approx([1.0, 0.0, -0.5])
    with pytest.raises(ValueError, match="give at least two"):
        growth((32, 32), np.ones((2, 1)))


def test_step_law_by_hand() -> None:
    """log10: .25285 - .713 * 9 + .307 * 11 = -2.78715 and -.23657 + .571 * 11 = 6.04443."""
    assert STEP_LAW.learning_rate(1e9, 1e11) == pytest.approx(10**-2.78715, rel=1e-4)
    assert step_law_batch(1e11) == pytest.approx(10**6.04443, rel=1e-4)
