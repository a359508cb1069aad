"""Planted surfaces: the optimum, its slopes and the account behind them are found again, or said not to be known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from smoltulu.tasks.surface.accounts import ACCOUNTS, Slopes, fit_slopes, identifies_nothing, pooled, verdicts
from smoltulu.tasks.surface.claim import (
    best_ratio,
    chosen_place,
    class_claim,
    nested_forms,
    permutation_test,
)
from smoltulu.tasks.surface.gaussian_process import gp_optimum
from smoltulu.tasks.surface.optimum import Cells, Optima, Optimum, find_optima, main_budget

NOISE_RATIO, DRIFT, ROOT, ALONE = ACCOUNTS
BATCHES = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
#: Budget -> its batch sizes, and its learning rates where they are not around the ridge.
DESIGN = {26.0: (BATCHES, np.arange(-16.0, -7)), 24.0: ((3.0, 5.0, 7.0), None), 28.0: ((3.0, 5.0, 7.0), None)}


def planted(
    alpha: float,
    gamma: float,
    draws: np.random.Generator,
    noise: float = 1.0,
    level: float = 3.0,
    center: float = -12.3,
    num_seeds: int = 3,
    num_items: int = 40,
    design: Any = None,
    diverges_above: float = np.inf,
) -> Cells:
    """One octave off the optimum costs 1, a seed's standard deviation is `noise`; seeds have levels, items too."""
    rows = []
    for tokens, (batches, rates) in (design or DESIGN).items():
        for batch in batches:
            best = center + alpha * (batch - 4.5) + gamma * (tokens - 26)
            grid = rates if rates is not None else np.arange(-2, 3) + np.round(best + draws.normal(0, 0.3))
            rows += [(u, batch, tokens, best, seed) for u in grid for seed in range(num_seeds)]
    u, batch, tokens, best, seed = np.array(rows).T
    levels = draws.normal(0, level, (40, 40, 10))[batch.astype(int), tokens.astype(int), seed.astype(int)]
    score = levels - (u - best) ** 2 + noise * draws.normal(size=len(u))
    items = score[:, None] + 0.5 * draws.normal(size=num_items) + 0.5 * draws.normal(size=(len(u), num_items))
    size = np.full(len(u), 27.0)
    return Cells(u, batch, tokens, size, seed.astype(int), u > diverges_above, items)


def slopes_of(cells: Cells) -> Slopes:
    return fit_slopes(find_optima(cells, num_resamples=200))


def test_without_noise_the_optimum_is_exact() -> None:
    cells = planted(0.5, -0.25, np.random.default_rng(0), noise=0.0)
    best = -12.3 + 0.5 * (cells.log2_batch - 4.5) - 0.25 * (cells.log2_tokens - 26)
    exact = Cells(**{**vars(cells), "items": -((cells.log2_lr - best) ** 2)[:, None] + np.array([[3.0, 1.0]])})
    found = find_optima(exact)
    for one in found.optima:
        assert one.log2_lr == pytest.approx(-12.3 + 0.5 * (one.log2_batch - 4.5) - 0.25 * (one.log2_tokens - 26))
        assert one.flaw == "" and one.num_seeds == 3
    assert found.curvature == pytest.approx(np.full(len(found.optima), -1.0))
    slopes = fit_slopes(found)
    assert slopes.names == ("alpha", "gamma")
    assert slopes.estimate == pytest.approx([0.5, -0.25])


@pytest.mark.parametrize("account", ACCOUNTS)
def test_each_account_gets_its_verdict(account: str) -> None:
    """At a noise where one octave off costs a seed's standard deviation; the full count is in benchmarks."""
    alpha, gamma = ACCOUNTS[account]
    draws = np.random.default_rng(7)
    words = [verdicts(slopes_of(planted(alpha, gamma, draws))) for _ in range(20)]
    assert sum(one[account] == "supported" for one in words) >= 16
    assert sum(one[account] == "excluded" for one in words) <= 2
    assert not any(one[other] == "supported" for one in words for other in ACCOUNTS if other != account)


def test_intervals_hold_what_was_planted() -> None:
    draws = np.random.default_rng(3)
    hits = np.zeros(2)
    for _ in range(60):
        slopes = slopes_of(planted(0.7, -0.4, draws))
        for position, (name, truth) in enumerate((("alpha", 0.7), ("gamma", -0.4))):
            low, high = slopes.interval(name)
            hits[position] += low <= truth <= high
    assert (hits >= 0.9 * 60).all()


