"""`smoltulu report`: the pages of runs and their index, written again from what is in the store. Needs no server."""

from __future__ import annotations

from typing import Annotated

import typer

from smoltulu.flows.cli.output import echo, failures
from smoltulu.flows.cli.store import StoreOption, open_catalogue


def report(
    run: Annotated[str | None, typer.Argument(help="name of a run; without it: the newest")] = None,
    index: Annotated[bool, typer.Option("--index", help="the index of all runs only")] = False,
    store: StoreOption = None,
) -> None:
    """Write the page of a run, and the index of all runs, again. Runs whose process is gone are said to be killed."""
    from smoltulu.flows.reporting import SUMMARY, mark_killed, reports_of, rewrite, write_index

    with failures():
        if run is not None and index:
            raise ValueError(f"--index is of all runs, {run} is one; give one of the two")
        catalogue = open_catalogue(store)
        root = catalogue.root
        if run is None and not index:
            with_page = (
                one.run_name for one in catalogue.runs() if (reports_of(root) / one.run_name / SUMMARY).exists()
            )
            run = next(with_page, None)
            if run is None:
                raise ValueError(f"no run of {root} has a report yet; `smoltulu runs` lists the runs")
        for name in mark_killed(root):
            echo(f"killed    {name}")
        if run is not None:
            echo(f"report    {rewrite(root, run)}")
        echo(f"index     {write_index(root)}")
