"""Runs a recipe without Prefect: the same graph, stages and store, one stage after the other, in this process.

`python -m smoltulu.flows.local RECIPE [field=value ...]` is for machines without a server: jobs of a cluster
(`smoltulu launch`), debugging, and tests that kill it. It has no schedule and pushes nothing.

SIGTERM stops it: the stage that runs writes a checkpoint. Exit status: 0 done, 1 failed, 143 stopped, and may go on.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import plain_handler
from smoltulu.flows.recipe import check_evaluation, load_recipe, parse_overrides
from smoltulu.flows.reporting import RunReport
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.engine.launch import StageFailed, stop_children
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.job import Job

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
        threading.Thread(target=stop_children, args=(self._grace_seconds,), name="stop", daemon=True).start()

    def run(self, job: Job, store: Store, log: logging.Logger) -> ArtifactReference:
        """`run_stage`, unless it was asked to stop."""
        if self.asked:
            raise StageFailed(f"{job.node}: was stopped before it began")
        self._running = job.compute.launcher != "inline"
        try:
            return run_stage(job, store, log)
        finally:
            self._running = False


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m smoltulu.flows.local", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
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
    return _run(graph, store, log, options.nodes, stop)


def _run(graph: Graph, store: Store, log: logging.Logger, nodes: Sequence[str] | None, stop: _Stop) -> int:
    """Run, record and report. Errors: as `run_stage`, but for a stage that was stopped as asked."""
    record = begin_run(store, graph.name if nodes is None else f"{graph.name}-{nodes[0]}", graph, "")
    report = RunReport(graph, store, record)
    made: dict[str, ArtifactReference] = {}
    state, error, began = "Failed", "", time.monotonic()
    try:
        run_graph(graph, store, log, nodes, made, stop.run)
        state = "Completed"
    except BaseException as raised:
        stopped = stop.asked or isinstance(raised, (KeyboardInterrupt, SystemExit))
        state, error = "Cancelled" if stopped else "Failed", str(raised) or repr(raised)
        if not (stop.asked and isinstance(raised, StageFailed)):
            raise
        log.warning("%s", raised)
        return STOPPED
    finally:
        outcomes = {name: reference.outcome for name, reference in made.items()}
        ended = end_run(store, record, state, outcomes)
        _report(report, ended, made, error, log)
        log.info("%s after %.0f s", state.lower(), time.monotonic() - began)
    return 0


def _report(
    report: RunReport, ended: Any, made: Mapping[str, ArtifactReference], error: str, log: logging.Logger
) -> None:
    """Write the page. An error in it must not end a run whose stages are whole."""
    try:
        report.write(ended, list(made.values()), {}, {}, error=error or None)
        end_run(report.store, ended, ended.state, ended.outcomes, report_path=str(report.page))
    except Exception as problem:
        log.warning("no report: %s", problem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
