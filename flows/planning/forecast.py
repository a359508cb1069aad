"""What a stage that is about to run will take, for its manifest: forecast against fact is then there for every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from smoltulu.artifacts.nearest import SpecIndex
from smoltulu.artifacts.store import Found, Log, Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.costs import Costs
from smoltulu.schemas.artifact import ArtifactReference, Forecast
from smoltulu.schemas.machine import MachineRates
from smoltulu.schemas.training import TrainingSettings


def forecast_of(
    graph: Graph, store: Store, name: str, made: Mapping[str, ArtifactReference], rates: MachineRates | None
) -> Forecast | None:
    """Of a node whose inputs are there, as `smoltulu plan` would reckon it now; None where nothing is known."""
    costs = Costs(graph, SpecIndex(store.root), rates)
    for before in graph.ancestors(name)[:-1]:
        if (reference := made.get(before)) is not None:
            costs.cached(before, reference.outputs, _rows_bytes(reference))
    digests = {
        dotted: made[one.node].digest for dotted, one in graph.nodes[name].bindings().items() if one.node in made
    }
    checkpoint = store.unfinished(graph.spec(name), digests)
    estimate = costs.estimate(name, checkpoint[0] if checkpoint else 0)
    is_training = isinstance(graph.nodes[name].config, TrainingSettings)
    found = Forecast(
        seconds=estimate.seconds,
        basis=estimate.basis,
        num_steps=estimate.num_steps,
        num_tokens=estimate.num_tokens,
        device_bytes=costs.device_bytes(name) if is_training else None,
        peak_disk_bytes=estimate.peak_disk_bytes,
    )
    return None if found == Forecast() else found


def _rows_bytes(reference: ArtifactReference) -> dict[str, int]:
    """Size of the file of rows of an artifact, by its name."""
    name = str(reference.outputs.get("file", ""))
    file = Path(reference.path) / name
    return {name: file.stat().st_size} if name and file.is_file() else {}


def forecast_if_missing(
    graph: Graph,
    store: Store,
    name: str,
    made: Mapping[str, ArtifactReference],
    rates: MachineRates | None,
    log: Log,
    refresh: bool = False,
) -> Forecast | None:
    """The forecast of a node that is not there yet. An error in it must not keep a stage from running."""
    try:
        bindings = graph.nodes[name].bindings()
        digests = {dotted: made[one.node].digest for dotted, one in bindings.items()}
        if not refresh and isinstance(store.find(graph.spec(name), digests), Found):
            return None
        return forecast_of(graph, store, name, made, rates)
    except Exception as error:
        log.warning("%s: no forecast: %s", name, error)
        return None
