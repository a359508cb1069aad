"""Output of `smoltulu plan`: a table and its totals, or everything as JSON."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, print_json, table
from smoltulu.flows.machine.places import default_home
from smoltulu.flows.machine.rates import rates_of
from smoltulu.flows.planning.plan import Plan, PlanRow, Unresolved, plan
from smoltulu.flows.planning.preflight_figures import PreflightFigures
from smoltulu.flows.recipe import check_evaluation, load_recipe
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.verifier_audit import VerifierAuditOutputs
from smoltulu.tasks.data.hub import HubUnreachable
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.stages import STAGES

if TYPE_CHECKING:
    from rich.table import Table

#: Fields of `Estimate` that are shown: heading and format.
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "num_rows": ("rows", "{:,}".format),
    "num_steps": ("steps", "{:,}".format),
    "num_tokens": ("tokens", readable.count),
    "flops": ("FLOPs", "{:.2e}".format),
    "peak_disk_bytes": ("disk", readable.size),
    "seconds": ("time", readable.duration),
}
_COLOURS = {"cached": "green", "resumes": "yellow", "runs": "cyan"}
_UNKNOWN = "-"
_NUM_NAMED = 4


def make_plan(recipe: str, overrides: dict[str, object], until: str | None, refresh: list[str]) -> Plan:
    """The plan of a recipe in its own store. ValueError or OSError for what the user has to fix."""
    checked = load_recipe(recipe, overrides)
    check_evaluation(checked)
    rates = rates_of(default_home(), checked.compute.device)
    return plan(checked, until, refresh, open_store(checked.compute, checked=False), rates=rates)


def run_parameters(recipe: str, overrides: Mapping[str, object]) -> str:
    """Parameters of `prefect deployment run` for the planned recipe: its name or absolute path, and the overrides."""
    given = [f"recipe={recipe}"] + ([f"overrides={json.dumps(overrides, default=str)}"] if overrides else [])
    return " ".join(f"-p {shlex.quote(text)}" for text in given)


def plan_arguments(recipe: str, overrides: Sequence[str]) -> str:
    """Recipe and overrides of a command line of ours, as they were given."""
    return shlex.join([recipe, *(text for override in overrides for text in ("-o", override))])


def show(planned: Plan, as_json: bool, parameters: str = "", arguments: str = "") -> None:
    """Print a plan. `parameters`, `arguments`: as for `summary`."""
    if as_json:
        print_json(as_dict(planned))
        return
    from rich.text import Text

    columns = [
        name for name in _FIGURES if any(getattr(r.estimate, name) is not None for r in planned.rows if _todo(r))
    ]
    figures = [_FIGURES[name][0] for name in columns] + ["memory"] * any(_memory(row) for row in planned.rows)
    title, headings = f"{planned.recipe} in {planned.store}", ("stage", "what", "why", *figures, "key")
    stages = table(*headings, title=title, right=figures, whole=(*figures, "key"))
    for row in planned.rows:
        cells = [_figure(name, getattr(row.estimate, name)) if _todo(row) else "" for name in columns]
        cells += [_memory(row)] * ("memory" in figures)
        status = Text.assemble((row.status, _COLOURS[row.status]), "*" if row.notes else "")
        stages.add_row(row.node, status, row.reason, *cells, row.key[:12] + ("~" if row.provisional else ""))
    out = console()
    out.print(stages)
    if any(row.preflight for row in planned.rows):
        out.print(_preflights(planned))
    for line in summary(planned, parameters, arguments):
        out.print(line, soft_wrap=True)  # a command that is broken into lines cannot be copied


def _memory(row: PlanRow) -> str:
    """Of a device: what the dry run used, where it ran; else what a training holds at least. Empty: not known."""
    if not _todo(row):
        return ""
    if row.preflight is not None and row.preflight.peak_memory_bytes is not None:
        return readable.size(row.preflight.peak_memory_bytes)
    return "" if row.device_bytes is None else f"> {readable.size(row.device_bytes)}"


def _preflights(planned: Plan) -> Table:
    """A table of the figures that the finished preflights report for their trainings."""
    headings = ("rows", "too long", "trained", "tokens/epoch", "longest", "steps", "peak memory")
    made = table("training", *headings, "dry run made with", title="preflight", right=headings, whole=headings)
    for row in planned.rows:
        if (figures := row.preflight) is None:
            continue
        overlong = figures.num_overlong / max(figures.num_source_rows, 1)
        made.add_row(
            row.node,
            f"{figures.num_rows:,} of {figures.num_source_rows:,}",
            f"{readable.percent(overlong)} {figures.fate}" if overlong else "none",
            _UNKNOWN if figures.trained_share is None else readable.percent(figures.trained_share),
            readable.count(figures.num_tokens),
            f"{figures.longest:,} of {figures.max_length:,}",
            _figure("num_steps", figures.num_steps),
            _UNKNOWN if figures.peak_memory_bytes is None else readable.size(figures.peak_memory_bytes),
            _made_with(figures),
        )
    return made


def _made_with(figures: PreflightFigures) -> str:
    run = figures.dry_run
    if run is None:
        return "no dry run"
    parts = [run["device"], run["precision"], f"{run['per_device_train_batch_size']} rows"]
    if run["tokens_per_device"] is not None:
        auto = " (auto)" if run["asked_tokens"] == "auto" else ""
        parts.append(f"micro-batches of up to {run['tokens_per_device']:,} tokens{auto}")
    parts += [name for name in ("activation_checkpointing", "packing") if run[name]]
    parts += [f"LoRA of rank {run['lora_r']}"] if run["lora_r"] else []
    if figures.notes:
        parts.append("now other: " + ", ".join(figures.notes))
    return ", ".join(parts)


def summary(planned: Plan, parameters: str = "", arguments: str = "") -> list[str]:
    """The lines below the table: counts, totals, and what is uncertain.

    parameters  see `run_parameters`; without it the recipe is given by its name
    arguments   of `smoltulu plan`, as they were given; without them the recipe is given by its name
    """
    counts = Counter(str(row.status) for row in planned.rows)
    lines = [", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status])]
    if counts["cached"] < len(planned.rows):
        lines.append("still to do: " + _still_to_do(planned))
    preflights = [row for row in planned.rows if STAGES[row.stage].makes(PreflightOutputs) and not row.trained]
    if any(row.reason.endswith("; adopt") for row in planned.rows):
        lines.append(
            f"adopt: rows were stored in other files before. `smoltulu adopt {arguments or planned.recipe}` makes them "
            "again, compares, and takes over what was made from the same ones"
        )
    audits = [row for row in planned.rows if STAGES[row.stage].makes(VerifierAuditOutputs)]
    if missing := [row.node for row in preflights if row.status != "cached"]:
        lines.append(
            f"preflight not run yet: {', '.join(missing)}; `prefect deployment run smoltulu/full "
            f"{parameters or f'-p recipe={planned.recipe}'} -p until=preflight` makes it in minutes, before any "
            "training"
        )
    elif missing := [row.node for row in audits if row.status != "cached"]:
        lines.append(
            f"verifiers not audited yet: `prefect deployment run smoltulu/full "
            f"{parameters or f'-p recipe={planned.recipe}'} -p until={missing[0].replace('-', '_')}` does it in minutes"
        )
    drifted: dict[str, list[str]] = {}
    for row in planned.rows:
        for note in row.notes:
            drifted.setdefault(note, []).append(row.node)
    for note, nodes in drifted.items():
        which = "all that are cached" if len(nodes) == counts["cached"] > _NUM_NAMED else ", ".join(nodes)
        lines.append(f"* made with something else than now: {note} ({which})")
    return lines + _unresolved(planned.unresolved) + list(planned.notes)


def _still_to_do(planned: Plan) -> str:
    parts = []
    for name, (heading, _) in _FIGURES.items():
        if name == "num_rows":
            continue  # read several times by several stages
        value, num_unknown = planned.totals[name]
        if value:
            more = f" (and {num_unknown} stages unknown)" if num_unknown else ""
            parts.append(f"{heading} {_figure(name, value)}{more}")
    return " · ".join(parts) or "nothing alike was finished here, so no estimate"


def _unresolved(items: Sequence[Unresolved]) -> list[str]:
    """Revisions without a known commit, and why. A Hub that did not answer is reported once."""
    if not items:
        return []
    silent = [item for item in items if isinstance(item.reason, HubUnreachable)]
    lines = ["~ provisional: the key hangs on a Hub revision whose commit is not known"]
    if silent:
        names = [f"{item.reference.repository}@{item.reference.revision}" for item in silent[:_NUM_NAMED]]
        more = f" and {len(silent) - _NUM_NAMED} more (--json names all)" if len(silent) > _NUM_NAMED else ""
        lines += [f"  {silent[0].reason}", f"  not resolved: {', '.join(names)}{more}"]
    lines += [f"  {item.reason}" for item in items if item not in silent]
    if needed := sum(item.needed for item in items):
        lines.append(f"  a run would stop at its start: it needs {needed} of {len(items)} that are not resolved")
    return lines


def as_dict(planned: Plan) -> dict[str, Any]:
    """A plan as plain JSON values; unknown values are null."""
    rows = []
    for row in planned.rows:
        record = asdict(row)
        record["estimate"] = asdict(row.estimate) if _todo(row) else None
        if row.nearest is not None:
            changes = {name: {"old": old, "new": new} for name, (old, new) in row.nearest.changes.items()}
            record["nearest"]["changes"] = changes
        rows.append(record)
    return {
        "recipe": planned.recipe,
        "store": planned.store,
        "stages": rows,
        "totals": {name: total._asdict() for name, total in planned.totals.items()},
        "unresolved": [
            {**item.reference._asdict(), "needed": item.needed, "reason": str(item.reason)}
            for item in planned.unresolved
        ],
        "notes": list(planned.notes),
    }


def _figure(name: str, value: float | None) -> str:
    return _UNKNOWN if value is None else _FIGURES[name][1](value)


def _todo(row: PlanRow) -> bool:
    return row.status != "cached"
