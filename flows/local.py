"""Runs a recipe without Prefect: the same graph, stages and store, one stage after the other, in this process.

`python -m smoltulu.flows.local RECIPE [field=value ...]` is for debugging, for machines without a server, and for tests
that kill it. It writes no report, has no schedule and pushes nothing.
"""

from __future__ import annotations

import logging
import sys

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import plain_handler
from smoltulu.flows.recipe import check_evaluation, load_recipe, parse_overrides
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store


def run_graph(graph: NodeGraph, store: Store, log: logging.Logger) -> dict[str, ArtifactReference]:
    """Run or find every node of a graph, in its order. Errors: as `run_stage`."""
    references: dict[str, ArtifactReference] = {}
    for name, node in graph.nodes.items():
        upstream = {binding.node: references[binding.node] for binding in node.bindings().values()}
        references[name] = run_stage(graph.job(name, upstream), store, log)
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


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, handlers=[plain_handler(sys.stdout)])
    recipe = load_recipe(arguments[0], parse_overrides(arguments[1:]))
    check_evaluation(recipe)
    log = logging.getLogger("smoltulu.local")
    for note in recipe.batch_notes():
        log.warning(note)
    store = open_store(recipe.compute)
    run_graph(Graph(recipe), store, log)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
