"""Histogram of the row lengths of a preflight, as inline SVG. The style of the page sets the colours."""

from __future__ import annotations

from smoltulu.schemas.preflight import LengthReport
from smoltulu.tasks.report.charts import ticks


def histogram(lengths: LengthReport, max_length: int) -> str:
    """Bars of rows over tokens, with a line at max_length. Needs at least one row."""
    bins = lengths.histogram
    width, height, left, right, top, bottom = 760, 200, 56, 10, 10, 26
    end, most = len(bins) * lengths.bin_width, max(bins)

    def x(tokens: float) -> float:
        return left + tokens / end * (width - left - right)

    def y(rows: float) -> float:
        return top + (1 - rows / most) * (height - top - bottom)

    parts = []
    for value in ticks(0, most):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:,.0f}</text>')
    for value in ticks(0, end, 8):
        parts.append(f'<text x="{x(value):.1f}" y="{height - 8}" text-anchor="middle">{value:,.0f}</text>')
    for number, rows in enumerate(bins):
        start, stop = x(number * lengths.bin_width), x((number + 1) * lengths.bin_width)
        style = "bar" if number * lengths.bin_width <= max_length else "bar over"
        parts.append(
            f'<rect class="{style}" x="{start + 0.5:.1f}" y="{y(rows):.1f}" width="{max(stop - start - 1, 0.5):.1f}" '
            f'height="{height - bottom - y(rows):.1f}"/>'
        )
    if max_length <= end:
        parts.append(
            f'<line class="axis" x1="{x(max_length):.1f}" x2="{x(max_length):.1f}" y1="{top}" y2="{height - bottom}"/>'
            f'<text x="{x(max_length) - 4:.1f}" y="{top + 8}" text-anchor="end">max_length {max_length:,}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    label = f"rows by length in tokens, bars of {lengths.bin_width}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
