"""`make demo`: runs the recipe `tiny` from end to end on this machine and prints the results.

The demo uses the server of `smoltulu up` if one runs, else it starts one. It always stops what it started. It never
touches a foreign server: if one holds the default port, the demo takes another port.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import WIDTH, console, echo, fail, table
from smoltulu.flows.machine import machine, places, prefect_api
from smoltulu.schemas.run import RunSummary

if TYPE_CHECKING:
    from rich.console import Console

DEPLOYMENT = "smoltulu/tiny"
#: Events that the log lines of the stages already report.
_EVENT = re.compile(r" prefect\.(artifact|task-run)|Finished in state Completed\(")


def demo() -> int:
    """Run the demo; returns the exit code: 0 only if the run completed and its summary can be read."""
    out = console(soft_wrap=True)
    home = places.default_home()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    begin = time.monotonic()
    # Chosen before the run starts, so that an interrupted run and its report can be found.
    name = f"demo-{uuid.uuid4().hex[:6]}"
    running: machine.Machine | None = None
    try:
        server = machine.running(home, "server")
        port = prefect_api.DEFAULT_PORT
        if server is None and not prefect_api.port_is_free(port):
            out.print(f"port {port} is taken by {prefect_api.port_holder(port)}, which is left alone")
            port = prefect_api.free_port()
        running = machine.up(home, None if server else port, say=_say)
        if server is not None and "worker" not in running.started:
            _say("demo      uses the server and the worker that were up already")
        _say(f"demo      {DEPLOYMENT} as run {name}; to look on: {running.url.removesuffix('/api')}\n")
        code = _watch(home, running.url, name)
        path = places.store_root().parent / "reports" / f"tiny-{name}" / "summary.json"
        if code:
            _say(f"\nthe run did not complete; the worker's log: {home / 'logs' / 'worker.log'}")
        if not path.exists():
            _say(f"there is no summary of this run in {path}")
            return code or 1
        show(RunSummary.model_validate_json(path.read_text()), out)
        out.print(f"\n{readable.duration(time.monotonic() - begin)} in all, server and worker included")
        return code
    except machine.MachineError as error:
        fail(error)
    except KeyboardInterrupt:
        _say("\ninterrupted")
        return 130
    finally:
        # A second Ctrl-C must not interrupt the clean-up.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if running is not None:
            _say("")
            if "worker" not in running.started:
                _cancel(running.url, name)
            elif running.started:
                machine.down(home, running.started, _say)


def _leave(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exit that runs `finally`."""
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    echo(text)


def _watch(home: Path, url: str, name: str) -> int:
    """Start the deployment and show its log until it ends; returns Prefect's exit code."""
    environment = machine.child_environment(home, url)
    if not sys.stdout.isatty():
        environment["COLUMNS"] = str(WIDTH)  # else Prefect folds the log at 80
    command = [sys.executable, "-m", "prefect", "deployment", "run", DEPLOYMENT, "--watch", "--flow-run-name", name]
    with subprocess.Popen(
        command, cwd=places.PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as watching:
        assert watching.stdout is not None
        for line in watching.stdout:
            if not _EVENT.search(line):
                print(readable.log_text(line), end="", flush=True)
    return watching.returncode


def _cancel(url: str, name: str) -> None:
    """Cancel the demo's run if it has not ended: a worker that the demo did not start would continue it."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.states import Cancelling

    with prefect_api.client(url) as server:
        for run in server.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name]))):
            if run.state is not None and not run.state.is_final():
                _say(f"cancelling run {name}")
                server.set_flow_run_state(run.id, Cancelling())


def show(summary: RunSummary, out: Console) -> None:
    """Print the scores, the outcome of every stage, and the paths of the model and the report."""
    from smoltulu.tasks.report.summary import score_tables
    from smoltulu.tasks.report.verdict import sentences

    for scores in score_tables(summary.scores):
        columns = scores.columns
        made = table(*scores.names, "n", *columns, title=f"{scores.title}: score ± standard error", right=columns)
        for row in scores.rows:
            num_samples = dict.fromkeys(cell.num_samples for cell in row.cells if cell)
            cells = [cell.value if cell else "" for cell in row.cells]
            made.add_row(*row.names, "/".join(num_samples), *cells)
        out.print(made)

    if summary.verdict.num_tests:
        for pair, said in sentences(summary.verdict):
            out.print(f"{pair}: {said}")
        out.print("points of 100 ± one standard error of the difference, item by item; 5 % for all tests together\n")

    made = table("stage", "outcome", "took", "artifact", title="stages")
    for stage in summary.stages:
        where = _short(stage.path) or stage.error or ""
        made.add_row(stage.node, stage.outcome, readable.duration(stage.seconds), where)
    out.print(made)
    num_cached = sum(stage.outcome == "Cached" for stage in summary.stages)
    out.print(f"{num_cached} of {len(summary.stages)} stages cached")
    for name, what in (("model", summary.published), ("pushed", summary.pushed), ("report", summary.report_path)):
        if what:
            out.print(f"{name:<10}{_short(what)}")


def _short(path: str) -> str:
    """A path, relative to the project if it lies there."""
    return path.removeprefix(f"{places.PROJECT}/")


if __name__ == "__main__":
    sys.exit(demo())
