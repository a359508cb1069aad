"""A recipe as jobs of a cluster, printed: from the plan of what is missing to the text. Submits nothing."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.launching import kubernetes, slurm
from smoltulu.flows.launching.jobs import jobs_of
from smoltulu.flows.launching.settings import Engine, LaunchSettings, check_engine, check_jobs, check_time
from smoltulu.flows.machine.file_systems import doubt_of_locks, is_of_one_machine, mount_of_folder, without_locks
from smoltulu.flows.machine.places import PROJECT, default_home
from smoltulu.flows.machine.rates import rates_of
from smoltulu.flows.planning.plan import Plan, plan
from smoltulu.flows.recipe import check_evaluation
from smoltulu.schemas.recipe import Recipe
from smoltulu.tasks.data.hub import Reference
from smoltulu.tasks.data.sources import expand_path, expand_text
from smoltulu.tasks.engine.stores import open_store


def rendered(recipe: Recipe, until: str | None, engine: Engine, settings: LaunchSettings) -> tuple[str, list[str]]:
    """The script or the manifests, and what the user should know.

    Raises:
        ValueError: a setting that does not fit, a store that the jobs cannot share, nothing left to run.
    """
    check_engine(settings, engine)
    check_evaluation(recipe)
    store = PROJECT / expand_path(recipe.compute.store)
    if engine == "kubernetes":  # whose store this machine need not have
        remote = recipe.compute.remote and expand_text(recipe.compute.remote)
        kubernetes.check(settings, str(expand_path(recipe.compute.store)), remote, list(local_paths(recipe)))
    notes = check_store(store) if engine == "slurm" else []
    graph = Graph(recipe, until, unresolved="keep")
    rates = rates_of(default_home(), recipe.compute.device)
    planned = plan(recipe, until, [], open_store(recipe.compute, checked=False), graph, rates)
    done = [row.node for row in planned.rows if row.status == "cached" and not row.provisional]
    jobs = jobs_of(graph, settings.cpus_per_device, done)
    if not jobs:
        raise ValueError(f"recipe {recipe.name}: the store has every stage, so that no job is left to print")
    check_jobs(jobs, settings)
    notes = [*notes, *check_time(settings, intervals(graph, planned)), *_unpinned(graph)]
    text = recipe_text(recipe, store if engine == "slurm" else None, graph.commits)
    if engine == "kubernetes":
        return kubernetes.render(jobs, settings, name=recipe.name, recipe=text, notes=notes), notes
    folder = default_home() / "launch" / f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    script = slurm.render(
        jobs, settings, name=recipe.name, recipe=text, folder=str(folder), project=str(PROJECT), python=sys.executable,
        notes=notes,
    )  # fmt: skip
    return script, notes


def recipe_text(recipe: Recipe, store: Path | None, commits: Mapping[Reference, str | Exception]) -> str:
    """A recipe as YAML, whole: a preset, a file or a branch on the Hub that changes later changes no job.

    store    its absolute path
    commits  of the Hub's revisions: jobs run days apart, and each would resolve a branch for itself
    """

    def pinned(value: Any) -> Any:
        if isinstance(value, list):
            return [pinned(one) for one in value]
        if not isinstance(value, dict):
            return value
        made = {name: pinned(one) for name, one in value.items()}
        if made.get("repository") and "revision" in made:
            kind: Literal["dataset", "model"] = "dataset" if "split" in made else "model"
            commit = commits.get(Reference(kind, made["repository"], made["revision"]))
            if isinstance(commit, str):
                made["revision"] = commit
        return made

    values = pinned(recipe.model_dump(mode="json"))
    if store is not None:
        values["compute"]["store"] = str(store)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def check_store(store: Path) -> list[str]:
    """ValueError where two machines would write one artifact. A sentence where machines may not see the store."""
    mount = mount_of_folder(store)
    if mount is None:
        return []
    if (why := without_locks(mount)) is not None:
        raise ValueError(
            f"compute.store {store}: {why}, so that two machines would write one artifact; name a folder whose file "
            "system keeps locks (flock) for all machines, or a disk of each machine's own with a shared store behind "
            "it (compute.remote)"
        )
    if is_of_one_machine(mount):
        return [f"compute.store {store} is on {mount.kind}: see that the machines of the cluster share it"]
    doubt = doubt_of_locks(mount)
    return [] if doubt is None else [f"compute.store {store}: {doubt}"]


def _unpinned(graph: Graph) -> Iterator[str]:
    """A sentence where a revision could not be resolved here."""
    if named := [f"{one.repository} at {one.revision}" for one, is_needed in graph.unresolved.items() if is_needed]:
        yield (
            f"{', '.join(named)}: could not be resolved here, so that every job resolves it anew, and one that finds "
            "another commit makes all that follows from it again; write commits into the recipe, or launch with a "
            "network"
        )


def intervals(graph: Graph, planned: Plan) -> dict[str, tuple[float | None, int]]:
    """Training that is left to do -> (seconds between two checkpoints by the forecast, compute.save_steps)."""
    found = {}
    for row in planned.rows:
        node = graph.nodes[row.node]
        if row.status == "cached" or not node.stage.is_training:
            continue
        save_steps, estimate = graph.compute_of(node).save_steps, row.estimate
        seconds = None
        if estimate.seconds is not None and estimate.num_steps:
            seconds = estimate.seconds / estimate.num_steps * min(save_steps, estimate.num_steps)
        found[row.node] = (seconds, save_steps)
    return found


def _is_file(chat_template: str) -> bool:
    """Whether a template is named by its path: else it is one that comes with the package, or the base model's."""
    return chat_template.endswith(".jinja") or "/" in chat_template


def local_paths(recipe: Recipe) -> Iterator[str]:
    """Paths of data, models and templates that the recipe names, with variables expanded."""

    def walk(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key != "fields":  # of rows, whose names may be any
                    yield from walk(inner, str(key))
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner, name)
        elif isinstance(value, str) and (name == "path" or (name == "chat_template" and _is_file(value))):
            yield str(expand_path(value))

    yield from walk(recipe.model_dump(mode="json", exclude={"compute"}), "")
