"""`smoltulu ladder NAME [ACTION]`: a size ladder without a server: run it, see what it costs, write its page again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, echo, fail, failures, print_json, progress_log, table
from smoltulu.flows.cli.store import JsonOption, StoreOption
from smoltulu.flows.cli.sweep import run_to_its_end

if TYPE_CHECKING:
    from smoltulu.schemas.ladder import LadderSettings

Action = Annotated[str, typer.Argument(help="run: what is missing; plan: what it costs; report: write the page again")]
_ACTIONS = ("run", "plan", "report")


def ladder(
    name: Annotated[str, typer.Argument(help="a shipped ladder, or the path of a YAML file")],
    action: Action = "run",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the best learning rate of a large model from sweeps of small ones, and test it on the large one."""
    from smoltulu.tasks.engine.launch import StageFailed

    with failures(StageFailed):
        if action not in _ACTIONS:
            raise ValueError(f"no action {action!r}; there are {', '.join(_ACTIONS)}")
        if as_json and action != "plan":
            raise ValueError("--json goes with plan; the values of a ladder are in ladder.json beside its page")
        asked, root = _opened(name, store)
        if action == "plan":
            _plan(asked, as_json)
        elif action == "report":
            _report(asked, root)
        else:
            _run(asked, root, f"smoltulu ladder {shlex.quote(name)}")


def _opened(name: str, store: Path | None) -> tuple[LadderSettings, Path]:
    """The ladder, and the root of the store that its cells are in."""
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.flows.sweeping.grid import store_of
    from smoltulu.flows.sweeping.ladder import load_ladder

    asked = load_ladder(name)
    if store is not None:
        overrides = asked.proxies.overrides | {"compute.store": str(store.absolute())}
        asked = asked.model_copy(update={"proxies": asked.proxies.model_copy(update={"overrides": overrides})})
    os.chdir(PROJECT)  # a flow runs there, and relative paths start there
    return asked, store_of(asked.proxies)


def _plan(asked: LadderSettings, as_json: bool) -> None:
    from smoltulu.flows.sweeping.ladder import check_hours, forecast_ladder, open_store_of, planned_values

    store = open_store_of(asked, checked=False)
    forecast = forecast_ladder(asked, store)
    if as_json:
        print_json(planned_values(forecast))
        return
    numbers = ("cells", "missing", "time")
    shown = table("block", *numbers, title=f"ladder {asked.name} in {store.root}", right=numbers)
    for block in forecast.blocks:
        seconds = readable.duration(block.seconds) if block.seconds else "-"
        basis = f" ({', '.join(block.bases)})" if block.bases else ""
        shown.add_row(block.name, f"{block.num_cells:,}", f"{block.num_missing:,}", f"{seconds}{basis}")
    console().print(shown)
    echo(f"tokens    {readable.count(forecast.num_tokens)}, {forecast.flops:.2e} FLOPs of trainings")
    if forecast.note:
        echo(f"note      {forecast.note}")
    if (note := check_hours(asked, forecast)) is not None:
        echo(f"note      {note}")


def _report(asked: LadderSettings, root: Path) -> None:
    from smoltulu.flows.sweeping.ladder_results import lines_of, result_of, write_ladder

    for line in lines_of(result_of(asked, root)):
        echo(line)
    echo(f"page      {write_ladder(asked, root)}")


def _run(asked: LadderSettings, root: Path, again: str) -> None:
    from smoltulu.flows.sweeping.ladder import begin_ladder
    from smoltulu.flows.sweeping.ladder_results import lines_of, result_of

    log = progress_log()
    begin_ladder(asked, log)
    _sweep(asked.proxies, again, log)
    predicted = result_of(asked, root)
    for line in lines_of(predicted):
        echo(line)
    if predicted.log2_lr is None:
        _report(asked, root)
        fail("the proxies predict nothing for the target, which was not trained")
    _sweep(asked.confirmation(predicted.log2_lr), again, log)
    _report(asked, root)


def _sweep(sweep: Any, again: str, log: Any) -> None:
    """Run what is missing of a sweep in this process."""
    import logging

    from smoltulu.flows.sweeping.engine import SweepRun, page_at_end

    stage_log = log.getChild("stages")
    stage_log.setLevel(logging.WARNING)
    begun = SweepRun(sweep, sweep.name, log)
    run_to_its_end(begun, stage_log, lambda: page_at_end(begun, log)[0], again, "the lines above say why")