def test_nothing_between_two_accounts_is_supported() -> None:
    draws = np.random.default_rng(5)
    for _ in range(10):
        words = verdicts(slopes_of(planted(0.75, 0.0, draws)))
        assert "supported" not in words.values()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"design": {26.0: DESIGN[26.0]}}, "one budget only"),
        ({"num_seeds": 1}, "1 of 3 seeds"),
        ({"num_seeds": 2}, "2 of 3 seeds"),
        ({"center": -18.0}, "add lower ones"),
        ({"center": -6.0}, "add higher ones"),
        ({"center": -8.6, "diverges_above": -9.5}, "did not diverge"),
        ({"design": {26.0: ((3.0, 5.0), np.arange(-16.0, -7)), 24.0: ((3.0, 5.0), None)}}, "2 batch sizes at most"),
        ({"noise": 20.0}, ""),
    ],
)
def test_what_the_grid_does_not_tell_is_not_identified(change: dict[str, Any], told: str) -> None:
    slopes = slopes_of(planted(0.0, 0.0, np.random.default_rng(1), **change))
    assert set(verdicts(slopes).values()) == {"not identified"}
    assert any(told in reason for reason in identifies_nothing(slopes))


def test_the_papers_two_settings_identify_nothing() -> None:
    """SFT 1130 and 1207: 9e-5 at batch 8 and 3.1e-6 at batch 32, one seed, one budget."""
    u = np.log2(np.array([9.0e-5, 3.1e-6]))
    cells = Cells(
        u,
        np.array([3.0, 5.0]),
        np.full(2, 30.0),
        np.full(2, 30.7),
        np.zeros(2, int),
        np.zeros(2, bool),
        np.ones((2, 4)),
    )
    slopes = slopes_of(cells)
    assert set(verdicts(slopes).values()) == {"not identified"}
    reasons = " ".join(identifies_nothing(slopes))
    assert "fewer than three rates" in reasons and "one budget only" in reasons and "1 of 3 seeds" in reasons


def test_a_rate_at_which_one_seed_diverged_is_never_the_best() -> None:
    cells = planted(0.0, 0.0, np.random.default_rng(2), center=-10.0)
    diverged = (cells.log2_lr == -10.0) & (cells.seed == 1)
    spoiled = Cells(**{**vars(cells), "diverged": diverged})
    assert chosen_place(spoiled, 26.0).log2_lr != -10.0
    nan_where_diverged = cells.items.copy()
    nan_where_diverged[diverged] = np.nan
    with_nan = Cells(**{**vars(spoiled), "items": nan_where_diverged})
    assert str(find_optima(with_nan).optima) == str(find_optima(spoiled).optima)


def test_a_seeds_own_level_moves_no_optimum() -> None:
    cells = planted(0.5, 0.0, np.random.default_rng(4))
    lifted = Cells(**{**vars(cells), "items": cells.items + 1000.0 * cells.seed[:, None]})
    before, after = find_optima(cells), find_optima(lifted)
    assert [one.log2_lr for one in after.optima] == pytest.approx([one.log2_lr for one in before.optima], abs=1e-8)


def only(cells: Cells, kept: Any) -> Cells:
    return Cells(**{name: column[kept] for name, column in vars(cells).items()})


def test_seeds_that_were_run_at_the_best_rate_only_change_no_optimum_and_no_error() -> None:
    """They say nothing about where the optimum is: not as seeds of the rule, nor in the resampling."""
    cells = planted(0.0, 0.0, np.random.default_rng(11), num_seeds=8)
    three = find_optima(only(cells, cells.seed < 3))
    more = find_optima(only(cells, (cells.seed < 3) | (cells.log2_lr == -12)))
    assert more.optima == three.optima and {one.num_seeds for one in more.optima} == {3}
    assert not identifies_nothing(fit_slopes(more))
    one = slopes_of(only(cells, (cells.seed < 1) | (cells.log2_lr == -12)))
    assert any("1 of 3 seeds" in reason for reason in identifies_nothing(one))


def test_a_seed_with_missing_cells_bends_no_parabola_the_other_way() -> None:
    cells = planted(0.0, 0.0, np.random.default_rng(12), num_seeds=2, noise=0.3)
    found = find_optima(only(cells, (cells.seed == 0) | (np.abs(cells.log2_lr + 12) <= 0.5) | (cells.log2_lr == -13)))
    assert {one.flaw for one in found.optima} == {""}


def test_places_with_a_single_seed_are_as_uncertain_as_one_seed_elsewhere() -> None:
    """Three batches with two seeds, and with one seed at a second budget: the intervals hold what was planted."""
    draws = np.random.default_rng(13)
    design = {20.0: ((3.0, 4.0, 5.0), np.arange(-15.0, -8)), 18.0: ((3.0, 4.0, 5.0), None)}
    hits = 0
    for _ in range(60):
        cells = planted(0.5, -0.3, draws, design=design)
        slopes = slopes_of(only(cells, (cells.seed < 2) & ((cells.log2_tokens == 20) | (cells.seed < 1))))
        low, high = slopes.interval("gamma")
        hits += low <= -0.3 <= high
    assert hits >= 0.9 * 60
    single = slopes_of(only(cells, cells.seed < 1))
    assert np.isnan(single.interval("gamma")).all()


