"""What the page of a sweep says in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smoltulu.tasks.surface.accounts import ACCOUNTS
from smoltulu.tasks.surface.analysis import Analysis, Said, TaskAnalysis
from smoltulu.tasks.surface.claim import ClassTest

_SYMBOLS = {"alpha": "α", "gamma": "γ", "delta": "δ"}
_OF = {"alpha": "log2 batch", "gamma": "log2 tokens", "delta": "log2 parameters"}
_MAX_REASONS = 12


def slope_texts(said: Said) -> list[tuple[str, str]]:
    """(`α, of log2 batch`, `0.52 [0.45, 0.59]`) of every slope that was fitted."""
    made = []
    if said.slopes is not None:
        for name, estimate in zip(said.slopes.names, said.slopes.estimate, strict=True):
            if math.isfinite(estimate):
                low, high = said.slopes.interval(name)
                interval = f"[{low:.2f}, {high:.2f}]" if math.isfinite(low) else "no interval: single seeds"
                made.append((f"{_SYMBOLS[name]}, of {_OF[name]}", f"{estimate:.2f} {interval}"))
    return made


def slope_text(said: Said, name: str) -> str:
    """`0.52 [0.45, 0.59]`; a dash where the slope was not fitted."""
    wanted = f"{_SYMBOLS[name]}, of {_OF[name]}"
    return dict(slope_texts(said)).get(wanted, "–")


def supported(said: Said) -> str | None:
    """The account that is supported; None where there is none."""
    return next((account for account, word in said.words.items() if word == "supported"), None)


def sentence(name: str, said: Said) -> str:
    """The verdict of a task or class in one sentence."""
    if (account := supported(said)) is not None:
        return f"{name}: supported is {account}. All other accounts are excluded."
    excluded = [account for account in ACCOUNTS if said.words[account] == "excluded"]
    left = [account for account in ACCOUNTS if said.words[account] != "excluded"]
    if not excluded:
        return f"{name}: not identified."
    if not left:
        return f"{name}: all {len(excluded)} accounts are excluded; the truth is none of them."
    return f"{name}: excluded is {'; '.join(excluded)}. Not identified: {'; '.join(left)}."


def reasons(said: Said) -> list[str]:
    """Why slopes identify nothing, with the missing cells; a long list is cut and says so."""
    more = len(said.reasons) - _MAX_REASONS
    return [*said.reasons[:_MAX_REASONS], *([f"and {more} more of this kind"] if more > 0 else [])]


def misfit_text(said: Said) -> str:
    """Whether the optima lie on a plane."""
    if said.slopes is None or not math.isfinite(said.slopes.misfit):
        return "–"
    return f"p {p_text(said.slopes.misfit)}"


def p_text(value: float) -> str:
    """`= 0.029`, `< 0.001`."""
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def claim_text(test: ClassTest, level: float = 0.05) -> str:
    """The claim about two classes, in one or two sentences."""
    one, other = test.classes
    sizes = f"{test.num_tasks[0]} tasks of {one}, {test.num_tasks[1]} of {other}"
    if not math.isfinite(test.difference):
        return f"{one} and {other}: no best ratio is known of one of them ({sizes}); the missing cells are named above."
    higher, lower = (one, other) if test.difference > 0 else (other, one)
    octaves = f"{abs(test.difference):.2f} octaves"
    said = f"{higher} wants a log2 ratio LR / B that is {octaves} above that of {lower} ({sizes})."
    if not math.isfinite(test.p_value):
        return f"{said} {test.untested}."
    told = "The classes differ" if test.adjusted < level else "That is within what any division of these tasks gives"
    return f"{said} {told}: permutation test p {p_text(test.p_value)}, adjusted (Holm) {p_text(test.adjusted)}."


def check_text(tasks: Sequence[TaskAnalysis]) -> str:
    """By how much the process and the parabola disagree, over all usable optima."""
    gaps = [
        abs(check - one.log2_lr)
        for task in tasks
        for one, check in zip(task.found.optima, task.checks, strict=True)
        if not one.flaw and math.isfinite(check)
    ]
    if not gaps:
        return "No usable optimum has three rates for the process."
    middle = sorted(gaps)[len(gaps) // 2]
    return (
        f"Parabola and Gaussian process disagree by {middle:.2f} octaves in the middle of {len(gaps)} usable optima, "
        f"by {max(gaps):.2f} at most."
    )


def headline(analysis: Analysis | None, is_scan: bool) -> str:
    """The first sentence of the page."""
    if analysis is None:
        return "No cell has scores yet."
    if is_scan:
        return "A scan: surfaces are shown, no verdict is given."
    told = []
    for one in analysis.classes:
        if (account := supported(one.said)) is not None:
            told.append(f"{one.name}: supported is {account}")
        elif set(one.said.words.values()) == {"excluded"}:
            told.append(f"{one.name}: none of the {len(ACCOUNTS)} accounts")
        else:
            told.append(f"{one.name}: not identified")
    return "; ".join(told) + "."
