"""The commands about the store: runs, show, verify, gc, tag, untag. None needs a server, none imports torch."""

from __future__ import annotations

import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, echo, fail, failures, print_json, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.text import Text

    from smoltulu.artifacts.manifests import Ref
    from smoltulu.artifacts.upkeep.catalogue import Catalogue
    from smoltulu.artifacts.upkeep.gc import Plan
    from smoltulu.artifacts.upkeep.verify import Finding
    from smoltulu.schemas.run import RunRecord

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="folder of the store; default: SMOLTULU_STORE, else artifacts/store")
]
JsonOption = Annotated[bool, typer.Option("--json", help="everything, as JSON")]
_NUM_REMOVALS_SHOWN = 40
_NUM_NOTES_SHOWN = 5


def runs(
    limit: Annotated[int, typer.Option(min=1, help="newest runs only")] = 20,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of the pipeline, newest first: state, stages, scores of the last model, disk."""
    from smoltulu.flows.cli.store_views import run_values, runs_table

    catalogue = open_catalogue(store)
    found = catalogue.runs()
    values = [run_values(catalogue, run) for run in found[:limit]]
    if as_json:
        print_json(values)
    elif not values:
        echo(f"no runs yet in {catalogue.root}")
    else:
        out = console()
        out.print(runs_table(values))
        if len(found) > limit:
            out.print(f"{len(found) - limit} earlier runs; --limit shows more")
    _print_notes(catalogue)


def show(
    what: Annotated[str, typer.Argument(help="first digits of a key (4 or more), a tag, or a run's name")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an artifact (what it is, what it was made from, what was made from it) or a run."""
    from smoltulu.artifacts.upkeep.lineage import descendants
    from smoltulu.flows.cli import store_views
    from smoltulu.schemas.run import RunRecord

    catalogue = open_catalogue(store)
    with failures():
        found = catalogue.resolve(what)
        if isinstance(found, RunRecord):
            details = store_views.run_details(catalogue, found)
        else:
            details = store_views.artifact_details(catalogue, found)
    if not as_json:
        is_run = isinstance(found, RunRecord)
        console().print(store_views.run_view(details) if is_run else store_views.artifact_view(catalogue, details))
    else:
        if not isinstance(found, RunRecord):
            details["descendants"], _ = descendants(catalogue, found)
            for name in ("ancestors", "descendants"):
                details[name] = [store_views.relative_values(relative) for relative in details[name]]
        print_json(details)
    _print_notes(catalogue)


def verify(
    what: Annotated[list[str] | None, typer.Argument(help="keys, tags or runs; default: everything")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="leave damaged artifacts where they are")] = False,
    store: StoreOption = None,
) -> None:
    """Read every byte and compare it with the manifests. Damaged artifacts are set aside, to be made again.

    The exit code is 1 if anything is damaged or cannot be read.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from smoltulu.artifacts.upkeep.verify import verify_artifacts, verify_tags

    catalogue = open_catalogue(store)
    refs = _refs(catalogue, what)
    out = console()
    total = None
    if out.is_terminal:
        total = sum(catalogue.generation(ref, name).num_bytes for ref in refs for name in catalogue.folder(ref).whole)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    began = time.monotonic()
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        findings = []
        tags = () if what else verify_tags(catalogue)
        for finding in chain(verify_artifacts(catalogue, refs, report_only=report_only), tags):
            findings.append(finding)
            progress.advance(bar, finding.num_bytes)
            if finding.status != "ok":
                out.print(_finding_text(finding))
    seconds = time.monotonic() - began
    counts = Counter(finding.status for finding in findings)
    num_bytes = sum(finding.num_bytes for finding in findings)
    parts = [
        f"{counts[status]} {status}" for status in ("ok", "damaged", "unreadable", "other version") if counts[status]
    ]
    read, rate = readable.size(num_bytes), readable.size(num_bytes / max(seconds, 1e-9))
    verdict = ", ".join(parts) or "nothing to verify"
    out.print(f"{verdict}; {read} in {readable.duration(seconds)}, {rate}/s")
    _print_notes(catalogue)
    if counts["damaged"] or counts["unreadable"]:
        raise typer.Exit(1)


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="remove; without it nothing is changed")] = False,
    keep_days: Annotated[float, typer.Option(min=0, help="keep what was used, or worked on, in so many days")] = 30.0,
    keep_runs: Annotated[int, typer.Option(min=0, help="keep everything of the newest runs")] = 5,
    keep_published: Annotated[
        bool, typer.Option(help="keep every artifact of the publish stage and what it was made from")
    ] = True,
    every: Annotated[bool, typer.Option("--all", help="list everything that would go")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what can be removed from the store, and why the rest stays; with --yes, remove it."""
    from smoltulu.artifacts.upkeep.gc import Rules, plan_gc
    from smoltulu.artifacts.upkeep.removal import remove
    from smoltulu.schemas.publish import PublishOutputs
    from smoltulu.tasks.stages import STAGES

    catalogue = open_catalogue(store)
    publishing = frozenset(name for name, stage in STAGES.items() if stage.makes(PublishOutputs))
    with failures():
        plan = plan_gc(catalogue, Rules(keep_days, keep_runs, publishing if keep_published else frozenset()))
    out = console(quiet=as_json)
    _print_plan(out, plan, every)
    outcome = remove(plan, catalogue.root) if yes else None
    skipped = outcome.skipped if outcome else []
    for removal, reason in skipped:
        out.print(f"left {_name(removal.ref)} {removal.kind}: {reason}")
    if as_json:
        names = ("names", "kind", "reason", "num_bytes")
        print_json(
            {
                "removals": [
                    {"ref": _name(removal.ref, 64), **{name: getattr(removal, name) for name in names}}
                    for removal in plan.removals
                ],
                "kept": {_name(ref, 64): reason for ref, reason in plan.kept.items()},
                "num_bytes": plan.num_bytes,
                "num_bytes_freed": outcome.num_bytes if outcome else 0,
                "skipped": [[_name(removal.ref, 64), reason] for removal, reason in skipped],
            }
        )
    elif not plan.removals:
        out.print("nothing to remove")
    elif outcome is not None:
        out.print(f"freed {readable.size(outcome.num_bytes)}")
    else:
        out.print(f"would free {readable.size(plan.num_bytes)}; nothing was changed, --yes removes it")
    _print_notes(catalogue)
    if skipped:
        raise typer.Exit(1)


