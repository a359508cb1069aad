"""Plans a run: whether each stage is cached, resumes or runs, and why. Needs neither server nor torch.

It works without a network: an unresolved Hub revision stays as written, and keys that depend on it are provisional.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from smoltulu.artifacts import readable
from smoltulu.artifacts.checkpoints import num_steps_of
from smoltulu.artifacts.nearest import Changes, SpecIndex, flat, read_generation
from smoltulu.artifacts.shared.objects import RemoteError
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.adoption import adoptable, specs_before
from smoltulu.flows.planning.costs import Costs
from smoltulu.flows.planning.estimates import NOTHING, Estimate, Total, totals
from smoltulu.flows.planning.preflight_figures import PreflightFigures, preflight_figures
from smoltulu.flows.recipe import check_stage_names, language_notes
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.machine import MachineRates
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.preflight import PreflightConfig, PreflightOutputs
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.data.hub import Reference, is_commit, resolve_commit
from smoltulu.tasks.data.sources import expand_path
from smoltulu.tasks.engine.cells import cells_there
from smoltulu.tasks.engine.environment import drift, environment
from smoltulu.tasks.engine.runner import reference_to
from smoltulu.tasks.models.weights import check_architecture_apart
from smoltulu.tasks.report.text import local_minute
from smoltulu.tasks.trainer.extension import find_source_run

#: A plan stops waiting for a silent Hub sooner than a run.
_HUB_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True)
class NearestArtifact:
    """The finished artifact with the fewest differences. `changes`: dotted field -> (old, new)."""

    key: str
    finished_at: str
    changes: Changes


@dataclass(frozen=True)
class PlanRow:
    """One stage of a plan.

    reason       why it has this status, in words
    provisional  the key depends on an unresolved Hub revision
    notes        differences between now and the time when a cached artifact was made
    step         optimizer step at which it resumes, of num_steps; None if it does not resume
    preflight    figures of the rows of a training; None if their preflight is not cached
    device_bytes  what a training holds at least on every device; None: not known, or no training
    trained      whether it is made from what a training makes: rows that a trained model writes, for example
    """

    node: str
    stage: str
    key: str
    status: Literal["cached", "resumes", "runs"]
    reason: str
    provisional: bool = False
    notes: tuple[str, ...] = ()
    nearest: NearestArtifact | None = None
    step: int | None = None
    num_steps: int | None = None
    estimate: Estimate = NOTHING
    preflight: PreflightFigures | None = None
    device_bytes: int | None = None
    trained: bool = False


class Unresolved(NamedTuple):
    """A Hub revision whose commit is unknown. needed: a run would stop at it; else it skips a benchmark."""

    reference: Reference
    needed: bool
    reason: ValueError


@dataclass(frozen=True)
class Plan:
    """Rows in the order in which stages would run."""

    recipe: str
    store: str
    rows: tuple[PlanRow, ...]
    unresolved: tuple[Unresolved, ...]
    notes: tuple[str, ...]
    totals: Mapping[str, Total]


def plan(
    recipe: Recipe,
    until: str | None,
    refresh: Iterable[str],
    store: Store,
    graph: Graph | None = None,
    rates: MachineRates | None = None,
) -> Plan:
    """Plan a run. Errors: as `Graph`, except for unresolved revisions.

    rates  of the machine that will run it, for stages like which none was run
    """
    refresh = list(refresh)
    check_stage_names(recipe, until, refresh)
    graph = graph or Graph(recipe, until, unresolved="keep", resolve=_resolve)
    index = SpecIndex(store.root)
    costs = Costs(graph, index, rates)
    provisional = _provisional(graph)
    before = specs_before(graph)
    digests: dict[str, str] = {}
    references: dict[str, ArtifactReference] = {}  # of what is here
    preflights: dict[str, Mapping[str, Any]] = {}
    unreachable: tuple[str, ...] = ()
    rows = []
    for name in graph.nodes:
        row, found = _row(graph, store, index, name, digests, refresh, provisional)
        if row.status == "runs" and isinstance(found, Missing) and row.stage not in refresh:
            bindings = graph.nodes[name].bindings()
            if not unreachable and all(binding.node in digests for binding in bindings.values()):
                inputs = {dotted: digests[binding.node] for dotted, binding in bindings.items()}
                try:
                    manifest = store.published(graph.spec(name), inputs)
                except RemoteError as error:
                    manifest, unreachable = None, (f"the shared store was not looked at: {error}",)
                if manifest is not None:
                    reason = f"in the shared store, made {local_minute(manifest.finished_at)}"
                    row = replace(row, status="cached", reason=reason, nearest=None)
                    found = Found(manifest, store.root)
            if row.status == "runs" and (version := adoptable(graph, name, before, store)) is not None:
                row = replace(row, reason=f"made by version {version}; adopt", nearest=None)
            if row.status == "runs" and (said := _cells(graph, store, name, references)):
                row = replace(row, reason=f"{row.reason}; {said}")
        if row.status == "cached":
            assert isinstance(found, Found)
            if found.folder != store.root:
                references[name] = reference_to(found, name, "Cached")
            manifest = found.manifest
            digests[name] = manifest.digest
            costs.cached(name, manifest.outputs, {file: record.size for file, record in manifest.files.items()})
            if graph.nodes[name].stage.makes(PreflightOutputs):
                preflights[name] = manifest.outputs
        else:
            row = replace(row, estimate=costs.estimate(name, row.step or 0, row.num_steps))
        if isinstance(graph.nodes[name].config, TrainingSettings):
            row = replace(row, device_bytes=costs.device_bytes(name))
        rows.append(replace(row, preflight=_figures(graph, name, preflights)))
    notes = (
        *recipe.batch_notes(),
        *recipe.audit_notes(),
        *recipe.evaluation_notes(),
        *recipe.mup_notes(),
        *language_notes(recipe),
        *recipe.near_duplicate_notes(),
        *recipe.sampled_notes(),
        *recipe.selection_notes(),
        *_as_if_longest(costs, rows),
        *_too_large(costs, rows),
        *_by_rates(rates, rows),
        *unreachable,
        *_check_new_base_model(graph, rows),
    )
    errors = {reference: error for reference, error in graph.commits.items() if isinstance(error, ValueError)}
    unresolved = (Unresolved(ref, needed, errors[ref]) for ref, needed in graph.unresolved.items())
    sums = _totals(graph, rows)
    return Plan(recipe.name, str(store.root), tuple(rows), tuple(unresolved), notes, sums)


def _cells(graph: Graph, store: Store, name: str, references: Mapping[str, ArtifactReference]) -> str:
    """How many of the cells of a stage are there already; empty where that cannot be said yet."""
    node = graph.nodes[name]
    if node.stage.cells is None or not {binding.node for binding in node.bindings().values()} <= references.keys():
        return ""
    try:
        there = cells_there(graph.job(name, references), store)
    except (OSError, ValueError):  # a run will say it; of the shared store the plan has said it
        return ""
    new = [cell for cell, found in there.items() if isinstance(found, Missing)]
    few = f": new are {', '.join(new)}" if new and len(new) < len(there) else ""
    return f"{len(there) - len(new)} of {len(there)} measurements are there{few}"


def _resolve(reference: Reference) -> str:
    return resolve_commit(*reference, timeout_seconds=_HUB_TIMEOUT_SECONDS)


def _as_if_longest(costs: Costs, rows: list[PlanRow]) -> Iterator[str]:
    """A sentence where figures are an upper bound, and how to know better."""
    for row in rows:
        if row.node in costs.as_if_longest and row.status != "cached":
            yield (
                f"{row.node}: tokens, FLOPs and time are at most so much, as if each row had "
                f"{costs.as_if_longest[row.node]:,} tokens; a run with selection.method=length "
                f"-p until={row.stage} counts them, without a model"
            )


def _too_large(costs: Costs, rows: list[PlanRow]) -> Iterator[str]:
    """A sentence for every training that is still to do and cannot fit into the machine that the recipe states."""
    for row in rows:
        node = costs.graph.nodes[row.node]
        memory, stated = costs.graph.compute_of(node).device_memory_gb, True
        if memory is None and costs.rates is not None:
            memory, stated = costs.rates.memory_bytes / 1e9, False
        if row.status == "cached" or memory is None or not isinstance(node.config, TrainingSettings):
            continue
        needed = costs.device_bytes(row.node)
        if needed is not None and needed > memory * 1e9:
            compute = costs.graph.compute_of(node)
            part = f"a {compute.num_processes}th of" if compute.is_sharded else "all"
            which = "stated" if stated else "measured"
            has = f"compute.device_memory_gb is {memory:g}" if stated else f"one has {readable.size(memory * 1e9)}"
            yield (
                f"{row.node} cannot run on the {which} machine: every device holds {part} weights, gradients and "
                f"moments of the optimizer in float32, with what else the stage needs {readable.size(needed)} before "
                f"any activation, and {has}. Take a smaller model, devices with more memory"
                + (", or divide it with compute.parallel fsdp2" if part == "all" and compute.num_processes > 1 else "")
                + (
                    f", or add a {node.stage.name}.lora block"
                    if part == "all" and getattr(node.config, "lora", ...) is None
                    else ""
                )
            )


def _by_rates(rates: MachineRates | None, rows: list[PlanRow]) -> Iterator[str]:
    """A sentence where hours are from measured rates, and what is not in them."""
    named = [row.node for row in rows if row.status != "cached" and row.estimate.basis == "measured"]
    if named and rates is not None:
        yield (
            f"time of {', '.join(named)}: nothing like it was run here, so by the rates of {rates.name} (`smoltulu "
            f"doctor --gpu`, {rates.measured_at[:10]}). Loading, saving and what devices tell each other are not in it"
        )


def _check_new_base_model(graph: Graph, rows: list[PlanRow]) -> Iterator[str]:
    """Why a local base model that no run has taken yet could not be checked; ValueError where its weights are wrong."""
    for row in rows:
        config = graph.nodes[row.node].config
        if row.status == "runs" and isinstance(config, ModelSource) and config.path is not None:
            said = check_architecture_apart(expand_path(config.path))
            if said is not None:
                yield said


def _figures(graph: Graph, name: str, preflights: Mapping[str, Mapping[str, Any]]) -> PreflightFigures | None:
    """Figures of the cached preflight of a training node; None for other nodes."""
    node = graph.nodes[name]
    if not isinstance(node.config, TrainingSettings):
        return None
    source = node.bindings()["dataset"].node
    if source not in preflights:
        return None
    config = graph.nodes[source].config
    assert isinstance(config, PreflightConfig)
    compute = graph.compute_of(node)
    return preflight_figures(source, config, preflights[source], node.config, compute)


def _totals(graph: Graph, rows: list[PlanRow]) -> dict[str, Total]:
    """Steps, tokens and FLOPs of the training stages that are not cached; disk and time of all stages that are not."""
    todo = [row for row in rows if row.status != "cached"]
    everything = totals([row.estimate for row in todo], graph.compute.max_parallel_stages)
    training = totals([row.estimate for row in todo if graph.nodes[row.node].stage.is_training])
    return everything | {name: training[name] for name in ("num_steps", "num_tokens", "flops")}


def _row(
    graph: Graph,
    store: Store,
    index: SpecIndex,
    name: str,
    digests: Mapping[str, str],
    refresh: list[str],
    provisional: set[str],
) -> tuple[PlanRow, Found | Missing]:
    """Status of a node and its reason. `digests`: content of the cached upstream nodes."""
    node, spec = graph.nodes[name], graph.spec(name)
    bindings, compute = node.bindings(), graph.compute_of(node)
    waits_for = sorted({binding.node for binding in bindings.values() if binding.node not in digests})
    row: dict[str, Any] = {
        "node": name,
        "stage": node.stage.name,
        "key": graph.key(name),
        "provisional": name in provisional,
        "trained": any(graph.nodes[one].stage.is_training for one in graph.ancestors(name)),
        "status": "runs",
    }
    known = {dotted: digests[binding.node] for dotted, binding in bindings.items() if binding.node in digests}
    found = store.find(spec, known)
    refreshed = node.stage.name in refresh
    checkpoint = store.unfinished(spec, known)
    if isinstance(found, Found) and not waits_for and not refreshed:
        row |= {"status": "cached", "reason": f"made {local_minute(found.manifest.finished_at)}"}
        failures = node.stage.gate_failures_of(found.manifest, node.config)
        row["notes"] = (*drift(found.manifest.environment, environment()), *(f"refused: {one}" for one in failures))
    elif checkpoint is not None:
        step, folder = checkpoint
        # The number in the recipe: the checkpoint may be of a shorter training.
        num_steps = _planned(node.config) or num_steps_of(folder)
        reason = f"at step {step:,}" + (f" of {num_steps:,}" if num_steps else "")
        row |= {"status": "resumes", "reason": reason, "step": step, "num_steps": num_steps}
    elif refreshed:
        row["reason"] = "asked for again (refresh)"
    elif not waits_for and (source := find_source_run(store, spec, node.config, compute, known, index=index)):
        step, num_steps = source.record.step, _planned(node.config)
        reason = f"would go on from step {step:,} of {num_steps:,}, stored by {source.record.key[:12]}"
        row |= {"status": "resumes", "reason": reason, "step": step, "num_steps": num_steps}
    elif isinstance(found, Found):
        row["reason"] = f"cached if {', '.join(waits_for)} comes out the same as before"
    elif found.reason in ("never made", "resumable work is there"):
        near = _nearest(index, spec.model_dump())
        row |= {"nearest": near, "reason": "never made"}
        if near is not None:
            nodes = {f"inputs.{dotted}": binding.node for dotted, binding in bindings.items()}
            row["reason"] = explain(near, nodes, provisional)
    else:
        row["reason"] = f"damaged: {found.reason}" if found.damaged else found.reason
    return PlanRow(**row), found


def _planned(config: BaseModel) -> int | None:
    """Optimizer steps of a training, if its settings give them."""
    return config.budget.max_steps if isinstance(config, TrainingSettings) else None


def _nearest(index: SpecIndex, spec: Mapping[str, Any]) -> NearestArtifact | None:
    for near in index.ranked(spec):
        manifest = read_generation(near.folder)
        if manifest is not None:
            return NearestArtifact(near.key, str(manifest.get("finished_at", "")), near.changes)
    return None


def explain(near: NearestArtifact, nodes: Mapping[str, str], provisional: set[str], num_shown: int = 4) -> str:
    """The differences between a wanted artifact and the nearest one, as text: settings first, old -> new, then inputs.

    nodes        dotted input -> upstream node
    provisional  nodes whose keys depend on unresolved revisions: they may turn out the same
    """
    which = f"{near.key[:12]}" + (f", {near.finished_at[:10]}" if near.finished_at else "")
    open_ones = {name for name, change in near.changes.items() if _is_open(name, change, nodes, provisional)}
    if open_ones == near.changes.keys():
        return f"cached as {which} if the unresolved revisions are still those that it was made from"
    order = ("version", "config.", "externals.", "inputs.")
    names = [name for name in near.changes if name not in open_ones]
    names.sort(key=lambda name: next((i for i, start in enumerate(order) if name.startswith(start)), -1))
    texts = [_difference(name, *near.changes[name], nodes.get(name)) for name in names]
    if len(texts) > num_shown:
        texts = [*texts[:num_shown], f"and {len(texts) - num_shown} more"]
    if open_ones:
        texts.append("perhaps in unresolved revisions")
    return f"differs from the nearest ({which}) in " + ", ".join(texts)


def _is_open(name: str, change: tuple[object, object], nodes: Mapping[str, str], provisional: set[str]) -> bool:
    old, new = change
    if name in nodes:
        return nodes[name] in provisional and old is not None
    return name.endswith("revision") and is_commit(str(old)) and new is not None and not is_commit(str(new))


def _difference(name: str, old: object, new: object, node: str | None) -> str:
    section, _, field = name.partition(".")
    if section == "inputs":
        if new is None:
            return f"it had an input {field} besides"
        last = field.rpartition(".")[2]
        which = f"input {last}" if last == node else f"input {last} ({node})"
        return f"{which} is new" if old is None else f"{which} is another artifact"
    if section == "externals":
        what = _external(field)
        return f"{what} is new" if old is None else f"it read {what}" if new is None else f"{what} has another content"
    return f"{'stage version' if name == 'version' else field}: {_short(old)} -> {_short(new)}"


def _external(name: str) -> str:
    """What an external of a spec stands for, in words."""
    task, _, number = name.rpartition("data.")
    if number.isdigit():
        return f"the data of {task.rstrip('.')}" if task else "your data" if number == "0" else f"your data ({name})"
    if name.endswith(".definition"):
        return f"the definition of {name.removesuffix('.definition')}"
    words = {"base_model": "the folder of the base model"}
    return words.get(name, name.replace("_", " "))


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 and not is_commit(text) else f"{text[:12]}…"


def _provisional(graph: Graph) -> set[str]:
    """Nodes whose key, or an upstream key, depends on an unresolved revision."""
    found: set[str] = set()
    if not graph.unresolved:
        return found
    names = {(reference.repository, reference.revision) for reference in graph.unresolved}
    for name, node in graph.nodes.items():
        config = flat(graph.spec(name).config)
        own = {
            (value, config.get(dotted.removesuffix("repository") + "revision"))
            for dotted, value in config.items()
            if dotted.endswith("repository")
        }
        if names & own or any(binding.node in found for binding in node.bindings().values()):
            found.add(name)
    return found
