"""Draws the figures of a sweep by matplotlib, as SVG for a page and as PDF. The same data give the same bytes.

matplotlib is imported where it draws: nothing else of a sweep needs it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from smoltulu.tasks.report.text import clean
from smoltulu.tasks.surface.panels import Panel, RidgePoint, TaskPanels, is_drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RIDGE = "#D55E00"
_WIDTH, _HEIGHT = 3.7, 3.3  # inches, of a panel
_FLAGS = {
    "lowest rate": "edge: add lower rates",
    "highest rate": "edge: add higher rates",
    "next rate diverged": "edge: next diverged",
    "too few rates": "too few rates",
    "no optimum": "no optimum",
}


@dataclass(frozen=True)
class Labels:
    """What a sweep calls things.

    sizes  log2 parameters -> name
    unit   of a budget: tokens or episodes
    """

    sizes: Mapping[float, str] = field(default_factory=dict)
    unit: str = "tokens"


Drawing = Callable[["Axes", Any], None]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "smoltulu",
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titley": 1.02,  # given, as finding a place for it takes a tenth of the time
        "axes.linewidth": 0.6,
        "hatch.linewidth": 0.5,
        "hatch.color": "#444444",
    }
    with matplotlib.rc_context(settings):
        yield


def pages(draws: Sequence[Drawing]) -> tuple[tuple[str, ...], bytes]:
    """Panels as `<svg>` elements that fit into an HTML page (no date, no header, no metadata), and as one PDF with a
    page a panel.
    """
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    drawn, buffer = [], io.BytesIO()
    with _style(), PdfPages(buffer, metadata={"CreationDate": None}) as file:
        for draw in draws:
            figure = Figure(figsize=(_WIDTH, _HEIGHT))
            draw(*_axes(figure, 0, 1))
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            drawn.append(_element(text.getvalue()))
            file.savefig(figure)
    return tuple(drawn), buffer.getvalue()


def _element(text: str) -> str:
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, end, rest = text[text.index("<svg") :].partition(">")
    # A size in points would not shrink on a phone; the view box says the shape.
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + end + rest.rstrip() + "\n"


def sheet(draws: Sequence[Drawing], num_columns: int = 4) -> bytes:
    """Panels side by side on one page of a PDF."""
    from matplotlib.figure import Figure

    with _style():
        num_columns = min(num_columns, len(draws))
        num_rows = -(-len(draws) // num_columns)
        figure = Figure(figsize=(_WIDTH * num_columns, _HEIGHT * num_rows))
        for number, draw in enumerate(draws):
            draw(*_axes(figure, number, num_columns, num_rows))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()


def _axes(figure: Figure, number: int, num_columns: int, num_rows: int = 1) -> tuple[Axes, Axes]:
    """The axes of a panel and those of its colour bar."""
    row, column = divmod(number, num_columns)

    def place(left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return (
            (column + left) / num_columns, (num_rows - 1 - row + bottom) / num_rows, width / num_columns,
            height / num_rows,
        )  # fmt: skip

    return figure.add_axes(place(0.15, 0.15, 0.64, 0.7)), figure.add_axes(place(0.82, 0.15, 0.035, 0.7))


def title_of(panels: TaskPanels, panel: Panel, labels: Labels) -> str:
    """Task and score, and below them budget and, where there are several, size and arm."""
    second = f"{tokens_text(panel.log2_tokens)} {labels.unit}"
    if len(labels.sizes) > 1:
        second += f", {labels.sizes.get(panel.log2_size, '')}"
    if panels.arm != "main":
        second += f", arm {panels.arm}"
    return f"{_short(panels.name)}\n{_short(second)}"


def tokens_text(log2_tokens: float) -> str:
    """`64M`, `1.0M`, `2,000`: a budget in short."""
    tokens = 2.0**log2_tokens
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= 10 * factor or (tokens >= factor and unit != "k"):
            return f"{tokens / factor:.3g}{unit}"
    return f"{tokens:,.0f}"


def _short(text: str, longest: int = 44) -> str:
    text = clean(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def surface(panels: TaskPanels, panel: Panel, labels: Labels, *, plain: bool = False) -> Drawing:
    """Contours of the score over log2 batch (x) and log2 learning rate (y); darker is better.

    plain  the paper's own figure: contours and runs, without ridge and lines
    """

    def draw(axes: Axes, bar: Axes) -> None:
        shades = "Blues_r" if panels.task.lower_is_better else "Blues"
        shown = None
        if is_drawable(panel):
            levels = np.linspace(panels.low, panels.high, 13)
            shown = axes.tricontourf(
                panel.log2_batch, panel.log2_lr, panel.score, levels=levels, cmap=shades, extend="both"
            )
        dots: dict[str, Any] = {"s": 9, "color": "#222222", "linewidths": 0}
        if shown is None and len(panel.score):
            dots = {"s": 60, "c": panel.score, "cmap": shades, "vmin": panels.low, "vmax": panels.high,
                    "edgecolors": "#222222", "linewidths": 0.6}  # fmt: skip
        if len(panel.score):
            scattered = axes.scatter(panel.log2_batch, panel.log2_lr, gid="runs", zorder=3, **dots)
            shown = scattered if shown is None else shown
        _hatch(axes, panel)
        x, y = _limits(panel)
        if not plain:
            _ridge(axes, panel, y)
        axes.set_xlim(*x)
        axes.set_ylim(*y)
        axes.xaxis.set_major_locator(_round_ticks(6, integer=True))
        axes.yaxis.set_major_locator(_round_ticks(8, integer=True))
        axes.set_title(title_of(panels, panel, labels))
        axes.set_xlabel("log2 batch (rows a step)")
        axes.set_ylabel("log2 learning rate")
        if shown is None:
            bar.set_axis_off()
        else:
            ticks = _round_ticks(5).tick_values(panels.low, panels.high)
            # Beyond the scale they would pile up at its ends.
            axes.figure.colorbar(shown, cax=bar, ticks=[one for one in ticks if panels.low <= one <= panels.high])
            bar.tick_params(labelsize=7)

    return draw


def _round_ticks(most: int, *, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer)


def _limits(panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
    batch = np.concatenate([panel.log2_batch, panel.diverged[:, 0]])
    rates = np.concatenate([panel.log2_lr, panel.diverged[:, 1]])
    return (batch.min() - 0.6, batch.max() + 0.6), (rates.min() - 0.6, rates.max() + 0.6)


def _hatch(axes: Axes, panel: Panel) -> None:
    """Places where a seed diverged, as hatched squares of one octave."""
    from matplotlib.patches import Rectangle

    for number, (batch, rate) in enumerate(panel.diverged):
        patch = Rectangle(
            (batch - 0.5, rate - 0.5), 1, 1, facecolor="#dddddd", edgecolor="#444444", hatch="////", linewidth=0,
            gid=f"diverged-{number}",
        )  # fmt: skip
        axes.add_patch(patch)


def _ridge(axes: Axes, panel: Panel, y: tuple[float, float]) -> None:
    """The usable optima with their 95 % region, flags for the others, and iso-lines of slope 1 and 1/2."""
    usable = [point for point in panel.ridge if not point.flaw]
    if usable:
        batch = [point.log2_batch for point in usable]
        axes.plot(batch, [point.log2_lr for point in usable], "-o", color=_RIDGE, ms=3.5, lw=1.4, gid="ridge", zorder=5)
        known = [point for point in usable if np.isfinite(point.low)]
        if len(known) > 1:
            axes.fill_between(
                [point.log2_batch for point in known], [point.low for point in known],
                [point.high for point in known], color=_RIDGE, alpha=0.25, linewidth=0, gid="ridge-95", zorder=4,
            )  # fmt: skip
        elif known:
            axes.plot([known[0].log2_batch] * 2, [known[0].low, known[0].high], color=_RIDGE, lw=1, gid="ridge-95")
    checks = [(point.log2_batch, point.check) for point in panel.ridge if np.isfinite(point.check)]
    if checks:
        axes.plot(*zip(*checks, strict=True), "x", color="#000000", ms=4, mew=0.9, gid="process", zorder=6)
    if panel.centre is not None:
        ends = np.array(_limits(panel)[0])
        for slope, dashes in ((1.0, (4, 2)), (0.5, (1, 2))):
            axes.plot(ends, panel.centre[1] + slope * (ends - panel.centre[0]), color="#555555", lw=0.8, dashes=dashes,
                      gid=f"iso-{slope:g}", zorder=2)  # fmt: skip
    for point in panel.ridge:
        if point.flaw:
            at = y[1] if point.flaw in ("highest rate", "next rate diverged") else y[0]
            # A triangle points to where the optimum lies; where none can be told it must not.
            mark = "v" if point.flaw == "lowest rate" else "^" if at == y[1] else "D"
            axes.plot(
                [point.log2_batch],
                [at],
                mark,
                color="#b02f26",
                ms=5 if mark == "D" else 7,
                clip_on=False,
                gid="flag",
                zorder=7,
            )


def slices(panels: TaskPanels, panel: Panel, labels: Labels) -> Drawing:
    """Scores over log2 learning rate, a line a batch size, with standard errors over seeds and fitted parabolas."""

    def draw(axes: Axes, bar: Axes) -> None:
        for number, one in enumerate(panel.slices):
            colour, label = COLOURS[number % len(COLOURS)], f"{2**one.log2_batch:g}"
            if len(one.log2_lr):
                axes.errorbar(
                    one.log2_lr, one.mean, yerr=np.nan_to_num(one.stderr), fmt="o", ms=3, lw=0, elinewidth=0.8,
                    capsize=1.5, color=colour, label=label,
                )  # fmt: skip
            axes.plot(one.curve_lr, one.curve, color=colour, lw=1)
            for rate in one.diverged:
                axes.axvline(rate, color=colour, lw=0.6, dashes=(2, 3), gid="diverged")
        if panels.task.chance is not None:
            axes.axhline(panels.task.chance, color="#555555", lw=0.8, dashes=(1, 2), gid="chance")
        span = panels.high - panels.low
        axes.set_ylim(panels.low - 0.15 * span, panels.high + 0.15 * span)
        axes.xaxis.set_major_locator(_round_ticks(6, integer=True))
        axes.set_title(title_of(panels, panel, labels))
        axes.set_xlabel("log2 learning rate")
        axes.set_ylabel(_short(panels.task.metric.removesuffix(",none"), 30))
        bar.set_axis_off()
        _legend(axes, "batch")

    return draw


def _legend(axes: Axes, title: str) -> None:
    """Beside the axes; none where nothing is drawn."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, names, title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7
        )


def arms(name: str, ridges: Mapping[str, Sequence[RidgePoint]]) -> Drawing:
    """The optima of several arms over log2 batch."""

    def draw(axes: Axes, bar: Axes) -> None:
        for number, (arm, points) in enumerate(ridges.items()):
            if points:
                middle = np.array([point.log2_lr for point in points])
                half = np.nan_to_num(np.array([point.high for point in points]) - middle)
                axes.errorbar(
                    [point.log2_batch for point in points], middle, yerr=half, fmt="-o", ms=3.5, lw=1.1, capsize=2,
                    color=COLOURS[number % len(COLOURS)], label=_short(arm, 14),
                )  # fmt: skip
        axes.set_title(_short(name))
        axes.set_xlabel("log2 batch (rows a step)")
        axes.set_ylabel("log2 best learning rate")
        bar.set_axis_off()
        _legend(axes, "arm")

    return draw


def flag_text(flaw: str) -> str:
    """A flag of an optimum, in words."""
    return _FLAGS.get(flaw, flaw)
