"""The page of a size ladder: its figure by matplotlib, its answer, and what it does not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smoltulu.artifacts import readable
from smoltulu.schemas.ladder import LadderSettings
from smoltulu.tasks.report.render import render
from smoltulu.tasks.surface.figures import pages
from smoltulu.tasks.surface.ladder import STEP_LAW, Confirmation, Prediction, predict
from smoltulu.tasks.surface.optimum import Optima

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour-blind safe (Okabe and Ito).
_LINE, _OPTIMA, _TESTED, _OTHERS = "#0072B2", "#000000", "#D55E00", "#009E73"
_NUM_POINTS = 41


def draw(
    optima: Optima,
    prediction: Prediction,
    confirmation: Confirmation | None,
    target: tuple[float, float, float],
    log2_lr: float | None,
    title: str,
    overlays: Sequence[str] = (),
) -> tuple[str, bytes]:
    """Optimum against size with its line, interval and confirmation, as SVG text and PDF.

    target   log2 of batch, tokens and parameters
    log2_lr  predicted rate as the target is trained with it; None where there is none
    """

    def drawn(axes: Axes, beside: Any) -> None:
        beside.remove()  # there is no colour bar: its place is the panel's
        axes.set_position((0.14, 0.38, 0.82, 0.53))
        _draw_line(axes, optima, prediction, target)
        _draw_optima(axes, optima, prediction, target)
        if log2_lr is not None:
            _draw_target(axes, prediction, confirmation, target, log2_lr)
        if "step-law" in overlays:
            sizes = _sizes(optima, target)
            rates = [math.log2(STEP_LAW.learning_rate(2.0**size, 2.0 ** target[1])) for size in sizes]
            axes.plot(sizes, rates, color=_OTHERS, linestyle=":", label=f"{STEP_LAW.name} ({STEP_LAW.source})")
        axes.set_title(title)
        axes.set_xlabel("log2 parameters")
        axes.set_ylabel("log2 learning rate")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, fontsize=6.5, frameon=False, columnspacing=1
            )  # fmt: skip

    (svg,), pdf = pages([drawn])
    return svg, pdf


def _sizes(optima: Optima, target: tuple[float, float, float]) -> np.ndarray[Any, Any]:
    smallest = min(one.log2_size for one in optima.optima)
    return np.linspace(smallest, target[2], _NUM_POINTS)


def _draw_line(axes: Axes, optima: Optima, prediction: Prediction, target: tuple[float, float, float]) -> None:
    if not math.isfinite(prediction.log2_lr):
        return
    sizes = _sizes(optima, target)
    along = [predict(optima, target[0], target[1], float(size)) for size in sizes]
    axes.plot(sizes, [one.log2_lr for one in along], color=_LINE, label="fit")
    axes.fill_between(
        sizes, [one.low for one in along], [one.high for one in along], color=_LINE, alpha=0.15, linewidth=0,
        label="95 % interval of the optimum",
    )  # fmt: skip


def _draw_optima(axes: Axes, optima: Optima, prediction: Prediction, target: tuple[float, float, float]) -> None:
    """Where they were found, moved to the target's batch and budget along the fitted slopes."""
    alpha, gamma = (0.0 if math.isnan(slope) else slope for slope in prediction.slopes[:2])
    for is_good, fill, label in ((True, _OPTIMA, "optima of the proxies"), (False, "white", "not used (edge)")):
        found = [one for one in optima.optima if (not one.flaw) == is_good and math.isfinite(one.log2_lr)]
        if not found:
            continue
        moved = [
            one.log2_lr - alpha * (one.log2_batch - target[0]) - gamma * (one.log2_tokens - target[1]) for one in found
        ]
        errors = [1.96 * one.stderr if math.isfinite(one.stderr) else 0.0 for one in found]
        axes.errorbar(
            [one.log2_size for one in found], moved, errors, fmt="o", color=_OPTIMA, markerfacecolor=fill,
            markersize=5, capsize=2, label=label,
        )  # fmt: skip


def _draw_target(
    axes: Axes,
    prediction: Prediction,
    confirmation: Confirmation | None,
    target: tuple[float, float, float],
    log2_lr: float,
) -> None:
    if confirmation is None:
        axes.plot([target[2]], [log2_lr], marker="D", linestyle="", color=_TESTED, label="predicted")
        return
    tested = [log2_lr + octave for octave in confirmation.octaves]
    axes.plot([target[2]] * len(tested), tested, marker="x", linestyle="", color=_TESTED, label="tested on the target")
    axes.plot(
        [target[2]], [log2_lr + confirmation.best], marker="o", markersize=11, fillstyle="none", linestyle="",
        color=_TESTED, label="best tested",
    )  # fmt: skip
    if math.isfinite(confirmation.optimum):
        axes.plot(
            [target[2]], [log2_lr + confirmation.optimum], marker="_", markersize=16, linestyle="", color=_TESTED,
            label="optimum of the target",
        )  # fmt: skip


def html(
    rows: Sequence[dict[str, Any]], drawn: Sequence[str], ladder: LadderSettings, is_transfer: bool, lines: list[str]
) -> str:
    """The page. `rows` and `drawn` (SVG) are of the same scores in the same order."""
    from markupsafe import Markup

    target = ladder.target
    return render(
        "ladder.html.jinja",
        title=f"Ladder {ladder.name}",
        description=ladder.description,
        lines=lines,
        is_transfer=is_transfer,
        target=f"{readable.count(target.num_parameters)} parameters, batch 2^{target.log2_batch:g}, "
        f"{readable.count(target.max_tokens)} tokens",
        figures=[Markup(svg) for svg in drawn],  # drawn here; matplotlib escapes its texts
        rows=[_told(row) for row in rows],
        tested=next(f"{row['task']}, {row['metric']}" for row in rows if row["is_decisive"]),
        overlays=[f"{STEP_LAW.name} ({STEP_LAW.source}): {STEP_LAW.note}"] if "step-law" in ladder.overlays else [],
    )


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row in words."""
    confirmed = row["confirmation"]
    slopes = zip("αγδ", row["slopes"], strict=True)
    return {
        "name": f"{row['task']}, {row['metric']}" + (" (tested)" if row["is_decisive"] else ""),
        "predicted": _rate(row["predicted"]),
        "interval": f"{_rate(row['low'])} to {_rate(row['high'])}" if math.isfinite(row["low"]) else "unknown",
        "octaves": f"{row['high'] - row['low']:.2f}" if math.isfinite(row["high"] - row["low"]) else "-",
        "slopes": ", ".join(f"{name} {value:+.2f}" for name, value in slopes if math.isfinite(value)) or "-",
        "rests_on": f"{row['num_optima']} optima, {row['num_spare']} to spare",
        "best": "-" if confirmed is None else f"{2 ** confirmed['best']:g} ×",
        "regret": "-" if confirmed is None else _with_error(confirmed["regret"], confirmed["regret_stderr"]),
        "optimum": "-"
        if confirmed is None or not math.isfinite(confirmed["optimum"])
        else f"{2 ** confirmed['optimum']:.2f} ×",
        "problems": row["problems"],
    }


def _rate(log2_lr: float) -> str:
    return f"{2**log2_lr:.2e}" if math.isfinite(log2_lr) else "-"


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.4g} ± {stderr:.2g}" if math.isfinite(stderr) else f"{value:.4g}"
