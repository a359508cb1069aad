"""Draws docs/figures/drift_against_noise.svg: `python benchmarks/surface_figure.py`. Planted surfaces, no training.

Two worlds that one budget cannot tell apart, on the grid of the preset `surface-135m`, at a noise where one octave off
the optimum costs a seed's standard deviation. Dots are the optima that the analysis finds, with their 95 % intervals.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.surface import World
from smoltulu.tasks.surface.figures import COLOURS, pages, tokens_text
from smoltulu.tasks.surface.optimum import find_optima
from smoltulu.tasks.surface.panels import ridge_half_widths

TARGET = Path(__file__).parent.parent / "docs" / "figures" / "drift_against_noise.svg"


def world(title: str, alpha: float, gamma: float) -> Any:
    """A panel of a world: best learning rate over batch, a line a budget."""
    found = find_optima(World(title, alpha, gamma).cells(np.random.default_rng(14)))
    half = ridge_half_widths(found)

    def draw(axes: Any, bar: Any) -> None:
        for number, tokens in enumerate(sorted({one.log2_tokens for one in found.optima})):
            at = [n for n, one in enumerate(found.optima) if one.log2_tokens == tokens]
            axes.errorbar(
                [found.optima[n].log2_batch for n in at], [found.optima[n].log2_lr for n in at], yerr=half[at],
                fmt="-o", ms=3.5, lw=1.1, capsize=2, color=COLOURS[number], label=tokens_text(tokens),
            )  # fmt: skip
        axes.set_title(f"{title}\n(planted, no training)")
        axes.set_xlabel("log2 batch (rows a step)")
        axes.set_ylabel("log2 best learning rate")
        axes.set_ylim(-18.5, -6.5)
        axes.legend(title="tokens", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7)
        bar.set_axis_off()

    return draw


def main() -> None:
    noise = world("gradient noise: LR / B matters", 1.0, 0.0)
    drift = world("total drift: LR T / B matters", 1.0, -1.0)
    panels, _ = pages([noise, drift])
    width, height = 266.4, 237.6
    parts = [
        panel.replace("<svg ", f'<svg x="{number * width}" width="{width}" height="{height}" ', 1)
        for number, panel in enumerate(panels)
    ]
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}">\n{"".join(parts)}</svg>\n'
    TARGET.write_text(whole)


if __name__ == "__main__":
    main()
