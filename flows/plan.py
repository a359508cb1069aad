"""What a recipe would do, per stage, and why: cached, resumes, or runs. Needs neither server nor torch."""

from __future__ import annotations

from dataclasses import dataclass

from artifacts.store import Found, Store, newest_checkpoint
from flows.graph import Graph
from flows.recipe import check_stage_names
from schemas.recipe import Recipe

_SHOWN_CHANGES = 4


@dataclass(frozen=True)
class PlanRow:
    """One stage of a plan. status: cached, resumes, or runs."""

    node: str
    stage: str
    key: str
    status: str
    reason: str


def plan(recipe: Recipe, until: str | None, refresh: list[str], store: Store) -> list[PlanRow]:
    """Rows in the order in which stages would run. Errors: as `Graph`."""
    check_stage_names(recipe, until, refresh)
    graph = Graph(recipe, until)
    digests: dict[str, str] = {}
    rows = []
    for name, node in graph.nodes.items():
        spec = graph.spec(name)
        bindings = node.bindings()
        new_inputs = sorted({binding.node for binding in bindings.values() if binding.node not in digests})
        inputs = {dotted: digests[binding.node] for dotted, binding in bindings.items() if binding.node in digests}
        found = store.find(spec, inputs)
        folder = store.folder(spec)
        checkpoint = newest_checkpoint(folder / "work" / "checkpoints")
        if isinstance(found, Found) and not new_inputs and node.stage.name not in refresh:
            digests[name] = found.manifest.digest
            status, reason = "cached", f"made {found.manifest.finished_at}"
        elif checkpoint is not None:
            status, reason = "resumes", f"at step {checkpoint[0]}"
        elif node.stage.name in refresh:
            status, reason = "runs", "asked for again (refresh)"
        elif isinstance(found, Found):
            status, reason = "runs", f"unless {', '.join(new_inputs)} comes out the same as before"
        else:
            status, reason = "runs", _why(store, graph, name, found.reason)
        rows.append(PlanRow(name, node.stage.name, graph.key(name), status, reason))
    return rows


def _why(store: Store, graph: Graph, name: str, reason: str) -> str:
    """The fields in which the nearest finished artifact differs, old -> new; upstream keys are named by their input."""
    nearest = store.nearest(graph.spec(name)) if reason == "never made" else None
    if nearest is None:
        return reason
    changes = []
    for field, (old, new) in nearest[1].items():
        if field.startswith("inputs."):
            changes.append(f"{field.removeprefix('inputs.')} is another artifact")
        else:
            changes.append(f"{field.removeprefix('config.')}: {old} -> {new}")
    more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
    return "differs from the nearest in " + ", ".join(changes[:_SHOWN_CHANGES]) + more
