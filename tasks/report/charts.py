"""Line charts and the drawing of lineage, as inline SVG. The style of the page sets the colours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from html import escape
from itertools import groupby
from statistics import fmean
from typing import TypeGuard

from smoltulu.tasks.report.text import clean, number

#: A longer series is drawn as the means of buckets, with the range of each bucket as a band.
MAX_POINTS = 80

Point = tuple[float, float | None]  # (step, value); None where the value was null, NaN or infinite


def e(value: object) -> str:
    """`value` escaped for the text of an element or a quoted attribute."""
    return escape(clean(value), quote=True)


def parse_history(lines: Iterable[str]) -> dict[str, list[Point]]:
    """Series by name from a history file (one JSON object per line), sorted by step. The last record of a step counts.

    Lines that are cut off, are no object or have no step are ignored, and so are values that are no number.
    """
    series: dict[str, dict[float, float | None]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or not _is_finite(record.get("step")):
            continue
        for name, value in record.items():
            if name != "step" and (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
                series.setdefault(name, {})[float(record["step"])] = float(value) if _is_finite(value) else None
    return {name: sorted(points.items()) for name, points in series.items()}


def _is_finite(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within [low, high], about `target` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def bucketed(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[tuple[float, float, float, float] | None]:
    """(step, mean, lowest, highest) per bucket of consecutive points; None where a bucket holds no finite value."""
    per_bucket = max(1, math.ceil(len(points) / max_points))
    buckets: list[tuple[float, float, float, float] | None] = []
    for start in range(0, len(points), per_bucket):
        part = points[start : start + per_bucket]
        values = [value for _, value in part if value is not None]
        step = sum(step for step, _ in part) / len(part)
        # Divided first: the sum of values near the largest float would be infinite.
        mean = sum(value / len(values) for value in values) if values else 0.0
        buckets.append((step, mean, min(values), max(values)) if values else None)
    return buckets


def line_chart(name: str, points: Sequence[Point]) -> str:
    """A figure of one metric over optimizer steps. A value that is not finite leaves a gap."""
    finite = [value for _, value in points if value is not None]
    gaps = len(points) - len(finite)
    caption = f"<b>{e(name)}</b>"
    if not finite:
        return f'<figure class="chart"><figcaption>{caption} no finite value in {gaps} records</figcaption></figure>'
    caption += f' <span class="muted">last {e(number(finite[-1]))}</span>'
    if gaps:
        caption += f' <span class="bad">{gaps} not finite</span>'
    width, height, left, right, top, bottom = 360, 190, 48, 10, 8, 26
    low, high = min(finite), max(finite)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    if not math.isfinite(high - low):
        return f'<figure class="chart"><figcaption>{caption} range too wide to draw</figcaption></figure>'
    margin = 0.05 * (high - low)
    low, high = low - margin if low < 0 or low > margin else 0.0, high + margin
    first, last = points[0][0], points[-1][0]
    if last == first:
        first, last = first - 1, last + 1

    def x(step: float) -> str:
        return f"{left + (step - first) / (last - first) * (width - left - right):.1f}"

    def y(value: float) -> str:
        return f"{top + (high - value) / (high - low) * (height - top - bottom):.1f}"

    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y(value)) + 3.5:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(first, last):
        parts.append(f'<text x="{x(value)}" y="{height - 8}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    for segment in (list(filter(None, group)) for is_there, group in groupby(bucketed(points), bool) if is_there):
        if len(segment) == 1:
            parts.append(f'<circle class="dot" cx="{x(segment[0][0])}" cy="{y(segment[0][1])}" r="2"/>')
            continue
        if any(lowest < highest for _, _, lowest, highest in segment):
            outline = [f"{x(step)},{y(highest)}" for step, _, _, highest in segment]
            outline += [f"{x(step)},{y(lowest)}" for step, _, lowest, _ in reversed(segment)]
            parts.append(f'<polygon class="band" points="{" ".join(outline)}"/>')
        parts.append(
            f'<polyline class="curve" points="{" ".join(f"{x(step)},{y(mean)}" for step, mean, _, _ in segment)}"/>'
        )
    label = f"{name} from step {number(points[0][0])} to {number(points[-1][0])}, last value {number(finite[-1])}"
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(label)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{drawing}</figure>'


def _tick(value: float) -> str:
    size = abs(value)
    if 1e6 <= size < 1e9:
        return f"{value / 1e6:.4g}M"
    if 1e4 <= size < 1e6:
        return f"{value / 1e3:.4g}k"
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}"


def direct_parents(parents: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction of an acyclic graph: without edges that a longer path implies."""
    ancestors: dict[str, set[str]] = {}
    for node in TopologicalSorter(parents).static_order():
        ancestors[node] = parents[node].union(*(ancestors[parent] for parent in parents[node]))
    return {node: direct.difference(*(ancestors[parent] for parent in direct)) for node, direct in parents.items()}


