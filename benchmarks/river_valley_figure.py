"""Draws the river-valley figure as SVG: curves of the excess loss, mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable

Curve = list[tuple[int, tuple[float, float, float]]]
Points = list[tuple[float, float]]

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 40, 52
#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"constant": "#000000", "wsd": "#D55E00", "wsd-s": "#0072B2", "cosine": "#009E73"}


def mean_curve(curves: list[Curve]) -> Points:
    """(step, mean loss over seeds); every seed was measured at the same steps."""
    return [
        (float(points[0][0]), sum(loss[0] for _, loss in points) / len(points)) for points in zip(*curves, strict=True)
    ]


def draw(by_seed: list[dict[str, Curve]], budgets: tuple[int, ...], ratio: float) -> str:
    """Constant, WSD with its decays, WSD-S and a cosine for every budget, over a logarithmic loss."""
    lines: list[tuple[str, Points]] = [("constant", mean_curve([curves["constant"] for curves in by_seed]))]
    for budget in budgets:
        lines.append(("cosine", mean_curve([curves[f"cosine {budget}"] for curves in by_seed])))
    lines.append(("wsd-s", mean_curve([curves[f"wsd-s {ratio}"] for curves in by_seed])))
    trunk = dict(lines[0][1])
    for budget in budgets:
        decay = mean_curve([curves[f"wsd {ratio} {budget}"] for curves in by_seed])
        start = max(step for step in trunk if step < decay[0][0])
        lines.append(("wsd", [(start, trunk[start]), *decay]))
    # The first hundred steps would take most of the height.
    first = min(100.0, budgets[0] / 2)
    lines = [(name, [(step, loss) for step, loss in points if step >= first]) for name, points in lines]
    low = min(loss for _, points in lines for _, loss in points) * 0.95
    high = max(loss for _, points in lines for _, loss in points) * 1.03

    def x(step: float) -> float:
        return LEFT + (step - first) / (budgets[-1] - first) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (math.log(high) - math.log(loss)) / (math.log(high) - math.log(low)) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, f"Excess loss KL(true || model), mean of {len(by_seed)} seeds, decays of {ratio:.0%}", size=14),
    ]
    for loss in _ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y(loss) + 4, f"{loss:g}", anchor="end"))
    for budget in budgets:
        parts.append(f'<path d="M{x(budget):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#bbbbbb" stroke-dasharray="3 3"/>')
        parts.append(_text(x(budget), HEIGHT - BOTTOM + 18, f"{budget:,}", anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "optimizer step", anchor="middle"))
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle" '
        'font-size="12">nats</text>'
    )
    parts += [_polyline(((x(step), y(loss)) for step, loss in points), COLOURS[name]) for name, points in lines]
    names = {
        "constant": "constant",
        "wsd": "WSD: decays off the trunk",
        "wsd-s": "WSD-S: one unbroken run",
        "cosine": "cosine: a run per budget",
    }
    for number, (name, words) in enumerate(names.items()):
        height = TOP + 14 + 22 * number
        parts.append(_polyline([(WIDTH - RIGHT + 12, height), (WIDTH - RIGHT + 34, height)], COLOURS[name]))
        parts.append(_text(WIDTH - RIGHT + 40, height + 4, words))
    return "\n".join([*parts, "</svg>\n"])


def _ticks(low: float, high: float) -> list[float]:
    """Round values between `low` and `high`."""
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8)
    found = [digit * 10.0**power for power in range(-4, 3) for digit in digits]
    return [float(f"{value:.2g}") for value in found if low <= value <= high]


def _polyline(points: Iterable[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{words}</text>'