def test_scores_without_noise_have_a_verdict() -> None:
    cells = planted(0.5, 0.0, np.random.default_rng(0), noise=0.0)
    best = -12.3 + 0.5 * (cells.log2_batch - 4.5)
    exact = Cells(**{**vars(cells), "items": -((cells.log2_lr - best) ** 2)[:, None]})
    words = verdicts(slopes_of(exact))
    assert {name for name, word in words.items() if word == "supported"} == {ROOT}
    assert [word for name, word in words.items() if name != ROOT] == ["excluded"] * 3


@pytest.mark.filterwarnings("error")
def test_scores_that_are_all_the_same_have_no_optimum_and_warn_of_nothing() -> None:
    """As accuracy at its floor in every cell of a sweep."""
    cells = planted(0.5, 0.0, np.random.default_rng(0))
    floor = Cells(**{**vars(cells), "items": np.zeros_like(cells.items)})
    found = find_optima(floor, num_resamples=20)
    assert {one.flaw for one in found.optima} == {"no optimum"}


def test_optima_that_lie_on_no_plane_have_the_degrees_of_freedom_of_their_scatter() -> None:
    off = [0.3, -0.6, 0.3, -0.3, 0.6, -0.3]
    optima = tuple(Optimum(3.0 + n % 3, 20.0 + n // 3, 27.0, -12 + off[n], 0.01, 3) for n in range(6))
    draws = np.random.default_rng(0)
    slopes = fit_slopes(Optima(optima, -1.0, 0.01 * draws.normal(size=(200, 6)), np.zeros((200, 6))))
    assert slopes.num_df == 6 - 3 and slopes.misfit < 1e-6
    assert slopes.stderr == pytest.approx(np.sqrt(np.sum(np.square(off)) / 3 * np.array([1 / 4, 4 / 6])), rel=0.3)


def test_tasks_stay_paired_where_one_lacks_a_seed_at_one_place() -> None:
    """Deviations of the places that both have are drawn alike: only so are they averaged over a class."""
    cells = planted(0.0, 0.0, np.random.default_rng(14), level=0.0)
    less = only(cells, (cells.log2_batch > 2) | (cells.seed < 1))
    both = zip(find_optima(cells).over_seeds.T, find_optima(less).over_seeds.T, strict=True)
    assert min(np.corrcoef(one, other)[0, 1] for one, other in list(both)[1:]) > 0.9


def test_the_main_budget_has_the_most_batch_sizes_then_lies_in_the_middle() -> None:
    def optima(*places: tuple[float, float]) -> list[Optimum]:
        return [Optimum(batch, tokens, 27.0, -12.0, 0.1, 3) for batch, tokens in places]

    assert main_budget(optima((3, 24), (3, 26), (3, 28), (3, 26))) == 26
    assert main_budget(optima((3, 24), (4, 24), (3, 26), (3, 28))) == 24


def test_a_class_is_the_mean_of_its_tasks_and_surer_than_one() -> None:
    draws = np.random.default_rng(8)
    tasks = [slopes_of(planted(0.5, 0.0, draws, noise=2.0)) for _ in range(4)]
    pool = pooled(tasks)
    assert pool.estimate == pytest.approx(np.mean([one.estimate for one in tasks], axis=0))
    assert (pool.stderr < np.mean([one.stderr for one in tasks], axis=0)).all()
    with pytest.raises(ValueError, match="at least one"):
        pooled([])


def test_permutation_test_by_hand() -> None:
    """Of the 70 divisions of eight tasks, two are as extreme as all four against all four."""
    assert permutation_test([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert np.isnan(permutation_test([1, 2], [3, 4]))
    assert permutation_test([1, 1, 1, 1], [1, 1, 1, 1]) == 1.0


def test_permutations_that_are_too_many_to_count_are_drawn() -> None:
    draws = np.random.default_rng(0)
    first, second = draws.normal(size=12), draws.normal(size=12)  # 2,704,156 divisions
    apart = permutation_test(first + 3, second - 3)
    assert 0 < apart < 1e-4
    shared = ttest_ind(first, second).pvalue
    assert permutation_test(first, second) == pytest.approx(shared, abs=0.02)


def test_class_claim() -> None:
    ratios = {"gsm8k": -10.0, "math": -10.5, "arc": -11.0, "bbh": -10.2, "piqa": -14.0, "hellaswag": -13.5,
              "chat": -14.4, "ifeval": -13.8, "lost": float("nan")}  # fmt: skip
    classes = {task: "reasoning" if position < 4 else "pattern" for position, task in enumerate(ratios)}
    (test,) = class_claim(ratios, classes)
    assert test.classes == ("pattern", "reasoning") and test.num_tasks == (4, 4)
    assert test.difference == pytest.approx(-13.925 + 10.425)
    assert test.p_value == test.adjusted == pytest.approx(2 / 70)
    with pytest.raises(ValueError, match="'arc' has no class"):
        class_claim(ratios, {})


def test_best_ratio_by_hand() -> None:
    found = find_optima(planted(0.0, 0.0, np.random.default_rng(6), noise=0.01))
    assert best_ratio(found) == pytest.approx(-12.3 - 4.5, abs=0.02)


def test_nested_forms_prefer_the_planted_one() -> None:
    for alpha, form in ((1.0, "LR / B"), (0.5, "LR / sqrt(B)"), (0.0, "LR")):
        cells = planted(alpha, 0.0, np.random.default_rng(9), noise=0.3, level=0.0)
        forms = {one.form: one for one in nested_forms(cells, find_optima(cells))}
        assert min(forms.values(), key=lambda one: one.bic).form == form
        assert forms[form].p_value > 0.001 and all(
            one.p_value < 1e-6 for one in forms.values() if one.form not in (form, "full")
        )


def test_nested_forms_need_more_cells_than_terms_and_know_sizes() -> None:
    cells = planted(0.5, 0.0, np.random.default_rng(10), noise=0.3, level=0.0, num_seeds=8)
    found = find_optima(cells)
    few = (cells.log2_tokens == 26) & (cells.log2_lr == -13) & (cells.log2_batch < 4)
    assert len(nested_forms(only(cells, few), found)) == 4  # 16 cells, 8 seeds and 5 terms
    assert nested_forms(only(cells, few & ((cells.log2_batch == 2) | (cells.seed < 4))), found) == []
    # A larger model that scores 50 more everywhere is another level, no misfit.
    larger = Cells(**{**vars(cells), "log2_size": cells.log2_size + 1, "items": cells.items + 50})
    both = Cells(**{name: np.concatenate([column, vars(larger)[name]]) for name, column in vars(cells).items()})
    forms = {one.form: one for one in nested_forms(both, find_optima(both))}
    assert min(forms.values(), key=lambda one: one.bic).form == "LR / sqrt(B)" and forms["LR"].p_value < 1e-6


def test_the_items_that_choose_do_not_report() -> None:
    """Two places that are equal but for luck: the choosing half likes the first, the reporting half the second."""
    items = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    one = np.zeros(2)
    cells = Cells(np.array([-10.0, -9.0]), one, one, one, one.astype(int), one.astype(bool), items)
    chosen = chosen_place(cells, 0.0)
    assert (chosen.log2_lr, chosen.score, chosen.regret) == (-10.0, 0.0, 1.0)


def test_a_place_with_fewer_seeds_than_the_others_is_not_chosen_by_its_luck() -> None:
    u, seed = np.repeat([-10.0, -9.0, -8.0], 3), np.tile(np.arange(3), 3)
    items = np.repeat(np.where(seed == 0, 3.0, 0.0) - (u + 9) ** 2, 4).reshape(9, 4)
    one = np.zeros(9)
    cells = only(Cells(u, one, one, one, seed, one.astype(bool), items), (u != -8) | (seed == 0))
    assert chosen_place(cells, 0.0).log2_lr == -9


def test_process_finds_the_optimum_of_a_lopsided_curve() -> None:
    u = np.repeat(np.arange(-16.0, -7), 3)
    draws = np.random.default_rng(0)
    y = -np.where(u < -11, 0.3 * (u + 11) ** 2, 2 * (u + 11) ** 2) + 0.05 * draws.normal(size=len(u))
    assert gp_optimum(u, y) == pytest.approx(-11.2, abs=0.4)
    with pytest.raises(ValueError, match="three learning rates"):
        gp_optimum(np.array([1.0, 1.0, 2.0]), np.zeros(3))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [("items", np.zeros((3, 0)), "num_cells, num_items"), ("seed", np.zeros(2, int), "num_cells, num_items"),
     ("items", np.array([[1.0], [np.nan], [0.0]]), "no number"), ("seed", np.array([0, 1, 1]), "same learning rate")],
)  # fmt: skip
def test_cells_refuse_what_is_no_grid(column: str, value: Any, told: str) -> None:
    zero = np.zeros(3)
    whole: dict[str, Any] = {
        "log2_lr": zero, "log2_batch": zero, "log2_tokens": zero, "log2_size": zero,
        "seed": np.arange(3), "diverged": zero.astype(bool), "items": np.ones((3, 2)),
    }  # fmt: skip
    Cells(**whole)
    with pytest.raises(ValueError, match=told):
        Cells(**{**whole, column: value})
