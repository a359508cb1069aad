"""The nodes of one entry of the block `sampled`: samples of a model, their scores, the rows that are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel

from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph
from smoltulu.flows.graphs.references import References
from smoltulu.flows.graphs.stage_configs import (
    sample_scores_config,
    sampled_rows_config,
    samples_config,
    template_parts,
)
from smoltulu.schemas.sampled import SampledSettings
from smoltulu.tasks.models.chat_template import load_chat_template
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.stages import STAGES

#: Adds a node, or returns None where its stage comes after the last one that is asked for.
Add = Callable[..., str | None]
#: Literals and externals.
Parts = Mapping[str, Mapping[str, str]]


def node_name(kind: str, entry: str) -> str:
    """Of a node of an entry."""
    return f"{kind}-{entry}".replace("_", "-")


@dataclass(frozen=True)
class EntryNodes:
    """The nodes that an entry takes: the model that writes, rows with its prompts, the reward model if it scores."""

    model: str
    rows: str
    reward_model: str | None


def add_sampled_nodes(
    graph: NodeGraph,
    add: Add,
    name: str,
    entry: SampledSettings,
    nodes: EntryNodes,
    references: References,
    template: Parts,
    verifiers: Mapping[str, str],
) -> str | None:
    """The node of the rows; None where they come after the last stage that is asked for.

    template   literals and externals: the recipe's
    verifiers  externals: their version
    """
    asked_with = template
    if entry.chat_template is not None:
        assert entry.checkpoint is not None
        read = partial(references.text_of_model, entry.checkpoint)
        asked_with = template_parts(load_chat_template(entry.chat_template, read))
    inputs = {"model": Binding(nodes.model, "folder"), "dataset": Binding(nodes.rows, "file")}
    written = _once(
        graph, add, node_name("samples", name), STAGES["samples"], samples_config(entry), inputs, asked_with
    )
    if written is None:
        return None
    parts: dict[str, dict[str, str]] = {"literals": {}, "externals": {}}
    inputs = {"samples": Binding(written, "file")}
    if nodes.reward_model is not None:
        inputs["reward_model"] = Binding(nodes.reward_model, "folder")
        parts = {kind: dict(texts) for kind, texts in template.items()}
    after: tuple[str, ...] = ()
    if entry.score == "verifier":
        parts["externals"] |= verifiers
        # Where the recipe has its verifiers tried, none is trusted before.
        after = tuple(one for one, node in graph.nodes.items() if node.stage is STAGES["verifier_audit"])
    config = sample_scores_config(entry)
    scores = _once(graph, add, node_name("sample-scores", name), STAGES["sample_scores"], config, inputs, parts, after)
    if scores is None:
        return None
    return add(
        node_name("sampled-rows", name),
        STAGES["sampled_rows"],
        sampled_rows_config(entry),
        inputs={"samples": Binding(written, "file"), "scores": Binding(scores, "file")},
    )


def _once(
    graph: NodeGraph,
    add: Add,
    name: str,
    stage: Stage,
    config: BaseModel,
    inputs: Mapping[str, Binding],
    parts: Parts,
    after: tuple[str, ...] = (),
) -> str | None:
    """The node, or that of another entry which makes the same artifact: two rules may choose from the same samples."""
    wanted: dict[str, Any] = {"inputs": dict(inputs), **{kind: dict(texts) for kind, texts in parts.items()}}
    for node in graph.nodes.values():
        if node.stage is stage and node.config == config and _parts(node) == wanted:
            return node.name
    return add(name, stage, config, after=after, **wanted)


def _parts(node: Node) -> dict[str, Any]:
    return {name: dict(getattr(node, name)) for name in ("inputs", "literals", "externals")}
