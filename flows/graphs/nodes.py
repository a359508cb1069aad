"""A graph of stages: nodes, their inputs, their artifact keys, and the jobs that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from smoltulu.artifacts.keys import artifact_key
from smoltulu.schemas.artifact import ArtifactReference, InputRecord, Spec
from smoltulu.schemas.common import StrictModel, scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.data.hub import Reference
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import Stage


def hub_reference(source: DataSource) -> Reference:
    """The Hub reference of a data source that has a repository."""
    assert source.repository is not None
    return Reference("dataset", source.repository, source.revision)


def local_digests(sources: Iterable[DataSource]) -> dict[str, str]:
    """`externals` of a node that reads these sources: the content digests of the local ones, by position."""
    return {f"data.{number}": source_digest(source) for number, source in enumerate(sources) if source.path is not None}


@dataclass(frozen=True)
class Binding:
    """An input from another node: the file or folder in one of its outputs, or its whole artifact folder."""

    node: str
    output: str | None = None


@dataclass(frozen=True)
class Node:
    """One stage of one recipe.

    inputs     input field -> binding, or name -> binding for fields that hold several
    literals   input field -> plain value (the text of the chat template); its digest is in `externals`
    externals  name -> content digest or resolved revision of an input from outside the store
    after      nodes that must succeed before it begins, although it takes no input from them
    """

    name: str
    stage: Stage
    config: BaseModel
    inputs: Mapping[str, Binding | Mapping[str, Binding]] = field(default_factory=dict)
    literals: Mapping[str, str] = field(default_factory=dict)
    externals: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def bindings(self) -> dict[str, Binding]:
        """Dotted name -> binding."""
        flat = {}
        for name, value in self.inputs.items():
            if isinstance(value, Binding):
                flat[name] = value
            else:
                flat.update({f"{name}.{inner}": binding for inner, binding in value.items()})
        return flat

    def filled(self, value_of: Callable[[Binding], str]) -> dict[str, Any]:
        """`inputs` with a value in place of every binding."""
        return {
            name: value_of(value)
            if isinstance(value, Binding)
            else {inner: value_of(one) for inner, one in value.items()}
            for name, value in self.inputs.items()
        }


class NodeGraph:
    """Nodes in an order in which every node comes after its inputs. Keys need no run."""

    def __init__(self, name: str, compute: ComputeSettings) -> None:
        """`name` appears in records and reports; `compute` says how stages run."""
        self.name = name
        self.compute = compute
        self.nodes: dict[str, Node] = {}
        self._keys: dict[str, str] = {}

    def add(self, node: Node) -> str:
        """Add a node and return its name. ValueError if a binding does not exist, or its stage takes other inputs."""
        for dotted, binding in node.bindings().items():
            upstream = self.nodes.get(binding.node)
            if upstream is None:
                raise ValueError(
                    f"{node.name}: its input {dotted} is bound to {binding.node}, which is no node before it"
                )
            there = upstream.stage.outputs.model_fields
            if binding.output is not None and binding.output not in there:
                raise ValueError(
                    f"{node.name}: its input {dotted} is bound to {binding.node}.{binding.output}, and the outputs of "
                    f"stage {upstream.stage.name} are {', '.join(there)}; bind it to one of these, or to the whole "
                    "folder"
                )
        given, taken = {*node.inputs, *node.literals}, node.stage.inputs.model_fields
        needed = {name for name, info in taken.items() if info.is_required()}
        if not needed <= given <= taken.keys():
            raise ValueError(
                f"{node.name}: has the inputs {sorted(given)}; stage {node.stage.name} needs {sorted(needed)} and "
                f"takes {sorted(taken)}"
            )
        self.nodes[node.name] = node
        return node.name

    def add_made(self, name: str, stage: Stage, key: str) -> str:
        """Add a node of an artifact that is there already, made by another graph: it is known by its key alone."""
        self.nodes[name] = Node(name, stage, StrictModel())
        self._keys[name] = key
        return name

    def spec(self, name: str) -> Spec:
        """The spec of a node: its key is the digest of it."""
        node = self.nodes[name]
        return Spec(
            stage=node.stage.name,
            version=node.stage.version,
            config=scientific(node.config),
            inputs=node.filled(lambda binding: self.key(binding.node)),
            externals=dict(node.externals),
        )

    def key(self, name: str) -> str:
        """Artifact key of a node."""
        if name not in self._keys:
            self._keys[name] = artifact_key(self.spec(name))
        return self._keys[name]

    def keys(self) -> dict[str, str]:
        """Artifact key of every node."""
        return {name: self.key(name) for name in self.nodes}

    def ancestors(self, name: str) -> list[str]:
        """A node and everything that it is made from, in graph order."""
        wanted = {name}
        for candidate in reversed(self.nodes):
            if candidate in wanted:
                wanted |= {binding.node for binding in self.nodes[candidate].bindings().values()}
        return [candidate for candidate in self.nodes if candidate in wanted]

    def compute_of(self, node: Node) -> ComputeSettings:
        """How a node is run, with a per-device batch that divides its effective batch."""
        size = node.config.effective_batch_size if isinstance(node.config, TrainingSettings) else None
        return self.compute.of(node.stage.name, size)

    def part(self, names: Iterable[str]) -> NodeGraph:
        """Some of its nodes, by the keys that they have here, without what they were found from: it can be pickled."""
        made = NodeGraph(self.name, self.compute)
        for name in names:
            made.nodes[name], made._keys[name] = self.nodes[name], self.key(name)
        return made

    def job(self, name: str, references: Mapping[str, ArtifactReference], refresh: bool = False) -> Job:
        """The job of a node, with the paths of its inputs: ready to run."""
        node = self.nodes[name]

        def path(binding: Binding) -> str:
            reference = references[binding.node]
            return str(Path(reference.path) / reference.outputs[binding.output]) if binding.output else reference.path

        records = {}
        for dotted, binding in node.bindings().items():
            made = references[binding.node]
            records[dotted] = InputRecord(stage=made.stage, key=made.key, digest=made.digest)
        return Job(
            node=name,
            stage=node.stage,
            config=node.config,
            compute=self.compute_of(node),
            spec=self.spec(name),
            inputs=node.stage.inputs.model_validate({**node.literals, **node.filled(path)}),
            input_records=records,
            refresh=refresh,
        )
