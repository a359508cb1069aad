"""`smoltulu sweep NAME [ACTION]`: run a sweep, look at it, extend it, and what it says. Needs no server."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from smoltulu.flows.cli.output import echo, fail, failures, print_json, progress_log
from smoltulu.flows.cli.store import JsonOption, StoreOption

if TYPE_CHECKING:
    from smoltulu.flows.sweeping.engine import SweepRun
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
    return _open(context.obj, store)


def _command(context: typer.Context, store: Path | None, action: str = "") -> str:
    """What to type next, in the same store."""
    words = ["smoltulu", "sweep", context.obj, *([action] if action else [])]
    return shlex.join([*words, *(["--store", str(store)] if store else [])])


def _open(name: str, store: Path | None) -> tuple[SweepSettings, Path]:
    """The sweep, and the root of the store that its cells are in. ValueError for what the user has to fix."""
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.sweeping.grid import load_sweep, store_of

    sweep = load_sweep(name)
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

    from smoltulu.flows.sweeping.engine import SweepRun, page_at_end
    from smoltulu.tasks.engine.launch import StageFailed

    log = progress_log()
    stage_log = log.getChild("stages")
    stage_log.setLevel(logging.INFO if verbose else logging.WARNING)

    def page() -> str:
        written, words = page_at_end(begun, log)
        for line in ([f"page      {written}"] if written else []) + words:
            echo(line)
        return written

    with failures(StageFailed):
        sweep, _ = _opened(context, store)
        begun = SweepRun(sweep, sweep.name, log, blocks=block or (), minutes=minutes)
        why = f"`{_command(context, store, 'status')}` says why"
        run_to_its_end(begun, stage_log, page, _command(context, store), why)


def run_to_its_end(begun: SweepRun, stage_log: Any, page: Callable[[], str], again: str, why: str) -> None:
    """Run what is missing in this process, and say what it came to. Exits where a cell failed, or it was stopped.

    again  the command that goes on; why  where a failed cell's message stands, as a sentence
    """
    from smoltulu.flows.sweeping.local import run_here

    try:
        state = run_here(begun, stage_log, page)
    except (KeyboardInterrupt, SystemExit) as stop:
        echo(f"stopped   {begun.counted()}; `{again}` goes on", err=True)
        raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None
    echo(f"cells     {begun.counted()}")
    if state == "Failed":
        fail(f"cells failed; {why}, `{again}` runs them again")


@app.command()
def status(context: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show how many cells of each block are done, diverged, running, pending and failed, why, and the time left."""
    from smoltulu.flows.cli.sweep_views import show_status
    from smoltulu.flows.sweeping.overview import status_of

    with failures():
        values = status_of(*_opened(context, store))
    print_json(values) if as_json else show_status(values)


@app.command()
def plan(context: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show blocks, cells, hours, memory and disk before anything runs. As `smoltulu plan NAME`."""
    show_plan_of(context.obj, store, as_json)


def show_plan_of(name: str, store: Path | None, as_json: bool) -> None:
    """Plan a sweep and show it."""
    from smoltulu.flows.cli.sweep_views import show_plan
    from smoltulu.flows.sweeping.overview import plan_of

    with failures():
        values = plan_of(*_open(name, store))
    print_json(values) if as_json else show_plan(values)


class _WithLists(TyperCommand):
    """`--seeds 3 4` is `--seeds 3 --seeds 4`, negative numbers too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread, option = list[str](), ""
        for text in args:
            if text.startswith("--"):
                option = text if text in ("--seeds", "--rates", "--batches", "--budgets") else ""
                spread.append(text)
            elif option and re.fullmatch(r"-?\d+(\.\d+)?", text):
                spread += [text] if spread[-1] == option else [option, text]
            else:
                spread.append(text)
        return super().parse_args(ctx, spread)


@app.command(cls=_WithLists)
def extend(
    context: typer.Context,
    seeds: Annotated[list[int] | None, typer.Option(help="e.g. --seeds 3 4")] = None,
    rates: Annotated[list[float] | None, typer.Option(help="log2 of learning rates, e.g. --rates -9 -8")] = None,
    batches: Annotated[list[float] | None, typer.Option(help="log2 of batch sizes, e.g. --batches 2 7")] = None,
    budgets: Annotated[list[int] | None, typer.Option(help="tokens (rlvr: episodes), e.g. --budgets 250000")] = None,
    like: Annotated[
        str | None, typer.Option(help="block whose other axes it takes; the first one unless given")
    ] = None,
    edges: Annotated[
        int | None, typer.Option(min=1, help="at most so many cells, where a best learning rate is the last one")
    ] = None,
    best: Annotated[
        int | None, typer.Option(min=1, help="with --seeds: only in so many best places of each task class")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the blocks, and write nothing")] = False,
    store: StoreOption = None,
) -> None:
    """Add cells to the sweep in this store: the axes of a block, but for those that are given; or rates beyond edges.

    The sweep's own file stays as it is: blocks are written into extension.yaml of the sweep's folder, where every
    command and run of this store finds them. Nothing is run.
    """
    import yaml

    from smoltulu.flows.sweeping import extension

    with failures():
        sweep, root = _opened(context, store)
        axes = {"seeds": seeds, "rates": rates, "batches": batches, "budgets": budgets}
        given = [name for name, axis in axes.items() if axis]
        if bool(given) == bool(edges):
            raise ValueError("give what to add: --seeds, --rates, --batches, --budgets; or --edges with a number")
        if best and given != ["seeds"]:
            raise ValueError("--best says where --seeds are added, and nothing else; give --seeds with it")
        if (edges or best) and like:
            raise ValueError(f"--like {like} has no meaning with --edges or --best; leave it out")
        added = extension.add(
            sweep, root, like=like, edges=edges, best=best, dry_run=dry_run,
            seeds=seeds or (), rates=rates or (), batches=batches or (), budgets=budgets or (),
        )  # fmt: skip
        for block in added.blocks:
            echo(yaml.safe_dump([extension.written(block)], sort_keys=False, default_flow_style=None).rstrip())
    where = "not written (--dry-run)" if dry_run else f"written to {added.file}"
    echo(f"added     {added.num_cells:,} cells, {where}")
    if not dry_run:
        echo(f"run       {_command(context, store)}")


@app.command()
def report(context: typer.Context, store: StoreOption = None) -> None:
    """Write the page again, from what is done so far, and say its verdicts. Nothing is run."""
    from smoltulu.flows.sweeping.results import write_page

    with failures():
        sweep, root = _extended(context, store)
        page, words = write_page(sweep, root)
    for line in [f"page      {page}", *words]:
        echo(line)


def _extended(context: typer.Context, store: Path | None) -> tuple[SweepSettings, Path]:
    """The sweep with what was added to it in this store, and the root of the store."""
    from smoltulu.flows.sweeping.extension import with_extension
    from smoltulu.flows.sweeping.states import sweep_folder

    sweep, root = _opened(context, store)
    return with_extension(sweep, sweep_folder(root, sweep.name)), root


@app.command()
def export(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="table of all cells and scores: .parquet or .csv")] = None,
    optuna: Annotated[Path | None, typer.Option(help="journal file to write, which Optuna's dashboard shows")] = None,
    store: StoreOption = None,
) -> None:
    """Write every cell and every score into a table, or into Optuna studies (one for each budget, size and arm)."""
    from smoltulu.flows.sweeping.extension import known_of
    from smoltulu.flows.sweeping.optuna_study import export_study
    from smoltulu.flows.sweeping.results import export_table
    from smoltulu.flows.sweeping.states import states_of, sweep_folder

    with failures():
        if file is None and optuna is None:
            raise ValueError("name what to write: a table (cells.parquet, cells.csv), or --optuna study.journal")
        file, optuna = file and file.absolute(), optuna and optuna.absolute()
        sweep, root = _extended(context, store)
        if file is not None:
            echo(f"wrote     {export_table(sweep, root, file):,} rows to {file}")
        if optuna is not None:
            folder = sweep_folder(root, sweep.name)
            states = states_of(root, folder, known_of(sweep, folder))
            echo(f"wrote     {export_study(sweep, root, states, optuna):,} trials to {optuna}")


