"""`smoltulu sweep NAME [ACTION]`: run a sweep, look at it, extend it, and what it says. Needs no server."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from smoltulu.flows.cli.output import echo, fail, failures, progress_log
from smoltulu.flows.cli.store import JsonOption, StoreOption

if TYPE_CHECKING:
    from smoltulu.schemas.sweep import SweepSettings


class _WithDefault(TyperGroup):
    """NAME alone, or NAME and options, is NAME run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and (len(args) == 1 or args[1].startswith("-")):
            args = [args[0], "run", *args[1:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WithDefault,
    help="A grid of trainings over learning rate, batch, budget and seed. NAME alone runs what is missing of it.",
    no_args_is_help=True,
)


@app.callback()
def _named(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a shipped sweep, or the path of a YAML file")],
) -> None:
    context.obj = name


def _opened(context: typer.Context, store: Path | None) -> tuple[SweepSettings, Path]:
    """The sweep, and the root of the store that its cells are in. ValueError for what the user has to fix."""
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.sweeping.grid import load_sweep, store_of

    sweep = load_sweep(context.obj)
    if store is not None:
        sweep = sweep.model_copy(update={"overrides": sweep.overrides | {"compute.store": str(store.absolute())}})
    os.chdir(PROJECT)  # a flow runs there, and relative paths start there
    return sweep, store_of(sweep)


@app.command()
def run(
    context: typer.Context,
    block: Annotated[list[str] | None, typer.Option("--block", help="this block only; may be repeated")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="start no cell that is not forecast to end by then; run again to go on")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="what the stages of every cell say as well")] = False,
    store: StoreOption = None,
) -> None:
    """Run the cells that have no scores yet, in this process, and write the page. Ctrl-C loses no finished cell.

    The exit code is 1 if a cell failed, 130 after Ctrl-C.
    """
    import logging

    from smoltulu.flows.sweeping.engine import SweepRun, write_page_at_end
    from smoltulu.flows.sweeping.local import run_here
    from smoltulu.tasks.engine.launch import StageFailed

    log = progress_log()
    stage_log = log.getChild("stages")
    stage_log.setLevel(logging.INFO if verbose else logging.WARNING)

    def page() -> str:
        written = write_page_at_end(begun, log)
        if written:
            echo(f"page      {written}")
        return written

    with failures(StageFailed):
        sweep, _ = _opened(context, store)
        begun = SweepRun(sweep, sweep.name, log, blocks=block or (), minutes=minutes)
        again = f"smoltulu sweep {shlex.quote(context.obj)}"
        try:
            state = run_here(begun, stage_log, page)
        except (KeyboardInterrupt, SystemExit) as stop:
            echo(f"stopped   {begun.counted()}; `{again}` goes on", err=True)
            raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None
    echo(f"cells     {begun.counted()}")
    if state == "Failed":
        fail(f"cells failed; `{again} status` says why, `{again}` runs them again")


@app.command()
def status(context: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show how many cells are pending, running, failed, diverged and done, block by block."""
    raise NotImplementedError


@app.command()
def plan(context: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show blocks, cells, hours and memory before anything runs."""
    raise NotImplementedError


@app.command()
def extend(context: typer.Context, store: StoreOption = None) -> None:
    """Add a block to the sweep in this store."""
    raise NotImplementedError


@app.command()
def report(context: typer.Context, store: StoreOption = None) -> None:
    """Write the page again, from what is done so far. Nothing is run."""
    from smoltulu.flows.sweeping.results import write_page

    with failures():
        sweep, root = _opened(context, store)
        echo(f"page      {write_page(sweep, root)}")


@app.command()
def export(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="table of all cells and scores: .parquet or .csv")] = None,
    optuna: Annotated[Path | None, typer.Option(help="journal file of a new Optuna study")] = None,
    store: StoreOption = None,
) -> None:
    """Write every cell and every score into a table, or into an Optuna study."""
    from smoltulu.flows.sweeping.results import export_table

    with failures():
        if file is None and optuna is None:
            raise ValueError("name what to write: a table (cells.parquet, cells.csv), or --optuna study.journal")
        file = file and file.absolute()
        sweep, root = _opened(context, store)
        if file is not None:
            echo(f"wrote     {export_table(sweep, root, file):,} rows to {file}")


def _weights(texts: list[str]) -> dict[str, float] | None:
    """`task=weight` or `class=weight` texts."""
    weights = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) is None:
            raise ValueError(f"--weight {text!r}: write a task and a number from 0 on, e.g. arc_challenge=2")
        if name in weights:
            raise ValueError(f"--weight {name} is given twice; keep one")
        weights[name] = float(value)
    return weights or None


@app.command()
def recommend(
    context: typer.Context,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", "-w", help="what a task counts, e.g. gsm8k=2; may be repeated")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="write it as a recipe patch (YAML)")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which learning rate and batch to train with, for each class of tasks or for a weighting of yours."""
    from smoltulu.flows.sweeping.results import recommend as recommended

    with failures():
        to = to and to.absolute()
        sweep, root = _opened(context, store)
        recommended(sweep, root, _weights(weight or []))
        raise NotImplementedError


@app.command("import")
def import_(
    context: typer.Context,
    optuna: Annotated[Path, typer.Option(help="journal file of an Optuna study")],
    store: StoreOption = None,
) -> None:
    """Judge the trials of an Optuna study as if they were cells of this sweep. Nothing is written into the store."""
    raise NotImplementedError
