"""Runs a recipe without Prefect: the same graph, stages and store, one stage after the other, in this process.

`python -m smoltulu.flows.local RECIPE [field=value ...]` is for machines without a server: jobs of a cluster
(`smoltulu launch`), debugging, and tests that kill it. It has no schedule and pushes nothing.

SIGTERM stops it: the stage that runs writes a checkpoint. Exit status: 0 done, 1 failed, 143 stopped, and may go on.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import plain_handler
from smoltulu.flows.machine.places import default_home
from smoltulu.flows.machine.rates import rates_of
from smoltulu.flows.planning.forecast import forecast_if_missing
from smoltulu.flows.recipe import check_evaluation, load_recipe, parse_overrides
from smoltulu.flows.reporting import RunReport
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.machine import MachineRates
from smoltulu.tasks.engine.launch import StageFailed, stop_children
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.job import Job

#: Seconds between two looks at whether a stage has begun that is to stop.
_LOOK_EVERY_SECONDS = 0.2
#: 128 + SIGTERM, as a process that ends by it has it.
STOPPED = 143


def run_graph(
    graph: NodeGraph,
    store: Store,
    log: logging.Logger,
    nodes: Sequence[str] | None = None,
    made: dict[str, ArtifactReference] | None = None,
    run: Callable[[Job, Store, logging.Logger], ArtifactReference] = run_stage,
) -> dict[str, ArtifactReference]:
    """Run or find every node of a graph, in its order. Errors: as `run_stage`.

    nodes: these alone, and what they are made from; made: filled as nodes end
    """
    references = {} if made is None else made
    wanted = graph.nodes if nodes is None else {name: None for node in nodes for name in graph.ancestors(node)}
    for name, node in graph.nodes.items():
        if name not in wanted:
            continue
        upstream = {binding.node: references[binding.node] for binding in node.bindings().values()}
        references[name] = run(graph.job(name, upstream), store, log)
        log.info("%s: %s %s", name, references[name].outcome.lower(), references[name].key[:12])
    return references


def run_recorded(graph: NodeGraph, store: Store, log: logging.Logger) -> dict[str, ArtifactReference]:
    """`run_graph`, recorded as a run, so that gc keeps the results. Errors: as `run_stage`."""
    record = begin_run(store, graph.name, graph, "")
    state = "Failed"
    made: dict[str, ArtifactReference] = {}
    try:
        made = run_graph(graph, store, log)
        state = "Completed"
    except KeyboardInterrupt:
        state = "Cancelled"
        raise
    finally:
        end_run(store, record, state, {name: reference.outcome for name, reference in made.items()})
    return made


class _Stop:
    """SIGTERM: the stage that runs is asked to write its checkpoint; where none runs, the process ends."""

    def __init__(self, grace_seconds: float) -> None:
        self.asked = False
        self._grace_seconds, self._running = grace_seconds, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            return
        self.asked = True
        if not self._running:
            raise SystemExit(STOPPED)
        # Not here: this thread listens to the stage, and its last messages must not fill the pipe.
        threading.Thread(target=self._stop, name="stop", daemon=True).start()

    def _stop(self) -> None:
        """Stop the stage, also one that begins only now; at the end of the time this process ends, come what may."""
        deadline = time.monotonic() + self._grace_seconds
        while (left := deadline - time.monotonic()) > 0:
            stop_children(left)
            time.sleep(_LOOK_EVERY_SECONDS)
        print("the time to stop is over", flush=True)
        os._exit(STOPPED)  # while it waits for another producer, or hashes what it made: that is done again

    def run(self, job: Job, store: Store, log: logging.Logger) -> ArtifactReference:
        """`run_stage`, unless this process was asked to stop."""
        if self.asked:
            raise StageFailed(f"{job.node}: was stopped before it began")
        self._running = job.compute.launcher != "inline"
        try:
            return run_stage(job, store, log)
        finally:
            self._running = False


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m smoltulu.flows.local", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a preset's name or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--nodes", nargs="+", help="these alone, and what they are made from; else all")
    parser.add_argument("--grace-seconds", type=float, default=60.0, help="for a checkpoint when it is stopped")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, handlers=[plain_handler(sys.stdout)])
    log = logging.getLogger("smoltulu.local")
    stop = _Stop(options.grace_seconds)
    recipe = load_recipe(options.recipe, parse_overrides(options.overrides))
    check_evaluation(recipe)
    for note in recipe.batch_notes():
        log.warning(note)
    store = open_store(recipe.compute)
    graph = Graph(recipe)
    if unknown := [name for name in options.nodes or () if name not in graph.nodes]:
        parser.error(f"--nodes: the recipe has no node {', '.join(unknown)}; nodes: {', '.join(graph.nodes)}")
    if options.nodes is not None:
        return _run_job(graph, store, log, options.nodes, stop)
    rates, made = rates_of(default_home(), recipe.compute.device), dict[str, ArtifactReference]()
    try:
        run_graph(graph, store, log, made=made, run=partial(_run_forecast, graph, made, rates, stop))
    except StageFailed as error:
        if not stop.asked:
            raise
        log.warning("%s", error)
        return STOPPED
    return 0


def _run_forecast(
    graph: Graph,
    made: Mapping[str, ArtifactReference],
    rates: MachineRates | None,
    stop: _Stop,
    job: Job,
    store: Store,
    log: logging.Logger,
) -> ArtifactReference:
    forecast = forecast_if_missing(graph, store, job.node, made, rates, log)
    return stop.run(replace(job, forecast=forecast), store, log)


def _run_job(graph: Graph, store: Store, log: logging.Logger, nodes: Sequence[str], stop: _Stop) -> int:
    """Run some nodes as a job of a cluster does: recorded, so that gc keeps what it made, and with a page."""
    record = begin_run(store, f"{graph.name}-{nodes[0]}", graph, "")
    rates, made = rates_of(default_home(), graph.compute.device), dict[str, ArtifactReference]()
    state, error, began, status = "Failed", "", time.monotonic(), 1
    try:
        run_graph(graph, store, log, nodes, made, partial(_run_forecast, graph, made, rates, stop))
        state, status = "Completed", 0
    except (ValueError, StageFailed) as raised:
        error = str(raised)
        log.error("%s", error)
        if stop.asked and isinstance(raised, StageFailed):
            state, status = "Cancelled", STOPPED
    except BaseException as raised:
        error = repr(raised)
        raise
    finally:
        _record(RunReport(graph, store, record), state, made, error, log)
        log.info("%s after %.0f s", state.lower(), time.monotonic() - began)
    return status


def _record(
    report: RunReport, state: str, made: Mapping[str, ArtifactReference], error: str, log: logging.Logger
) -> None:
    """Write down how a run ended, and its page. An error in it must not end a run whose stages are whole."""
    try:
        outcomes = {name: reference.outcome for name, reference in made.items()}
        ended = end_run(report.store, report.run, state, outcomes)
        report.write(ended, list(made.values()), {}, {}, error=error or None)
        end_run(report.store, ended, state, outcomes, report_path=str(report.page))
    except Exception as problem:
        log.warning("no report: %s", problem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