def layered(parents: Mapping[str, set[str]]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Rows of nodes, parents above children, and the edges between neighbouring rows.

    An edge across several rows goes through place-holders (names with a NUL), so that it bends around other nodes.
    Each row is sorted by the mean position of the neighbours, in a few sweeps down and up.
    """
    depth: dict[str, int] = {}
    for node in TopologicalSorter(parents).static_order():
        depth[node] = 1 + max((depth[parent] for parent in parents[node]), default=-1)
    rows: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for node in parents:
        rows[depth[node]].append(node)
    edges = []
    for child, direct in parents.items():
        for parent in sorted(direct):
            above = parent
            for level in range(depth[parent] + 1, depth[child]):
                place_holder = f"\0{parent}\0{level}"
                if place_holder not in rows[level]:
                    rows[level].append(place_holder)
                    edges.append((above, place_holder))
                above = place_holder
            edges.append((above, child))
    up: dict[str, list[str]] = {}
    down: dict[str, list[str]] = {}
    for above, below in edges:
        up.setdefault(below, []).append(above)
        down.setdefault(above, []).append(below)
    for sweep in range(6):
        neighbours = up if sweep % 2 == 0 else down
        place = {node: (index + 0.5) / len(row) for row in rows for index, node in enumerate(row)}
        for row in rows if sweep % 2 == 0 else reversed(rows):
            row.sort(key=lambda node: fmean(place[other] for other in neighbours.get(node, [node])))
            place.update({node: (index + 0.5) / len(row) for index, node in enumerate(row)})
    return rows, edges


def lineage_drawing(parents: Mapping[str, set[str]], labels: Mapping[str, tuple[str, str, str]]) -> str:
    """Drawing of the lineage of all artifacts. `labels`: node -> (name, second line, class of the box)."""
    rows, edges = layered(direct_parents(parents))
    node_width, node_height, gap_x, gap_y, thin = 138, 40, 12, 26, 18

    def row_width(row: Sequence[str]) -> int:
        return sum(thin if node not in parents else node_width for node in row) + gap_x * (len(row) - 1)

    width = max((row_width(row) for row in rows), default=0) + 4
    height = len(rows) * (node_height + gap_y) - gap_y + 4
    centre: dict[str, tuple[float, float]] = {}
    for index, row in enumerate(rows):
        left = (width - row_width(row)) / 2
        for node in row:
            own = node_width if node in parents else thin
            centre[node] = (left + own / 2, 2 + index * (node_height + gap_y) + node_height / 2)
            left += own + gap_x
    parts = []
    for above, below in edges:
        (x0, y0), (x1, y1) = centre[above], centre[below]
        start = y0 + node_height / 2
        end = y1 - node_height / 2
        parts.append(
            f'<path class="edge" d="M{x0:.1f} {start:.1f}C{x0:.1f} {start + gap_y / 2:.1f} '
            f'{x1:.1f} {end - gap_y / 2:.1f} {x1:.1f} {end:.1f}"/>'
        )
    for node, (x, y) in centre.items():
        if node not in parents:
            parts.append(f'<path class="edge" d="M{x:.1f} {y - node_height / 2:.1f}V{y + node_height / 2:.1f}"/>')
            continue
        name, second, style = labels[node]
        parts.append(
            f'<g><rect class="box {style}" x="{x - node_width / 2:.1f}" y="{y - node_height / 2:.1f}" '
            f'width="{node_width}" height="{node_height}" rx="4"/>'
            f'<text class="name" x="{x:.1f}" y="{y - 2:.1f}" text-anchor="middle">{e(_short(name, 20))}</text>'
            f'<text x="{x:.1f}" y="{y + 12:.1f}" text-anchor="middle">{e(_short(second, 24))}</text></g>'
        )
    return (
        f'<svg class="lineage" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="Lineage: who was made from what">{"".join(parts)}</svg>'
    )


def _short(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"