def tag(
    name: Annotated[str, typer.Argument(help="e.g. best-dpo")],
    what: Annotated[str, typer.Argument(help="first digits of a key, or another tag")],
    move: Annotated[bool, typer.Option("--move", help="move the name from the artifact that has it now")] = False,
    store: StoreOption = None,
) -> None:
    """Give an artifact a name; gc keeps it and everything that it was made from."""
    from smoltulu.artifacts.upkeep.tags import set_tag
    from smoltulu.schemas.run import RunRecord

    catalogue = open_catalogue(store)
    with failures():
        found = catalogue.resolve(what)
        if isinstance(found, RunRecord):
            fail(f"{what!r} is a run; tag one of its artifacts (`smoltulu show {what}` lists their keys)")
        before = set_tag(catalogue, name, found, move=move)
    moved = f" (before: {before.stage}/{before.key[:12]})" if before and (before.stage, before.key) != found else ""
    echo(f"{name} is {_name(found)}{moved}")


def untag(name: Annotated[str, typer.Argument()], store: StoreOption = None) -> None:
    """Remove a tag; the artifact stays until gc finds that nothing else keeps it."""
    from smoltulu.artifacts.upkeep.tags import remove_tag

    catalogue = open_catalogue(store)
    with failures():
        before = remove_tag(catalogue, name)
    echo(f"{name} removed" + (f"; it was {before.stage}/{before.key[:12]}" if before else ""))


COMMANDS = (runs, show, verify, gc, tag, untag)


