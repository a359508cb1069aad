"""Surfaces that can be turned, by plotly where it is installed: a page of its own, as it needs a script of 5 MB."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from smoltulu.tasks.surface.analysis import Analysis
from smoltulu.tasks.surface.figures import Labels, title_of
from smoltulu.tasks.surface.panels import Panel, TaskPanels, panels_of

#: plotly's surfaces compile functions and use blobs. Nothing may be loaded or sent.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "worker-src blob:; base-uri 'none'; form-action 'none'"
)


def turning_page(analyses: Sequence[Analysis], labels: Labels) -> str | None:
    """One HTML file that loads nothing; None where plotly is not installed, or nothing has scores."""
    try:
        from plotly import graph_objects
    except ImportError:
        return None
    parts: list[str] = []
    for analysis in analyses:
        for one in analysis.tasks:
            panels = panels_of(one, analysis.arm)
            for panel in panels.panels:
                if not len(panel.score):
                    continue
                figure = graph_objects.Figure(_traces(panels, panel))
                axes = {"xaxis": "log2 batch", "yaxis": "log2 learning rate", "zaxis": "score"}
                scene = {axis: {"title": {"text": text}} for axis, text in axes.items()}
                figure.update_layout(height=520, margin={"l": 0, "r": 0, "t": 10, "b": 0}, scene=scene)
                # The title stands in HTML that we escape: plotly reads its own titles as markup.
                parts.append(f"<h2>{escape(title_of(panels, panel, labels)).replace(chr(10), ', ')}</h2>")
                drawing = figure.to_html(
                    full_html=False, include_plotlyjs=not parts[1:], div_id=f"surface-{len(parts)}"
                )
                parts.append(drawing)
    if not parts:
        return None
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Surfaces</title></head>'
        f'<body style="font-family: sans-serif">{"".join(parts)}</body></html>\n'
    )


def _traces(panels: TaskPanels, panel: Panel) -> list[dict[str, object]]:
    """Places as dots, and a mesh through them where they span a plane."""
    x, y, z = (np.round(values, 6).tolist() for values in (panel.log2_batch, panel.log2_lr, panel.score))
    traces: list[dict[str, object]] = [
        {"type": "scatter3d", "x": x, "y": y, "z": z, "mode": "markers", "marker": {"size": 3, "color": "#222222"},
         "name": "runs"},
    ]  # fmt: skip
    if len({*zip(x, y, strict=True)}) > 3 and len(set(x)) > 1 and len(set(y)) > 1:
        traces.append({
            "type": "mesh3d", "x": x, "y": y, "z": z, "intensity": z, "opacity": 0.7, "colorscale": "Blues",
            "reversescale": panels.task.lower_is_better, "cmin": panels.low, "cmax": panels.high, "delaunayaxis": "z",
        })  # fmt: skip
    return traces
