"""The report of a run of a graph, from the store that it ran in."""

from __future__ import annotations

from pathlib import Path

from smoltulu.artifacts.store import Found, Store
from smoltulu.flows.graphs.nodes import NodeGraph
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.report import html_report, summarise
from smoltulu.tasks.stages import made_by


def report_of(graph: NodeGraph, made: dict[str, ArtifactReference], store: Store) -> str:
    """HTML of the nodes that were made."""
    manifests = {}
    for node in made:
        found = store.find(graph.spec(node))
        assert isinstance(found, Found)
        manifests[node] = found.manifest
    run = summarise(
        run_name="probe", recipe="tiny", state="Completed", started_at="2026-11-01T10:00:00+00:00",
        finished_at="2026-11-01T10:01:00+00:00",
        planned=[(node, (stage := graph.nodes[node].stage.name), made_by(stage)) for node in made],
        made=[(made[node], manifests[node]) for node in made],
    )  # fmt: skip
    return html_report(run, manifests, {node: Path(reference.path) for node, reference in made.items()}, "")