def _weights(texts: list[str]) -> dict[str, float] | None:
    """`task=weight` or `class=weight` texts."""
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) is None:
            raise ValueError(f"--weight {text!r}: write a task or class and a number from 0 on, e.g. gsm8k=2")
        if name in weights:
            raise ValueError(f"--weight {name} is given twice; keep one")
        weights[name] = float(value)
    return weights or None


@app.command()
def recommend(
    context: typer.Context,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", help="what a task or class counts, e.g. gsm8k=2; may be repeated"),
    ] = None,
    of: Annotated[str | None, typer.Option(help="class whose place --to writes; the first answer unless given")] = None,
    to: Annotated[Path | None, typer.Option(help="recipe to write: extends the sweep's, with that place")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which learning rate and batch to train with: for each class of tasks, for all, for a weighting of yours."""
    from smoltulu.flows.cli.sweep_views import show_recommendation
    from smoltulu.flows.sweeping.results import recommend as recommended

    with failures():
        if of is not None and to is None:
            raise ValueError(f"--of {of} says which place --to writes; give --to as well, or leave it out")
        to = to and to.absolute()
        if to is not None and to.exists():
            raise ValueError(f"{to} exists already, and is left as it is; name another file")
        answer = recommended(*_extended(context, store), _weights(weight or []))
        named = [choice.of for choice in answer.choices]
        if of is not None and of not in named:
            raise ValueError(f"--of {of!r}: there is no answer for it; there are {', '.join(named)}")
        if to is not None:
            with to.open("x") as stream:
                stream.write(answer.as_yaml(named.index(of) if of else 0))
    if as_json:
        print_json(answer.model_dump(mode="json"))
        return
    show_recommendation(answer)
    if to is not None:
        echo(f"wrote     {to}, for {of or named[0]}")


@app.command("import")
def import_(
    context: typer.Context,
    optuna: Annotated[Path, typer.Option(help="journal file of an Optuna study")],
    study: Annotated[str | None, typer.Option(help="of several in the file; all of arm main unless given")] = None,
    store: StoreOption = None,
) -> None:
    """Judge the trials of an Optuna study as if they were cells of this sweep. Nothing is written into the store."""
    from smoltulu.flows.cli.sweep_views import show_optima
    from smoltulu.flows.sweeping.optuna_study import import_study
    from smoltulu.flows.sweeping.results import verdict_lines
    from smoltulu.tasks.surface.analysis import analyse

    with failures():
        optuna = optuna.absolute()
        sweep, _ = _opened(context, store)
        scores = import_study(sweep, optuna, study)
        analysis = analyse("main", [(one.task, one.cells) for one in scores], is_scan=sweep.kind == "scan")
    show_optima(analysis)
    for line in verdict_lines(analysis):
        echo(line)
