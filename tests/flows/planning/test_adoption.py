"""Finished work across a change of how rows are read: taken over where the content is the same, and only there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from smoltulu.artifacts.keys import folder_records
from smoltulu.artifacts.store import Found, Store, read_manifest
from smoltulu.flows.graphs.nodes import Binding, Node, NodeGraph
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.planning.adoption import adopt, adoptable, specs_before
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import InputRecord, Manifest, Spec
from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetStageConfig, DataSource
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.stages import STAGES
from tests.example_outputs import example_outputs
from tests.rows_file import write_rows

LOG = logging.getLogger("test")
MESSAGES = [[{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a\u2028b"}] for n in range(3)]


class Nothing(StrictModel):
    """A config without fields."""


class Inputs(StrictModel):
    """One input."""

    dataset: str


class Model(StrictModel):
    """One file."""

    file: str = "weights"


def never(config: Any, inputs: Any, context: Any) -> tuple[BaseModel, dict[str, float]]:
    raise AssertionError("a training that is finished was run again")


def graph_of(folder: Path, *, binding: str | None = "file") -> NodeGraph:
    """Rows by the real stage, and a training on them that must not run."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in MESSAGES))
    graph = NodeGraph("test", ComputeSettings(device="cpu", launcher="inline", min_free_disk_gb=0))
    source = DataSource(path=str(rows), format="messages")
    config = DatasetStageConfig(kind="sft", data=DataSet(sources=(source,)))
    graph.add(Node("rows", STAGES["dataset"], config, externals={"data.0": source_digest(source)}))
    training = Stage("training", 3, Nothing, Inputs, Model, never)
    graph.add(Node("training", training, Nothing(), inputs={"dataset": Binding("rows", binding)}))
    return graph


def finish(
    store: Store, spec: Spec, files: dict[str, str | bytes], outputs: dict[str, Any], inputs: dict[str, InputRecord]
) -> Found:
    """An artifact as the version before left it."""
    output = store.folder(spec) / "made"
    output.mkdir(parents=True)
    for name, text in files.items():
        (output / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return store.commit(
        spec, output,
        lambda records, digest: Manifest(
            key=store.folder(spec).name, spec=spec, digest=digest, inputs=inputs, outputs=outputs,
            metrics={"loss": 0.5}, files=records, environment={}, node="old", started_at="2026-01-01",
            finished_at="2026-01-02", duration_seconds=1.0,
        ),
    )  # fmt: skip


def old_store(folder: Path, graph: NodeGraph, messages: list[Any] = MESSAGES) -> tuple[Store, Found]:
    """Rows and a training on them, under the keys of before."""
    store, before = Store(folder / "store"), specs_before(graph)
    made = write_rows(folder / "before.parquet", [{"messages": turns} for turns in messages], group_rows=2)
    outputs = example_outputs(STAGES["dataset"], {"num_rows": len(messages)}, folder / "example")
    rows = finish(store, before["rows"], {"rows.parquet": made.read_bytes()}, outputs, {})
    record = InputRecord(stage="dataset", key=rows.manifest.key, digest=rows.manifest.digest)
    return store, finish(store, before["training"], {"weights": "w"}, {"file": "weights"}, {"dataset": record})


def statuses(graph: NodeGraph, store: Store) -> list[str]:
    return [outcome.status for outcome in adopt(graph, store, LOG)]


def test_what_was_made_from_the_same_rows_is_taken_over(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    store, old = old_store(tmp_path, graph)
    assert adoptable(graph, "training", specs_before(graph), store) == "3 from other rows files"
    assert statuses(graph, store) == ["made again", "adopted"]
    new = store.find(graph.spec("training"))
    assert isinstance(new, Found) and new.manifest.adopted_from == old.manifest.key
    assert new.manifest.digest == old.manifest.digest and new.manifest.metrics == {"loss": 0.5}
    assert (new.folder / "weights").stat().st_ino == (old.folder / "weights").stat().st_ino, "no second copy on disk"
    assert folder_records(old.folder)["weights"] == old.manifest.files["weights"], "the old one stays"
    assert read_manifest(new.folder) == new.manifest
    # Found as any other artifact is, made from the rows as they are now.
    rows = store.find(graph.spec("rows"))
    assert isinstance(rows, Found)
    assert isinstance(store.find(graph.spec("training"), {"dataset": rows.manifest.digest}), Found)
    assert statuses(graph, store) == ["cached", "cached"]


def test_other_rows_are_noticed(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    other = [MESSAGES[0], MESSAGES[1], [{"role": "user", "content": "q 2"}, {"role": "assistant", "content": "b"}]]
    store, _ = old_store(tmp_path, graph, other)
    *_, training = adopt(graph, store, LOG)
    assert training.status == "left" and "dataset has other content" in training.reason
    assert not isinstance(store.find(graph.spec("training")), Found)


@pytest.mark.parametrize("messages", [MESSAGES[:2], [*MESSAGES, MESSAGES[0]]])
def test_a_row_more_or_less_is_noticed(messages: list[Any], tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    store, _ = old_store(tmp_path, graph, messages)
    assert statuses(graph, store) == ["made again", "left"]


def test_damaged_weights_are_not_adopted(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    store, old = old_store(tmp_path, graph)
    (old.folder / "weights").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be adopted: weights has other bytes"):
        adopt(graph, store, LOG)
    assert not isinstance(store.find(graph.spec("training")), Found)


def test_what_holds_a_record_of_its_inputs_is_made_again(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, binding=None)
    store, _ = old_store(tmp_path, graph)
    assert adoptable(graph, "training", specs_before(graph), store) is None
    assert statuses(graph, store) == ["made again", "left"]


def test_nothing_of_before_is_nothing_to_adopt(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    assert statuses(graph, Store(tmp_path / "store")) == ["left", "left"]


def test_the_keys_of_before_are_those_that_the_version_before_pinned() -> None:
    """Of recipe `tiny`, as golden_keys.json had them before the bump."""
    before = specs_before(Graph(load_recipe("tiny")))
    assert {name: keys_of(before[name]) for name in KEYS_BEFORE} == KEYS_BEFORE


def keys_of(spec: Spec) -> str:
    from smoltulu.artifacts.keys import artifact_key

    return artifact_key(spec)


KEYS_BEFORE = {
    "dataset-sft": "94ca0240ba28169a4caec2001333e52ecc5a3a8924720ac092c602f45464c881",
    "contamination-sft": "69304737fddb5dfce8dc7f220d05a24bef4504f7caaf79ede7ebe729733a5d59",
    "sft": "e36ce4f004d98e8bd5bf353f34d446f0b7aceb73938c9f0c7d86b2d8aa0eaa0b",
    "dpo": "56a697018a3aee93dc225bc00b5b49aab3d80323288188c54d08ce8d4a27fa23",
}
