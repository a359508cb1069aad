"""Tables of the actions of `smoltulu sweep NAME`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, table

if TYPE_CHECKING:
    from smoltulu.schemas.recommendation import Recommendation
    from smoltulu.tasks.surface.analysis import Analysis

_STATES = ("done", "diverged", "running", "pending", "failed")
_COLOURS = {"done": "green", "diverged": "yellow", "running": "cyan", "failed": "red"}
_NUM_SHOWN = 20
#: Where the seconds of cells are from, in words.
_FROM = {
    "measured": "cells like them",
    "scaled": "other cells, by tokens and size",
    "declared": "the sweep's own hours, a cell at a time",
    "estimated": "a plan, a cell at a time",
}


def show_status(status: dict[str, Any]) -> None:
    """Blocks by state, the cells that failed or diverged, and the time that is left."""
    from rich.text import Text

    out = console()
    made = table("block", "cells", *_STATES, "left", title=_title(status), right=("cells", *_STATES, "left"))
    for block in status["blocks"]:
        counts = [Text(f"{block[state]:,}" if block[state] else "", _COLOURS.get(state, "")) for state in _STATES]
        made.add_row(block["name"], f"{block['cells']:,}", *counts, _time(block))
    out.print(made)
    for state in ("failed", "diverged"):
        if cells := status[state]:
            told = table("cell", "why", title=f"{state} ({len(cells):,})", whole=("cell",))
            for one in cells[:_NUM_SHOWN]:
                told.add_row(one["cell"], one["message"].partition("\n")[0][:500])
            out.print(told)
            if len(cells) > _NUM_SHOWN:
                out.print(f"and {len(cells) - _NUM_SHOWN:,} more; --json lists all")
    out.print(_summary(status), soft_wrap=True)


def show_plan(plan: dict[str, Any]) -> None:
    """Blocks with what is missing of them, hours, memory, disk."""
    out = console()
    figures = ("cells", "done", "missing", "time")
    made = table("block", *figures, "forecast from", title=_title(plan), right=figures)
    for block in plan["blocks"]:
        done, of = block["done"] + block["diverged"], ", ".join(_FROM[one] for one in block["forecast_from"])
        made.add_row(
            block["name"], f"{block['cells']:,}", f"{done:,}", f"{block['missing']:,}", _time(block), of or "-"
        )
    out.print(made)
    for line in plan_lines(plan):
        out.print(line, soft_wrap=True)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The lines below the table."""
    needs, workers = plan["needs"], plan["num_workers"]
    lines = [_summary(plan)]
    if needs["device_bytes"] is not None:
        least, most = needs["device_bytes"]
        a_cell = readable.size(most) if least == most else f"{readable.size(least)} to {readable.size(most)}"
        has = "" if plan["device_memory_gb"] is None else f"; compute.device_memory_gb is {plan['device_memory_gb']:g}"
        lines.append(
            f"memory    {a_cell} a cell at least (weights, gradients, optimizer); {workers} of the largest at a time: "
            f"{readable.size(workers * most)} on one device; activations come on top{has}"
        )
    if needs["disk_bytes"] is not None:
        unknown = needs["num_without_disk_bytes"]
        more = f", {unknown:,} cells not counted" if unknown else ""
        lines.append(f"disk      {readable.size(needs['disk_bytes'])} for the models of the missing cells{more}")
    waiting = [one["node"] for one in plan["shared"] if one["status"] != "cached"]
    num_there = len(plan["shared"]) - len(waiting)
    still = f"; still to make: {', '.join(dict.fromkeys(waiting))}" if waiting else ""
    lines.append(f"shared    {num_there} of {len(plan['shared'])} stages that cells have in common are there{still}")
    if plan["unresolved"]:
        lines.append(f"~         not resolved, so keys may change: {', '.join(plan['unresolved'])}")
    lines += [f"note      {plan['note']}"] if plan["note"] else []
    lines += [f"refused   {plan['refusal']}"] if plan["refusal"] else []
    return lines


def _title(values: dict[str, Any]) -> str:
    return f"{values['sweep']} in {values['store']}"


def _summary(values: dict[str, Any]) -> str:
    text = f"{values['cells']:,} cells, {values['missing']:,} missing"
    return text if not values["missing"] else f"{text}, forecast {_time(values)}"


def _time(values: dict[str, Any]) -> str:
    """`3 h 05 min`, with `+ ?` for cells of which nothing is known."""
    if not values["missing"]:
        return ""
    unknown = values["cells_without_forecast"]
    if unknown == values["missing"]:
        return "unknown"
    return readable.duration(values["seconds"]) + (f" + {unknown:,} unknown" if unknown else "")


def show_recommendation(answer: Recommendation) -> None:
    """A place for every class, with the interval of its optimum and what the choice costs."""
    out = console()
    figures = ("learning rate", "batch", "tokens", "interval", "regret")
    made = table("for", *figures, "flags", title=f"{answer.sweep}, {answer.stage}", right=figures)
    for one in answer.choices:
        interval = "-" if one.low is None or one.high is None else f"{one.low:.2e} to {one.high:.2e}"
        error = "" if one.regret_stderr is None else f" ± {one.regret_stderr:.2f}"
        where = "".join(f", {name}" for name, usual in ((one.size, "base"), (one.arm, "main")) if name != usual)
        made.add_row(
            one.of + where,
            f"{one.learning_rate:.3e}",
            f"{one.effective_batch_size:,}",
            f"{one.max_tokens:,}",
            interval,
            f"{one.regret:.2f}{error}",
            "; ".join(one.flags),
        )
    out.print(made)
    out.print("interval: 95 %, of the best rate at this batch; regret: in standard deviations of the scores of places")
    for note in answer.notes:
        out.print(f"note      {note}", soft_wrap=True)


def show_optima(analysis: Analysis) -> None:
    """The best learning rate of every task, batch and budget."""
    figures = ("log2 batch", "log2 tokens", "log2 best rate", "stderr", "seeds")
    made = table("task", *figures, "flaw", right=figures)
    for task in analysis.tasks:
        for one in task.found.optima:
            best = "-" if math.isnan(one.log2_lr) else f"{one.log2_lr:.2f}"
            error = "-" if math.isnan(one.stderr) else f"{one.stderr:.2f}"
            values = f"{one.log2_batch:.4g}", f"{one.log2_tokens:.4g}", best, error, str(one.num_seeds)
            made.add_row(task.task.task, *values, one.flaw)
    console().print(made)
