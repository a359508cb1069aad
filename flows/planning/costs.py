"""Estimates the cost of a stage from the recipe and from similar finished artifacts of the store.

An unknown figure is None: without a similar finished stage, tokens and time are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from smoltulu.artifacts.layout import key_path
from smoltulu.artifacts.nearest import Changes, SpecIndex, read_generation
from smoltulu.flows.graphs.recipe_graph import Binding, Graph, Node
from smoltulu.flows.planning.estimates import (
    Cost,
    Estimate,
    closest,
    closest_rows,
    cost_of,
    count_in,
    device_of,
    estimated_seconds,
    estimated_tokens,
    file_bytes_of,
    max_length_of,
    seconds_of,
)
from smoltulu.flows.planning.rate_costs import rollout_seconds, train_seconds
from smoltulu.flows.planning.reading_costs import Reading, known_tokens, reading_of, reading_seconds, work_of
from smoltulu.schemas.artifact import Basis
from smoltulu.schemas.budget import tokens_of_steps
from smoltulu.schemas.data import DatasetStageConfig
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.held_out_loss import HeldOutLossSettings
from smoltulu.schemas.machine import MachineRates
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import SupervisedSettings, TrainingSettings
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
    """Facts about the artifact of a node, or about a finished one like it."""

    num_rows: int | None = None
    num_tokens: int | None = None
    rows_bytes: int | None = None
    num_parameters: int | None = None


@dataclass
class Costs:
    """Call `cached` or `estimate` for every node in graph order: later nodes use the facts of earlier ones.

    rates          of this machine, for stages like which none was run; None: they were not measured
    as_if_longest  node -> tokens that each of its rows is taken to have, where their number is not known
    """

    graph: Graph
    index: SpecIndex
    rates: MachineRates | None = None
    as_if_longest: dict[str, int] = field(default_factory=dict)
    _facts: dict[str, _Facts] = field(default_factory=dict)
    _twins: dict[str, str] = field(default_factory=dict)

    def cached(self, name: str, outputs: Mapping[str, Any], file_bytes: Mapping[str, int]) -> None:
        """Note the facts of a finished artifact."""
        self._facts[name] = _facts_of(outputs, file_bytes)

    def estimate(self, name: str, step: int = 0, num_steps: int | None = None) -> Estimate:
        """The remaining cost of a node at optimizer step `step` (of `num_steps`, if a checkpoint says so)."""
        node = self.graph.nodes[name]
        if isinstance(node.config, TrainingSettings):
            return self._training(node, step, num_steps)
        if node.stage.num_passes is not None:
            return self._reading(node)
        twin = self._twin(name)
        flops = self._most_flops(node)
        if twin is None:
            self._facts[name] = self._passed_on(node)
            if isinstance(node.config, ModelSource):
                self._facts[name] = _Facts(num_parameters=node.config.num_parameters)
            read = self._upstream(node, "dataset").num_rows if node.stage.kept_share is not None else None
            return Estimate(flops=flops, num_rows=read)
        sizes = file_bytes_of(twin)
        facts = _facts_of(twin.get("outputs", {}), sizes)
        self._facts[name] = facts
        total = sum(sizes.values())
        num_bytes: int | None = total
        seconds = seconds_of(twin) if self.graph.recipe.compute.of(node.stage.name).device == device_of(twin) else None
        if "model" in node.inputs and node.stage.grows_with_model:
            ratio = self._size_ratio(node, twin)
            seconds = None if seconds is None or ratio is None else seconds * ratio
            if node.stage.copies_model:
                num_bytes = None if ratio is None else round(total * ratio)
        basis: Basis | None = None if seconds is None else "similar"
        return Estimate(flops=flops, disk_bytes=num_bytes, peak_disk_bytes=num_bytes, seconds=seconds, basis=basis)

    def _passed_on(self, node: Node) -> _Facts:
        """What is known of the rows of a stage before it has run."""
        if isinstance(node.config, DatasetStageConfig):
            return _Facts(num_rows=node.config.data.expected_rows)
        if node.stage.keeps_rows:
            return self._upstream(node, "dataset")
        share = node.stage.kept_share(node.config) if node.stage.kept_share is not None else None
        given = self._upstream(node, "dataset").num_rows if share is not None else None
        return _Facts(num_rows=None if share is None or given is None else max(round(share * given), 1))

    def _reading(self, node: Node) -> Estimate:
        """Of a stage that has its model read its rows. Where their tokens are not known, as if all were longest."""
        assert node.stage.num_passes is not None
        num_passes, max_length = node.stage.num_passes(node.config), max_length_of(node.config.model_dump())
        num_rows = self._upstream(node, "dataset").num_rows
        size = self._upstream(node, "model").num_parameters if num_passes else None
        keys = self.graph.spec(node.name).inputs
        finished = list(self._readings(node))
        num_tokens = known_tokens(finished, str(keys["dataset"]), str(keys["tokenizer"]))
        if num_tokens is None and num_rows is not None:
            num_tokens = num_rows * max_length
            self.as_if_longest[node.name] = max_length
        if num_tokens is None or (num_passes and size is None):
            return Estimate(num_tokens=num_tokens, num_rows=num_rows)
        compute, work = self.graph.compute_of(node), work_of(num_tokens, num_passes, size)
        measured = None if self.rates is None or self.rates.train is None else self.rates.train.flops_per_second / 1e12
        ways: tuple[tuple[Basis, float | None], ...] = (
            ("similar", None), ("stated", compute.device_tflops), ("measured", measured),
        )  # fmt: skip
        by = {
            basis: reading_seconds(work, finished, compute.device, compute.num_processes, tflops, num_passes > 0)
            for basis, tflops in ways
        }
        basis = next((one for one, seconds in by.items() if seconds is not None), None)
        return Estimate(
            num_tokens=num_tokens, flops=work if num_passes else None, num_rows=num_rows,
            seconds=None if basis is None else by[basis], basis=basis,
        )  # fmt: skip

    def _readings(self, node: Node) -> Iterator[Reading]:
        """Finished stages of this kind."""
        assert node.stage.num_passes is not None
        for near in self.index.ranked(self.graph.spec(node.name).model_dump()):
            if (manifest := read_generation(near.folder)) is None:
                continue
            try:
                passes = node.stage.num_passes(node.stage.config.model_validate(manifest["spec"]["config"]))
            except (KeyError, ValidationError):
                continue
            made = reading_of(manifest, passes, self._model_size(manifest) if passes else None)
            if made is not None:
                yield made

    def _most_flops(self, node: Node) -> float | None:
        """Of a stage that has its input model write; None where it does not, or where no size is known."""
        if node.stage.most_flops is None:
            return None
        size = self._upstream(node, "model").num_parameters
        per_parameter = node.stage.most_flops(node.config, self._upstream(node, "dataset").num_rows)
        return None if size is None or per_parameter is None else size * per_parameter

    def device_bytes(self, name: str) -> int | None:
        """Bytes that a training holds at least on every device; None where the size of its model is not known."""
        node = self.graph.nodes[name]
        assert isinstance(node.config, TrainingSettings)
        size, compute = self._upstream(node, "model").num_parameters, self.graph.compute_of(node)
        if size is None:
            return None
        needed = size * node.config.bytes_per_parameter
        if not compute.is_sharded:
            return needed
        # Each fetches the whole policy to write rollouts.
        return needed // compute.num_processes + (4 * size if isinstance(node.config, RLVRSettings) else 0)

    def _training(self, node: Node, step: int, num_steps: int | None) -> Estimate:
        settings = node.config
        assert isinstance(settings, TrainingSettings)
        start, rows = self._upstream(node, "model"), self._upstream(node, "dataset")
        size = start.num_parameters
        self._facts[node.name] = _Facts(num_parameters=size)
        all_steps = num_steps or settings.budget.num_steps(rows.num_rows, rows.num_tokens)
        left = None if all_steps is None else max(all_steps - step, 0)
        compute = self.graph.compute_of(node)
        dataset = self.graph.spec(node.name).inputs["dataset"]
        assert isinstance(dataset, str)

        costs = self._costs(node)
        batch, device = settings.effective_batch_size, compute.device
        # An adapter has a few per cent of the model's size. It is not counted: the model may not exist yet.
        adapter = ModelSize(0) if getattr(settings, "lora", None) else None
        # The answers to prompts do not exist yet.
        trains_on_its_rows = settings.row_rules().kind != "prompts"
        tokens = seconds = peak = flops = None
        if left is not None:
            if rows.num_rows and rows.num_tokens and trains_on_its_rows:
                assert all_steps is not None
                seen = tokens_of_steps(all_steps - left, rows.num_rows, rows.num_tokens, batch)
                tokens = tokens_of_steps(all_steps, rows.num_rows, rows.num_tokens, batch) - seen
            else:
                max_length = max_length_of(settings.model_dump())
                alike = closest_rows(costs, dataset, max_length)
                tokens = estimated_tokens(left, batch, alike, settings.num_passes)
            similar = closest(costs, size, device, dataset)
            seconds = estimated_seconds(left, batch, size, compute.num_processes, similar)
        if size is not None and tokens is not None:
            flops = node.stage.flops(settings) * size * tokens
        elif size is not None and left is not None and isinstance(settings, RLVRSettings):
            # Nothing alike was made: as if every prompt and answer were as long as allowed.
            num_episodes = left * batch / settings.num_passes
            longest = settings.max_prompt_length + settings.max_completion_length
            flops = node.stage.flops(settings) * size * num_episodes * longest
        if flops is not None and size is not None and isinstance(settings, RLVRSettings) and settings.held_out:
            # To write is 2 a parameter and token; as if every prompt and answer were as long as allowed.
            longest = settings.max_prompt_length + settings.max_completion_length
            cycle, warmup = settings.num_steps_per_rollout, settings.num_warmup_steps_of_critic or 0
            num_evaluations = settings.held_out.num_evaluations(left or 1, cycle, warmup)
            flops += 2 * size * num_evaluations * settings.held_out.most_answers() * longest
        if flops is not None and size is not None and isinstance(settings, SupervisedSettings) and left:
            # Nothing where no row is held out, and nothing is known of rows that are not tokenised yet.
            aside = self._upstream(node, "held_out").num_tokens if "held_out" in node.inputs else None
            flops += 2 * size * (aside or 0) * (settings.held_out or HeldOutLossSettings()).num_evaluations(left)
        basis: Basis | None = "similar" if seconds is not None else None
        if seconds is None and flops is not None and compute.device_tflops is not None:
            seconds, basis = flops / (compute.device_tflops * 1e12 * compute.num_processes), "stated"
        elif seconds is None and flops is not None and size is not None and left is not None:
            seconds = self._by_rates(settings, flops, left, size, compute.num_processes)
            basis = None if seconds is None else "measured"
        if size is not None and rows.rows_bytes is not None:
            kept = num_checkpoints_kept(compute, settings.is_extendable)
            if all_steps is not None:
                kept = min(kept, -(-all_steps // compute.save_steps))
            known = rows.num_tokens is not None and trains_on_its_rows
            cache = (rows.num_tokens or 0) * BYTES_PER_TOKEN if known else rows.rows_bytes * TEXT_FACTOR
            peak = training_bytes(ModelSize(size), cache, kept, adapter, settings.trains_critic, settings.keeps_best)
        disk = None if size is None else model_bytes(ModelSize(size)) * (1 + settings.trains_critic)
        if disk is not None and settings.is_extendable and compute.keep_extension_checkpoint:
            disk += checkpoint_bytes(adapter or ModelSize(size or 0))
        return Estimate(left, tokens, flops, disk, peak, seconds, basis=basis)

    def _by_rates(
        self, settings: TrainingSettings, flops: float, num_steps: int, size: int, num_processes: int
    ) -> float | None:
        """Seconds by the rates of this machine; None where they do not say so."""
        if self.rates is None:
            return None
        seconds = train_seconds(flops, self.rates, num_processes)
        if isinstance(settings, RLVRSettings):
            written = rollout_seconds(settings, num_steps, size, self.rates, num_processes)
            return None if seconds is None or written is None else seconds + written
        return seconds

    def _size_ratio(self, node: Node, twin: Mapping[str, Any]) -> float | None:
        """Number of parameters of a node's input model, divided by that of its twin's."""
        wanted, size = self._upstream(node, "model").num_parameters, self._model_size(twin)
        return wanted / size if wanted and size else None

    def _model_size(self, manifest: Mapping[str, Any]) -> int | None:
        """Number of parameters of the input model of a finished artifact."""
        record = manifest["inputs"].get("model", {})
        try:
            taken = read_generation(key_path(self.index.root, record.get("stage", ""), record.get("key", "")))
        except ValueError:
            return None
        return count_in(taken["outputs"], "num_parameters") if taken else None

    def _upstream(self, node: Node, name: str) -> _Facts:
        binding = node.inputs.get(name)
        if binding is None:
            return _Facts()
        assert isinstance(binding, Binding)
        return self._facts.get(binding.node, _Facts())

    def _twin(self, name: str) -> dict[str, Any] | None:
        """Manifest of a finished artifact that took the same work, for a node without optimizer steps."""
        for near in self.index.ranked(self.graph.spec(name).model_dump()):
            if self._same_work(name, near.changes) and (manifest := read_generation(near.folder)) is not None:
                self._twins[name] = near.key
                return manifest
        return None

    def _same_work(self, name: str, changes: Changes) -> bool:
        """Whether the differences leave the amount of work the same: seeds, revisions, another model of this size."""
        node = self.graph.nodes[name]
        if node.stage.copies_model:
            return True
        bindings = node.bindings()
        for change, (old, _) in changes.items():
            section, _, rest = change.partition(".")
            if section == "inputs":
                # Other data are other work, unless they are the twin of the wanted data.
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


def _facts_of(outputs: Mapping[str, Any], file_bytes: Mapping[str, int]) -> _Facts:
    return _Facts(
        num_rows=count_in(outputs, "num_rows"),
        num_tokens=count_in(outputs, "num_tokens"),
        rows_bytes=file_bytes.get(str(outputs.get("file", ""))),
        num_parameters=count_in(outputs, "num_parameters"),
    )
