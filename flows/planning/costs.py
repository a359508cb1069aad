"""Expected costs of the stages of a graph, from what finished artifacts of the store that are like them took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smoltulu.artifacts.nearest import Changes, SpecIndex, read_generation
from smoltulu.flows.graphs.recipe_graph import Binding, Graph, Node
from smoltulu.flows.planning.estimate import (
    Cost,
    Estimate,
    closest,
    closest_rows,
    estimated_seconds,
    estimated_tokens,
)
from smoltulu.schemas.budget import tokens_of_steps
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.models.sizes import ModelSize
from smoltulu.tasks.trainer.disk import (
    BYTES_PER_TOKEN,
    TEXT_FACTOR,
    checkpoint_bytes,
    model_bytes,
    num_checkpoints_kept,
    training_bytes,
)


@dataclass(frozen=True)
class _Facts:
    """What is known about the artifact of a node, made or like one that was made."""

    num_rows: int | None = None
    num_tokens: int | None = None
    rows_bytes: int | None = None
    num_parameters: int | None = None


@dataclass
class Costs:
    """Call `cached` or `estimate` for every node in graph order: later nodes build on what is known of earlier ones."""

    graph: Graph
    index: SpecIndex
    _facts: dict[str, _Facts] = field(default_factory=dict)
    _twins: dict[str, str] = field(default_factory=dict)

    def cached(self, name: str, outputs: Mapping[str, Any], file_bytes: Mapping[str, int]) -> None:
        """Note what a finished artifact holds."""
        self._facts[name] = _facts_of(outputs, file_bytes)

    def estimate(self, name: str, step: int = 0, num_steps: int | None = None) -> Estimate:
        """What is left to do for a node at optimizer step `step` (of `num_steps`, where a checkpoint says so)."""
        node = self.graph.nodes[name]
        if isinstance(node.config, TrainingSettings):
            return self._training(node, step, num_steps)
        twin = self._twin(name)
        if twin is None:
            self._facts[name] = self._inherited(node)
            return Estimate()
        sizes = _file_bytes(twin)
        facts = _facts_of(twin.get("outputs", {}), sizes)
        self._facts[name] = facts
        num_bytes: int | None = sum(sizes.values())
        seconds = _seconds(twin) if self._device(node) == _device(twin) else None
        if "model" in node.inputs and node.stage.grows_with_model:
            ratio = self._size_ratio(node, twin)
            seconds = None if seconds is None or ratio is None else seconds * ratio
            if node.stage.copies_model:
                num_bytes = None if ratio is None else round(sum(sizes.values()) * ratio)
        return Estimate(disk_bytes=num_bytes, peak_disk_bytes=num_bytes, seconds=seconds)

    def _training(self, node: Node, step: int, num_steps: int | None) -> Estimate:
        settings = node.config
        assert isinstance(settings, TrainingSettings)
        start, rows = self._upstream(node, "model"), self._upstream(node, "dataset")
        size = start.num_parameters
        self._facts[node.name] = _Facts(num_parameters=size)
        all_steps = num_steps or settings.budget.num_steps(rows.num_rows, rows.num_tokens)
        left = None if all_steps is None else max(all_steps - step, 0)
        compute = self.graph.recipe.compute.of(node.stage.name)
        dataset = self.graph.spec(node.name).inputs["dataset"]
        assert isinstance(dataset, str)

        costs = self._costs(node)
        batch, device = settings.effective_batch_size, compute.device
        # Its size follows from the shapes of a model that may not be made yet: some per cent, not counted.
        adapter = ModelSize(0) if getattr(settings, "lora", None) else None
        # Of prompts the answers are not written yet.
        trains_on_its_rows = settings.row_rules().kind != "prompts"
        tokens = seconds = peak = flops = None
        if left is not None:
            if rows.num_rows and rows.num_tokens and trains_on_its_rows:
                assert all_steps is not None
                seen = tokens_of_steps(all_steps - left, rows.num_rows, rows.num_tokens, batch)
                tokens = tokens_of_steps(all_steps, rows.num_rows, rows.num_tokens, batch) - seen
            else:
                max_length = _max_length(settings.model_dump())
                tokens = estimated_tokens(left, batch, closest_rows(costs, dataset, max_length))
            similar = closest(costs, size, device, dataset)
            seconds = estimated_seconds(left, batch, size, compute.num_processes, similar)
        if size is not None and tokens is not None:
            flops = node.stage.flops(settings) * size * tokens
        if size is not None and rows.rows_bytes is not None:
            kept = num_checkpoints_kept(compute, settings.is_extendable)
            if all_steps is not None:
                kept = min(kept, -(-all_steps // compute.save_steps))
            known = rows.num_tokens is not None and trains_on_its_rows
            cache = (rows.num_tokens or 0) * BYTES_PER_TOKEN if known else rows.rows_bytes * TEXT_FACTOR
            peak = training_bytes(ModelSize(size), cache, kept, adapter)
        disk = None if size is None else model_bytes(ModelSize(size))
        if disk is not None and settings.is_extendable and compute.keep_extension_checkpoint:
            disk += checkpoint_bytes(adapter or ModelSize(size or 0))
        return Estimate(left, tokens, flops, disk, peak, seconds)

    def _size_ratio(self, node: Node, twin: Mapping[str, Any]) -> float | None:
        """Parameters of the model that a node takes over those of the one that its twin took."""
        wanted = self._upstream(node, "model").num_parameters
        record = twin.get("inputs", {}).get("model", {})
        taken = read_generation(self.index.root / record.get("stage", "") / record.get("key", ""))
        size = (taken or {}).get("outputs", {}).get("num_parameters")
        return wanted / size if wanted and size else None

    def _upstream(self, node: Node, name: str) -> _Facts:
        binding = node.inputs[name]
        assert isinstance(binding, Binding)
        return self._facts.get(binding.node, _Facts())

    def _inherited(self, node: Node) -> _Facts:
        return self._upstream(node, "dataset") if node.stage.keeps_rows else _Facts()

    def _device(self, node: Node) -> str:
        return self.graph.recipe.compute.of(node.stage.name).device

    def _twin(self, name: str) -> dict[str, Any] | None:
        """Manifest of a finished artifact that took the same work, for a node that has no optimizer steps."""
        for near in self.index.ranked(self.graph.spec(name).model_dump()):
            if self._same_work(name, near.changes) and (manifest := read_generation(near.folder)) is not None:
                self._twins[name] = near.key
                return manifest
        return None

    def _same_work(self, name: str, changes: Changes) -> bool:
        """Whether only what does not change the amount of work differs: seeds, revisions, which model of this size."""
        node = self.graph.nodes[name]
        if node.stage.copies_model:
            return True
        bindings = node.bindings()
        for change, (old, _) in changes.items():
            section, _, rest = change.partition(".")
            if section == "inputs":
                # Other data are other work, unless they are the twin of the data that are wanted.
                upstream = bindings[rest].node if rest in bindings else None
                alike = upstream is not None and self._twins.get(upstream) == old
                if not alike and rest not in ("model", "reference_model"):
                    return False
            elif section == "externals":
                if not node.stage.makes(EvaluationOutputs):
                    return False
            elif rest.rpartition(".")[2] not in ("revision", "seed", "subject"):
                return False
        return True

    def _costs(self, node: Node) -> list[Cost]:
        spec = self.graph.spec(node.name).model_dump()
        manifests = (read_generation(near.folder) for near in self.index.ranked(spec))
        return [cost for manifest in manifests if manifest is not None and (cost := cost_of(manifest)) is not None]


def cost_of(manifest: Mapping[str, Any]) -> Cost | None:
    """What a finished training took, from its manifest as plain JSON; None where that is not all there."""
    try:
        outputs, spec, compute = manifest["outputs"], manifest["spec"], manifest["compute"]
        num_steps = int(outputs["num_steps"])
        resumed = manifest["resumed_from_steps"]
        return Cost(
            num_steps=num_steps,
            num_timed_steps=num_steps - (int(resumed[-1]) if resumed else 0),
            num_tokens=int(outputs["num_tokens"]),
            seconds=_seconds(manifest),
            effective_batch_size=int(spec["config"]["effective_batch_size"]),
            num_parameters=int(outputs["num_parameters"]),
            device=_device(manifest),
            num_processes=int(compute["num_processes"]),
            dataset=str(spec["inputs"]["dataset"]),
            max_length=_max_length(spec["config"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _max_length(config: Mapping[str, Any]) -> int:
    """Of what is trained on: of rows, or of answers that are written to prompts."""
    return int(config.get("max_length") or config.get("max_completion_length") or 0)


def _facts_of(outputs: Mapping[str, Any], file_bytes: Mapping[str, int]) -> _Facts:
    return _Facts(
        num_rows=outputs.get("num_rows"),
        num_tokens=outputs.get("num_tokens"),
        rows_bytes=file_bytes.get(outputs.get("file", "")),
        num_parameters=outputs.get("num_parameters"),
    )


def _file_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(record["size"]) for name, record in manifest.get("files", {}).items()}


def _seconds(manifest: Mapping[str, Any]) -> float:
    return float(manifest["duration_seconds"])


def _device(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("compute", {}).get("device", ""))
