"""Adopts finished artifacts after a change of how rows are read: a training whose rows are the same need not run again.

`Stage.reencodes` marks a stage whose `version` was raised although many of its rows are as before.
`Stage.same_externals` lists texts that changed without a change of meaning. Both change the key of the stage and of
everything made from it. This module computes the keys from before the change, and stores old artifacts under the new
keys.

Nothing is assumed to be the same. Rows are made again, which takes minutes, and compared with the old ones. A training
is adopted only if every input has the content that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.store import Found, Log, Store
from smoltulu.flows.graphs.nodes import Node, NodeGraph
from smoltulu.schemas.artifact import ArtifactReference, Spec
from smoltulu.tasks.data.rows import same_rows
from smoltulu.tasks.engine.adopt import adopt_artifact
from smoltulu.tasks.engine.runner import reference_to, run_stage


@dataclass(frozen=True)
class Outcome:
    """Outcome for a node. `reason`: why it is left, or what it was adopted from."""

    node: str
    status: Literal["cached", "adopted", "made again", "left"]
    reason: str


def specs_before(graph: NodeGraph) -> dict[str, Spec]:
    """Node -> its spec before the change, for the nodes whose key changed."""
    specs: dict[str, Spec] = {}
    keys: dict[str, str] = {}
    for name, node in graph.nodes.items():
        now = graph.spec(name)
        inputs = node.filled(lambda binding: keys[binding.node])
        externals = {field: node.stage.same_externals.get(digest, digest) for field, digest in now.externals.items()}
        version = node.stage.reencodes or node.stage.version
        before = now.model_copy(update={"version": version, "inputs": inputs, "externals": externals})
        keys[name] = artifact_key(before)
        if keys[name] != graph.key(name):
            specs[name] = before
    return specs


def adoptable(graph: NodeGraph, name: str, before: Mapping[str, Spec], store: Store) -> str | None:
    """The version under which a node was finished before the change; None if `adopt` cannot adopt it."""
    node = graph.nodes[name]
    if name not in before or not isinstance(store.find(before[name]), Found):
        return None
    if node.stage.reencodes:
        return str(node.stage.reencodes)
    sources = [(graph.nodes[binding.node].stage, binding) for binding in node.bindings().values()]
    if any(stage.reencodes and binding.output is None for stage, binding in sources):
        return None  # it holds a record of them
    return f"{node.stage.version} from other rows files"


def adopt(graph: NodeGraph, store: Store, log: Log) -> list[Outcome]:
    """Adopt unchanged artifacts, stage by stage. All others stay where they are and will run.

    Errors: as `run_stage` (the rows are made again here), OSError if the store cannot be written.
    """
    before = specs_before(graph)
    references: dict[str, ArtifactReference] = {}
    outcomes = []
    for name, node in graph.nodes.items():
        missing = sorted({binding.node for binding in node.bindings().values()} - references.keys())
        if missing:
            outcomes.append(Outcome(name, "left", f"waits for {', '.join(missing)}"))
            continue
        job = graph.job(name, references)
        found = store.find(job.spec, job.input_digests)
        if isinstance(found, Found):
            references[name] = reference_to(found, name, "Cached")
            outcomes.append(Outcome(name, "cached", "is there"))
            continue
        old = store.find(before[name]) if name in before else None
        if not isinstance(old, Found):
            outcomes.append(Outcome(name, "left", "nothing of the version before is there"))
        elif node.stage.reencodes:
            references[name] = run_stage(job, store, log)
            outcomes.append(Outcome(name, "made again", f"to be compared with {old.manifest.key[:12]}"))
        elif (other := _other_input(node, old, references, graph, before, store)) is not None:
            outcomes.append(Outcome(name, "left", f"its input {other} has other content than before"))
        else:
            references[name] = reference_to(adopt_artifact(job, old, store, log), name, "Cached")
            outcomes.append(Outcome(name, "adopted", f"from {old.manifest.key[:12]}"))
    return outcomes


def _other_input(
    node: Node,
    old: Found,
    references: Mapping[str, ArtifactReference],
    graph: NodeGraph,
    before: Mapping[str, Spec],
    store: Store,
) -> str | None:
    """The first input whose content differs from that of the old artifact's input; None if all are the same."""
    for dotted, binding in node.bindings().items():
        made_from, now = old.manifest.inputs.get(dotted), references[binding.node]
        if made_from is None:
            return dotted
        if made_from.digest == now.digest:
            continue
        stage = graph.nodes[binding.node].stage
        upstream = store.find(before[binding.node]) if binding.node in before else None
        if (
            # The reader of a whole folder (the lineage of a publication) uses more than its rows.
            binding.output is None
            or not stage.reencodes
            or not isinstance(upstream, Found)
            or upstream.manifest.digest != made_from.digest
            or not same_rows(
                upstream.folder / getattr(stage.outputs_of(upstream.manifest), binding.output),
                Path(now.path) / now.outputs[binding.output],
            )
        ):
            return dotted
    return None
