"""The nodes of the block `selection`: who scores, the heads that are masked, scores of each source, what is kept.

Rows are scored as they are read, a source at a time and before any check, so that a new source scores only itself and
another mixture scores nothing. What is kept is chosen behind all checks: scores find their rows by content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from smoltulu.flows.graphs.nodes import Binding, NodeGraph
from smoltulu.flows.graphs.sampled_nodes import Add, Parts
from smoltulu.schemas.data import DataSet, DatasetKind
from smoltulu.schemas.selection import SET_KINDS, SelectedSet, SelectionSettings
from smoltulu.tasks.stages import STAGES

#: Adds the node of a data set that is read: name, kind, set.
Read = Callable[[str, DatasetKind, DataSet], str | None]
#: Adds the node that checks it for contamination: its rows, name, kind. Returns the rows where nothing is checked.
Check = Callable[[str, str, DatasetKind], str]

HEADS = "selection-heads"


def add_selection_nodes(
    graph: NodeGraph,
    add: Add,
    settings: SelectionSettings,
    name: SelectedSet,
    data: DataSet,
    rows: str,
    *,
    base: str,
    selector: str,
    read: Read,
    check: Check,
    template: Parts,
) -> str | None:
    """The node of what is kept of a set; None where it comes after the last stage that is asked for.

    rows      node of the set, all checks behind it
    base      node whose tokens are counted
    selector  node of the model that scores; `base` where there is no other
    template  literals and externals: the recipe's
    """
    heads: dict[str, Binding] = {}
    if settings.method == "attention_influence":
        inputs = {"model": Binding(selector, "folder")}
        stage = STAGES["selection_heads"]
        if HEADS not in graph.nodes and add(HEADS, stage, settings.heads_config(), inputs=inputs, **template) is None:
            return None
        heads = {"heads": Binding(HEADS, "heads_file")}
    who: dict[str, Binding] = {"tokenizer": Binding(base, "folder"), **heads}
    if settings.scorer != "counts":
        who["model"] = Binding(selector, "folder")
    if settings.method == "rds_plus":
        who |= _targets(graph, settings, SET_KINDS[name], read, check)
    scores: dict[str, Binding] = {}
    for number in range(len(data.sources)):
        made = _scores(add, settings, name, number, data, who, read, template)
        if made is None:
            return None
        scores[str(number)] = Binding(made, "scores_file")
    labels = tuple(source.label for source in data.sources)
    return add(
        f"selected-{name}",
        STAGES["selection"],
        settings.stage_config(SET_KINDS[name], labels),
        inputs={"dataset": Binding(rows, "file"), "scores": scores, **heads},
    )


def _scores(
    add: Add,
    settings: SelectionSettings,
    name: SelectedSet,
    number: int,
    data: DataSet,
    who: Mapping[str, Binding],
    read: Read,
    template: Parts,
) -> str | None:
    """The node of the scores of one source, which is read by itself: its key hangs on no other source."""
    kind, source = SET_KINDS[name], data.sources[number]
    # The node of the whole set judges how many rows may be malformed.
    alone = DataSet(
        sources=(source,), max_malformed_share=1.0, expected_rows=data.expected_rows if len(data.sources) == 1 else None
    )
    own = read(f"{name}-{number}", kind, alone)
    if own is None:
        return None
    inputs: dict[str, Any] = {"dataset": Binding(own, "file"), **who}
    config = settings.scores_config(kind)
    return add(f"influence-{name}-{number}", STAGES["selection_scores"], config, inputs=inputs, **template)


def _targets(
    graph: NodeGraph, settings: SelectionSettings, kind: DatasetKind, read: Read, check: Check
) -> dict[str, Binding]:
    """Inputs: rows that the kept ones are to be like, and what benchmarks say of them where the recipe has an index."""
    assert settings.targets is not None
    rows = read("targets", kind, settings.targets)
    if rows is None:
        return {}
    checked = "contamination-targets" if "contamination-targets" in graph.nodes else check(rows, "targets", kind)
    inputs = {"targets": Binding(rows, "file")}
    return inputs if checked == rows else inputs | {"targets_hits": Binding(checked)}