def _print_plan(out: Console, plan: Plan, every: bool) -> None:
    shown = plan.removals if every else sorted(plan.removals, key=lambda r: -r.num_bytes)[:_NUM_REMOVALS_SHOWN]
    listed = table("goes", "what", "why", "frees")
    for removal in shown:
        names = "" if removal.kind in ("artifact", "unfinished work") else f" {', '.join(removal.names)}"
        listed.add_row(_name(removal.ref), removal.kind + names, removal.reason, readable.size(removal.num_bytes))
    if shown:
        out.print(listed)
    if len(shown) < len(plan.removals):
        out.print(f"the largest {len(shown)} of {len(plan.removals)}; --all lists all")
    stages = sorted({ref.stage for ref in plan.kept_bytes} | {removal.ref.stage for removal in plan.removals})
    sums = table("stage", "stays", "", "goes", "")
    for stage in stages:
        kept = [num_bytes for ref, num_bytes in plan.kept_bytes.items() if ref.stage == stage]
        going = [removal.num_bytes for removal in plan.removals if removal.ref.stage == stage]
        stays, goes = readable.size(sum(kept)), readable.size(sum(going))
        sums.add_row(stage or "(root)", str(len(kept)), stays, str(len(going)), goes)
    if stages:
        out.print(sums)
    reasons = Counter(plan.kept.values())
    for reason, count in reasons.most_common(None if every else _NUM_REMOVALS_SHOWN):
        out.print(f"stays: {count} · {reason}")


def _finding_text(finding: Finding) -> Text:
    from rich.text import Text

    colour = {"damaged": "red", "unreadable": "red"}.get(finding.status, "yellow")
    faults = "; ".join(finding.faults[:3]) + (f" and {len(finding.faults) - 3} more" if len(finding.faults) > 3 else "")
    aside = f" ({finding.aside})" if finding.aside else ""
    return Text.assemble((finding.status, colour), f" {_name(finding.ref)} {finding.name}: {faults}{aside}")


def _refs(catalogue: Catalogue, what: list[str] | None) -> list[Ref]:
    """The artifacts that the user names; all artifacts if he names none."""
    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.schemas.run import RunRecord

    if not what:
        return catalogue.refs
    refs: list[Ref] = []
    for name in what:
        with failures():
            found = catalogue.resolve(name)
        if isinstance(found, RunRecord):
            refs += refs_of_run(found).values()
        else:
            refs.append(found)
    return list(dict.fromkeys(refs))


def ref_of(catalogue: Catalogue, what: str, kind: str, nodes_of: Callable[[RunRecord], dict[str, Ref]]) -> Ref:
    """The artifact that a tag, first digits of a key, or RUN:STAGE names.

    kind, nodes_of: what a run has of it, in words and by stage as a user writes it. ValueError says what there is.
    """
    from smoltulu.schemas.run import RunRecord

    name, colon, stage = what.rpartition(":")
    found = catalogue.resolve(name if colon else what)
    if not isinstance(found, RunRecord):
        return found
    nodes, stage = nodes_of(found), stage.replace("_", "-")
    if colon and stage in nodes:
        return nodes[stage]
    given = f"has no {kind} of {stage!r}" if colon else "is a whole run"
    names = ", ".join(f"{found.run_name}:{one}" for one in nodes)
    raise ValueError(f"{found.run_name} {given}; name one of its models: {names}")


def finished(catalogue: Catalogue, ref: Ref) -> tuple[Path, dict[str, Any]]:
    """Folder of its newest generation, and the manifest. ValueError where it is not finished."""
    newest = catalogue.folder(ref).newest
    if newest is None:
        raise ValueError(f"{_name(ref)} is not finished; run it first")
    return catalogue.path(ref) / newest, catalogue.manifest(ref, newest)


def open_catalogue(store: Path | None) -> Catalogue:
    """The given store, else the default store of recipes."""
    from smoltulu.artifacts.upkeep.catalogue import Catalogue

    with failures():
        if store is None:
            from smoltulu.flows.machine.places import store_root

            store = store_root()
        return Catalogue(store)


def _name(ref: Ref, num_digits: int = 12) -> str:
    return f"{ref.stage}/{ref.key[:num_digits]}" if ref.key else ref.stage or "(root)"


def _print_notes(catalogue: Catalogue) -> None:
    """Print what was passed over to standard error, so that --json prints only JSON."""
    for note in catalogue.notes[:_NUM_NOTES_SHOWN]:
        echo(f"note: {note}", err=True)
    if len(catalogue.notes) > _NUM_NOTES_SHOWN:
        echo(f"note: and {len(catalogue.notes) - _NUM_NOTES_SHOWN} more", err=True)
