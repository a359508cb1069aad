"""What the figures of a sweep show, what is chosen, and what is said, by hand; and surfaces of odd shapes."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.sweep import SweptTask
from smoltulu.tasks.surface import figures, words
from smoltulu.tasks.surface.accounts import ACCOUNTS
from smoltulu.tasks.surface.analysis import Analysis, analyse, place_means
from smoltulu.tasks.surface.choice import choose, only, share_out, together
from smoltulu.tasks.surface.optimum import Cells, find_optima
from smoltulu.tasks.surface.panels import arms_of, is_drawable, panels_of, paper_panels
from smoltulu.tasks.surface.turning import turning_page

RATES, BATCHES = np.arange(-14.0, -9), (3.0, 4.0, 5.0)


def task(name: str = "gsm8k", **changes: Any) -> SweptTask:
    values = {"task": name, "metric": "acc,none", "task_class": "reasoning"}
    return SweptTask.model_validate(values | changes)


def grid(
    alpha: float = 0.5,
    seeds: int = 3,
    tokens: tuple[float, ...] = (16.0, 18.0),
    noise: float = 0.01,
    shift: float = 0.0,
    num_items: int = 6,
    size: float = 20.0,
) -> Cells:
    """Scores 1 - 0.1 (octaves off)², with the best rate at -12 + alpha (log2 batch - 4)."""
    rows = [(u, b, t, s) for t in tokens for b in BATCHES for u in RATES for s in range(seeds)]
    u, batch, budget, seed = np.array(rows).T
    score = 1 - 0.1 * (u + 12 - shift - alpha * (batch - 4)) ** 2
    draws = np.random.default_rng(3)
    items = score[:, None] + np.linspace(-0.2, 0.2, num_items) + noise * draws.normal(size=(len(u), num_items))
    return Cells(u, batch, budget, np.full(len(u), size), seed.astype(int), np.zeros(len(u), bool), items)


def diverged(cells: Cells, where: Any) -> Cells:
    items = cells.items.copy()
    items[where] = np.nan
    return Cells(**{**vars(cells), "diverged": where, "items": items})


def test_a_panel_holds_the_means_of_its_places() -> None:
    cells = diverged(grid(), grid().log2_lr == -10)
    (one,) = analyse("main", [(task(), cells)]).tasks
    made = panels_of(one, "main")
    assert [panel.log2_tokens for panel in made.panels] == [16, 18]
    panel = made.panels[0]
    assert len(panel.score) == 4 * 3 and set(panel.num_seeds) == {3} and len(panel.runs) == 36
    assert panel.diverged.tolist() == [[3, -10], [4, -10], [5, -10]]
    at = (panel.log2_batch == 4) & (panel.log2_lr == -12)
    here = (cells.log2_tokens == 16) & (cells.log2_batch == 4) & (cells.log2_lr == -12)
    assert panel.score[at] == pytest.approx([cells.items[here].mean()])
    assert [point.log2_lr for point in panel.ridge] == pytest.approx([-12.5, -12.0, -11.5], abs=0.2)
    assert all(point.low < point.log2_lr < point.high for point in panel.ridge)
    assert [point.check for point in panel.ridge] == pytest.approx([-12.5, -12.0, -11.5], abs=0.35)


def test_a_slice_has_standard_errors_over_seeds_and_its_parabola() -> None:
    cells = grid(noise=0.0)
    cells = Cells(**{**vars(cells), "items": cells.items + np.array([-0.1, 0.0, 0.1])[cells.seed][:, None]})
    (one,) = analyse("main", [(task(), cells)]).tasks
    middle = panels_of(one, "main").panels[0].slices[1]
    assert middle.log2_batch == 4 and middle.log2_lr.tolist() == RATES.tolist()
    assert middle.mean == pytest.approx(1 - 0.1 * (RATES + 12) ** 2)
    assert middle.stderr == pytest.approx(np.full(5, 0.1 / math.sqrt(3)))
    assert np.interp([-13, -12], middle.curve_lr, middle.curve) == pytest.approx([0.9, 1.0], abs=1e-6)


def test_scores_that_are_better_when_lower_are_shown_as_they_are_spelt() -> None:
    cells = grid()
    bits = Cells(**{**vars(cells), "items": cells.items - 3})  # larger is better there: -bits
    (one,) = analyse("main", [(task(metric="bits_per_byte,none", lower_is_better=True), bits)]).tasks
    panels = panels_of(one, "main")
    assert panels.name == "gsm8k, bits_per_byte"
    assert panels.panels[0].score.min() == pytest.approx(2.0, abs=0.05)
    # The worst tenth lies above the scale, the best is its end.
    assert panels.low == min(panel.score.min() for panel in panels.panels)
    assert panels.high < max(panel.score.max() for panel in panels.panels)


def test_the_papers_figure_shows_accuracy_where_it_was_measured() -> None:
    bits = task(metric="bits_per_byte,none", lower_is_better=True)
    other = task("piqa", metric="bits_per_byte,none", lower_is_better=True, task_class="pattern")
    cells = grid(tokens=(16.0,))
    analysis = analyse("main", [(bits, cells), (task(), cells), (other, cells)])
    shown = [(panels.name, panel.log2_tokens) for panels, panel in paper_panels(analysis)]
    assert shown == [("gsm8k, acc", 16), ("piqa, bits_per_byte", 16)]
    assert [one.task.metric for one in analysis.units] == ["bits_per_byte,none", "bits_per_byte,none"]


def drawing(cells: Cells, **changes: Any) -> str:
    (one,) = analyse("main", [(task(**changes), cells)]).tasks
    panels = panels_of(one, "main")
    return figures.pages([figures.surface(panels, panels.panels[0], figures.Labels())])[0][0]


def marks(text: str, group: str) -> int:
    """Marks of a group of a drawing."""
    found = re.search(rf'<g id="{group}">(.*?)\n   </g>', text, re.DOTALL)
    return len(re.findall(r"<use ", found[1])) if found else 0


def test_a_drawing_shows_every_place_what_diverged_and_the_edge() -> None:
    cells = grid(alpha=0.0, tokens=(16.0,))
    cells = diverged(cells, cells.log2_lr == -10)
    text = drawing(cells)
    assert marks(text, "runs") == 12 and text.count('id="diverged-') == 3
    assert marks(text, "process") == 3
    assert all(f'id="{name}"' in text for name in ("ridge", "ridge-95", "iso-1", "iso-0.5"))
    assert "log2 learning rate" in text and "log2 batch (rows a step)" in text and "65.5k tokens" in text
    low = drawing(grid(tokens=(16.0,), shift=-5.0))
    assert 'id="flag"' in low and 'id="flag"' not in text and 'id="ridge"' not in low


def test_a_drawing_loads_nothing_and_is_the_same_each_time() -> None:
    cells = grid(tokens=(16.0,))
    text = drawing(cells)
    assert text == drawing(cells)
    assert "<metadata" not in text and not re.search(r'(?:href|src)="(?!#)', text) and "url(http" not in text
    assert text.startswith("<svg") and not re.search(r'<svg[^>]* width="', text) and "viewBox" in text
    (one,) = analyse("main", [(task(), cells)]).tasks
    panels = panels_of(one, "main")
    draw = figures.slices(panels, panels.panels[0], figures.Labels())
    assert figures.pages([draw])[1] == figures.pages([draw])[1]
    assert figures.sheet([draw, draw]) == figures.sheet([draw, draw])


@pytest.mark.parametrize("name", ["<b>x</b>", "$\\frac$", "a & b", "x\x1b[31m", "$x$", "é" * 150, "‮abc"])
def test_names_are_shown_as_text(name: str) -> None:
    text = drawing(grid(tokens=(16.0,)), task=name)
    assert "<b>" not in text and "\x1b" not in text and "‮" not in text
    assert "<svg" in text


def test_the_process_sees_no_levels_of_seeds() -> None:
    cells = grid(noise=0.0)
    lifted = Cells(**{**vars(cells), "items": cells.items + 5.0 * cells.seed[:, None]})
    # One seed lacks the lower rates: its level must not look like a slope.
    less = only(lifted, (lifted.seed < 2) | (lifted.log2_lr >= -12))
    for with_levels, without in ((lifted, cells), (less, only(cells, (cells.seed < 2) | (cells.log2_lr >= -12)))):
        one, other = (analyse("main", [(task(), each)]).tasks[0] for each in (with_levels, without))
        assert one.checks == pytest.approx(other.checks)


def test_curvature_of_a_budget_is_its_own() -> None:
    """Half as steep at the small budget: both optima are exact, as no curvature is shared."""
    cells = grid(noise=0.0)
    best = -12 + 0.5 * (cells.log2_batch - 4)
    bend = np.where(cells.log2_tokens == 16, -0.05, -0.1)
    found = find_optima(Cells(**{**vars(cells), "items": (bend * (cells.log2_lr - best) ** 2)[:, None]}))
    assert [one.log2_lr for one in found.optima] == pytest.approx(
        [-12 + 0.5 * (one.log2_batch - 4) for one in found.optima]
    )
    expected = [-0.05 if one.log2_tokens == 16 else -0.1 for one in found.optima]
    assert found.curvature == pytest.approx(expected)


def test_budgets_share_their_curvature_where_noise_explains_the_difference() -> None:
    """Of two equal curvatures the variance between is at most its expectation in 68 % of worlds: then it is shared."""
    draws = np.random.default_rng(4)
    num_shared = 0
    for _ in range(30):
        cells = grid()
        noisy = cells.items + 0.05 * draws.normal(size=(len(cells.items), 1))
        found = find_optima(Cells(**{**vars(cells), "items": noisy}), num_resamples=2)
        num_shared += np.ptp(found.curvature) < 1e-12
    assert 14 <= num_shared <= 26


def test_tasks_together_are_the_sum_of_their_means() -> None:
    first, second = grid(num_items=6), grid(num_items=3, shift=1.0)
    both = together([first, second], [2.0, 0.5])
    expected = 2.0 * first.items.mean(axis=1) + 0.5 * second.items.mean(axis=1)
    assert both.items.mean(axis=1) == pytest.approx(expected)


def analysed(**shifts: float) -> Analysis:
    scores = [
        (task(name, task_class="pattern" if shift else "reasoning"), grid(shift=shift))
        for name, shift in shifts.items()
    ]
    return analyse("main", scores)


def test_weights_are_shared_out_over_tasks() -> None:
    analysis = analysed(a=0.0, b=0.0, c=1.0)

    def shares(**weights: float) -> dict[str, float]:
        return {one.task.task: share for one, share in share_out(analysis.tasks, analysis.units, weights)}

    assert shares(reasoning=1.0) == {"a": 0.5, "b": 0.5}
    assert shares(reasoning=1.0, a=1.0, c=2.0) == {"a": 0.375, "b": 0.125, "c": 0.5}
    assert [share for _, share in share_out(analysis.tasks, analysis.units, {"c:acc,none": 3.0})] == [1.0]
    for weights, told in (
        ({"d": 1.0}, "neither a class nor a task of the sweep; there are reasoning, pattern, a:acc,none"),
        ({"a": -1.0, "b": 2.0}, "from 0 on"),
        ({"a": 0.0}, "above 0"),
        ({"a": math.nan}, "finite"),
        ({}, "above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            share_out(analysis.tasks, analysis.units, weights)


def test_the_choice_lies_between_its_tasks_and_says_what_each_loses() -> None:
    """Best rates an octave and a half apart: a place of one task costs the other; the weights decide."""
    analysis = analysed(a=0.0, c=-1.5)
    of_a, of_c = (choose(share_out(analysis.tasks, analysis.units, {name: 1.0})) for name in ("a", "c"))
    assert of_a.regret == pytest.approx(0, abs=0.3) and not of_a.flags
    assert of_a.log2_lr - of_c.log2_lr - 0.5 * (of_a.log2_batch - of_c.log2_batch) == pytest.approx(1.5, abs=0.51)
    assert of_a.low < of_a.optimum < of_a.high
    assert of_a.optimum == pytest.approx(-12 + 0.5 * (of_a.log2_batch - 4), abs=0.1)
    both = choose(share_out(analysis.tasks, analysis.units, {"a": 1.0, "c": 1.0}))
    losses = {one.task.task.task: one.regret for one in both.tasks}
    places = {"a": 0.0, "c": -1.5}
    for name, shift in places.items():
        off = both.log2_lr + 12 - shift - 0.5 * (both.log2_batch - 4)
        best = min((u + 12 - shift - 0.5 * (b - 4)) ** 2 for u in RATES for b in BATCHES)
        assert losses[name] == pytest.approx(0.1 * (off**2 - best), abs=0.02)


def test_a_choice_at_an_edge_is_flagged() -> None:
    analysis = analyse("main", [(task(), grid(shift=-5.0, seeds=2))])
    chosen = choose(share_out(analysis.tasks, analysis.units, {"gsm8k": 1.0}))
    told = " ".join(chosen.flags)
    assert "lower edge of the grid" in told and "2 of 3 seeds" in told and "batch is the largest of the grid" in told
    assert math.isnan(chosen.optimum)


def test_a_task_at_its_floor_is_marked() -> None:
    low = analyse("main", [(task(chance=1.0), grid())])
    high = analyse("main", [(task(chance=0.2), grid())])
    assert low.tasks[0].is_at_floor and not high.tasks[0].is_at_floor
    chosen = choose(share_out(low.tasks, low.units, {"gsm8k": 1.0}))
    assert any("at its floor" in flag for flag in chosen.flags)


def test_sentences() -> None:
    (one,) = analyse("main", [(task(), grid(tokens=(16.0, 18.0, 20.0)))]).tasks
    root = next(name for name in ACCOUNTS if "square root" in name)
    assert words.sentence("gsm8k", one.said) == f"gsm8k: supported is {root}. All other accounts are excluded."
    whole = analyse("main", [(task(), grid(tokens=(16.0, 18.0, 20.0)))])
    assert words.headline(whole, False) == f"reasoning: supported is {root}." and "A scan" in words.headline(
        whole, True
    )
    other = analyse("main", [(task(), grid(alpha=0.75, tokens=(16.0, 18.0, 20.0)))])
    assert words.headline(other, False) == "reasoning: none of the 4 accounts."
    alpha = dict(words.slope_texts(one.said))["α, of log2 batch"]
    estimate, low, high = (float(x) for x in re.findall(r"-?\d+\.\d+", alpha))
    assert low <= 0.5 <= high and estimate == pytest.approx(0.5, abs=0.06)
    (scan,) = analyse("main", [(task(), grid())], is_scan=True).tasks
    assert set(scan.said.words.values()) == {"not identified"} and "a scan" in scan.said.reasons[0]
    (single,) = analyse("main", [(task(), grid(seeds=1))]).tasks
    assert words.sentence("x", single.said) == "x: not identified." and words.slope_text(single.said, "delta") == "–"


def test_arms_are_compared_at_the_main_budget_of_the_first() -> None:
    analyses = [analyse("main", [(task(), grid())]), analyse("lora", [(task(), grid(shift=1.0))])]
    ridges = arms_of(analyses, task())
    gaps = [b.log2_lr - a.log2_lr for a, b in zip(ridges["main"], ridges["lora"], strict=False)]
    assert list(ridges) == ["main", "lora"] and gaps == pytest.approx([1.0] * len(gaps), abs=0.1)
    assert "lora" in figures.pages([figures.arms("gsm8k", ridges)])[0][0]


def test_the_page_to_turn_loads_nothing() -> None:
    pytest.importorskip("plotly")
    page = turning_page([analyse("main", [(task("<script>x"), grid())])], figures.Labels())
    assert page is not None and "<script>x" not in page and "&lt;script&gt;x" in page
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="http', page) and page.count("mesh3d") >= 2
    assert turning_page([], figures.Labels()) is None


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape_of_a_sweep_can_be_analysed_and_drawn(data: st.DataObject) -> None:
    whole = grid(noise=0.3, num_items=data.draw(st.integers(1, 4)))
    kept = data.draw(st.lists(st.integers(0, len(whole.items) - 1), min_size=1, max_size=25, unique=True))
    cells = only(whole, np.array(sorted(kept)))
    cells = diverged(cells, np.array(data.draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))))
    analysis = analyse("main", [(task(), cells), (task("b", task_class="pattern"), cells)], num_resamples=20)
    for one in analysis.tasks:
        panels = panels_of(one, "main")
        assert sum(len(panel.runs) for panel in panels.panels) == (~cells.diverged).sum()
        assert sum(int(panel.num_seeds.sum()) for panel in panels.panels) <= (~cells.diverged).sum()
        draws = [figures.surface(panels, panel, figures.Labels()) for panel in panels.panels]
        draws += [figures.slices(panels, panel, figures.Labels()) for panel in panels.panels]
        assert len(figures.pages(draws)[0]) == len(draws)
        assert all(is_drawable(panel) in (True, False) for panel in panels.panels)
        assert words.sentence("x", one.said)
    means = place_means(cells)
    assert all(np.isfinite(mean).all() for *_, mean in means)
    try:
        chosen = choose(share_out(analysis.tasks, analysis.units, {"reasoning": 1.0}))
        assert chosen.regret >= -1e-12 and all(one.regret >= -1e-12 for one in chosen.tasks)
    except ValueError as error:
        assert "run more cells" in str(error) or "diverged seed" in str(error)


def test_guesses_are_at_their_floor_though_the_best_place_is_lucky() -> None:
    """All items chose the place and were compared too: of 40 tasks of guesses 19 were marked."""
    draws = np.random.default_rng(0)
    num_marked = 0
    for _ in range(20):
        cells = grid()
        guesses = (draws.random((len(cells.items), 200)) < 0.25).astype(float)
        guessed = Cells(**{**vars(cells), "items": guesses})
        num_marked += analyse("main", [(task(chance=0.25), guessed)], num_resamples=2).tasks[0].is_at_floor
    assert num_marked >= 18


def test_a_task_at_its_floor_says_nothing() -> None:
    """Its surface may look like any other; neither it nor its class has a verdict, and no claim counts it."""
    at_floor, other = task("low", chance=1.2), task("other")
    cells = grid(tokens=(16.0, 18.0, 20.0))
    analysis = analyse("main", [(at_floor, cells), (other, cells), (task("c", task_class="pattern"), cells)])
    low, fine, _ = analysis.tasks
    assert set(low.said.words.values()) == {"not identified"} and "at its floor (chance 1.2)" in low.said.reasons[0]
    assert "supported" in fine.said.words.values()
    assert set(analysis.classes[0].said.words.values()) == {"not identified"}
    assert "low is at its floor" in analysis.classes[0].said.reasons[0]
    assert analysis.claims[0].num_tasks == (1, 1)


def test_no_item_chooses_by_one_score_and_reports_by_another() -> None:
    """An odd number of items used to turn the halves of the second score."""
    cells = grid(num_items=5, seeds=1, tokens=(16.0,), noise=0.0)
    items = cells.items.copy()
    # Items 0, 2 and 4 choose: by both scores one place; items 1 and 3 like another.
    favourite, other = (
        (cells.log2_lr == -13) & (cells.log2_batch == 4),
        (cells.log2_lr == -11) & (cells.log2_batch == 4),
    )
    items[np.ix_(favourite, [0, 2, 4])] += 1.0
    items[np.ix_(other, [1, 3])] += 3.0
    both = Cells(**{**vars(cells), "items": items})
    analysis = analyse("main", [(task(), both), (task(metric="f1,none"), both)])
    chosen = choose(share_out(analysis.tasks, analysis.units, {"gsm8k:acc,none": 1.0, "gsm8k:f1,none": 1.0}))
    assert (chosen.log2_lr, chosen.log2_batch) == (-13, 4)
    first, second = chosen.tasks
    assert (first.score, first.regret) == pytest.approx((second.score, second.regret))


def test_a_flag_points_to_an_edge_only_where_the_optimum_lies_there() -> None:
    assert marks(drawing(only(grid(tokens=(16.0,)), grid(tokens=(16.0,)).log2_lr < -12)), "flag") == 1
    triangle = drawing(grid(tokens=(16.0,), shift=-5.0))
    diamond = drawing(only(grid(tokens=(16.0,)), grid(tokens=(16.0,)).log2_lr < -12))

    def shape(text: str) -> int:
        """Corners of the first flag."""
        found = re.search(r'<g id="flag">.*?<path id="[^"]*" d="(.*?)"', text, re.DOTALL)
        return len(re.findall("[ML]", found[1])) if found else 0

    assert (shape(triangle), shape(diamond)) == (3, 4)


def test_with_few_seeds_the_claim_is_not_tested() -> None:
    """A run's luck that hits all tasks of a class alike looks like a difference of classes."""
    shifts = {"reasoning": 0.0, "pattern": -1.0}
    for seeds, told in ((2, "2 of 3 seeds: too few to test."), (3, "The classes differ")):
        scores = [
            (task(f"{name}_{n}", task_class=name), grid(seeds=seeds, shift=shift + 0.05 * n))
            for name, shift in shifts.items()
            for n in range(4)
        ]
        (test,) = analyse("main", scores, num_resamples=20).claims
        assert told in words.claim_text(test) and abs(test.difference) == pytest.approx(1.0, abs=0.1)
        assert not analyse("main", scores, is_scan=True, num_resamples=20).claims
