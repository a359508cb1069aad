"""The nodes of a recipe's rows: each set as it is read, what the checks leave of it, and its share of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smoltulu.flows.graphs.nodes import Binding, NodeGraph
from smoltulu.flows.graphs.references import References
from smoltulu.flows.graphs.sampled_nodes import Add
from smoltulu.flows.graphs.stage_configs import held_out_config, mixture_config
from smoltulu.flows.recipe import language_notes
from smoltulu.schemas.data import DataSet, DatasetKind, DatasetStageConfig, DataSource
from smoltulu.schemas.languages import LanguageStageConfig
from smoltulu.schemas.recipe import Recipe
from smoltulu.tasks.stages import STAGES


def world_if_generated(sources: Iterable[DataSource]) -> dict[str, Binding]:
    """Input of what reads these sources, where the recipe's world writes one of them."""
    return {"world": Binding("world")} if any(source.generated for source in sources) else {}


@dataclass(frozen=True)
class RowNodes:
    """Lays out the rows of a recipe, set by set.

    add         adds a node, or returns None where it comes after the last stage that is asked for
    verifiers   externals of what a verdict on a row means
    sampled     entry of `sampled` -> the node of the rows that it chose, once they are there
    checked     set -> the node of its rows before any mixture
    held_out    set -> the node of its rows that are held out
    """

    graph: NodeGraph
    recipe: Recipe
    add: Add
    references: References
    verifiers: Mapping[str, str]
    sampled: Mapping[str, str]
    checked: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, kind: DatasetKind, data: DataSet | None) -> str | None:
        """Rows as they are read; None where there are none, or their samples are not there yet."""
        sampled = {source.sampled for source in data.sources if source.sampled} if data else set()
        if data is None or not sampled <= self.sampled.keys():
            return None
        pinned, externals = self.references.pinned(data.sources)
        if kind == "rlvr":  # which rows are malformed, and what a verdict on the others means
            externals = {**externals, **self.verifiers}
        # Without the mixture: another share reads and checks nothing again.
        config = DatasetStageConfig(kind=kind, data=data.model_copy(update={"sources": pinned}).unmixed)
        inputs: dict[str, Any] = dict(world_if_generated(pinned))
        if sampled:
            inputs["sampled"] = {entry: Binding(self.sampled[entry], "file") for entry in sorted(sampled)}
        return self.add(f"dataset-{name}", STAGES["dataset"], config, inputs=inputs, externals=externals)

    def training(self, name: str, kind: DatasetKind, data: DataSet | None) -> str | None:
        """Rows without those that the checks removed, then as much of each source as the set is to have."""
        rows = self._checked_rows(name, kind, data)
        if rows is None or data is None or not data.is_mixed:
            return rows
        inputs = {"dataset": Binding(rows, "file")}
        if any(source.holds_out for source in data.sources):
            aside = self.add(
                f"held-out-rows-{name}", STAGES["held_out_rows"], held_out_config(kind, data), inputs=inputs
            )
            if aside is not None:
                self.held_out[name] = aside
        return self.add(f"mixture-{name}", STAGES["mixture"], mixture_config(kind, data), inputs=inputs)

    def _checked_rows(self, name: str, kind: DatasetKind, data: DataSet | None) -> str | None:
        """Rows, then the same rows without those that the check of contamination found, and without near-duplicates."""
        rows = self.read(name, kind, data)
        if rows is None:
            return None
        self._languages(name, kind, rows)
        rows = self.without_contamination(rows, name, kind)
        if name != "audit":
            rows = self._without_near_duplicates(rows, name, kind)
        self.checked[name] = rows
        return rows

    def without_contamination(self, rows: str, name: str, kind: DatasetKind) -> str:
        """Without those that repeat a benchmark; the same rows where nothing is checked."""
        settings = self.recipe.contamination
        if settings is None:
            return rows
        index = self._benchmark_index()
        if index is None:
            return rows
        config = settings.stage_config(kind, **({"policy": "report"} if name in ("audit", "targets") else {}))
        inputs = {"dataset": Binding(rows, "file"), "index": Binding(index)}
        return self.add(f"contamination-{name}", STAGES["contamination"], config, inputs=inputs) or rows

    def _languages(self, name: str, kind: DatasetKind, rows: str) -> None:
        """Their shares, as tables 10 to 12 of the paper have them. Nothing is built on them."""
        if self.recipe.languages is None or language_notes(self.recipe):
            return
        config = LanguageStageConfig(kind=kind, settings=self.recipe.languages)
        self.add(f"languages-{name}", STAGES["languages"], config, inputs={"dataset": Binding(rows, "file")})

    def _without_near_duplicates(self, rows: str, name: str, kind: DatasetKind) -> str:
        """Compared with held-out sets, and with trained ones that come before it."""
        settings = self.recipe.near_duplicates
        if settings is None:
            return rows
        held_out: dict[str, DatasetKind] = {"preference_eval": "preference", "verified_eval": "rlvr"}
        others = {}
        for other in settings.against:
            if other in held_out:
                node = self.read(other.replace("_", "-"), held_out[other], getattr(self.recipe.data, other))
            else:
                node = self.checked.get(other)
            if node is not None:
                others[other] = Binding(node, "file")
        inputs: dict[str, Any] = {"dataset": Binding(rows, "file"), **({"others": others} if others else {})}
        if "benchmarks" in settings.against and "benchmark-index" in self.graph.nodes:
            inputs["index"] = Binding("benchmark-index")
        config = settings.stage_config(kind)
        return self.add(f"near-duplicates-{name}", STAGES["near_duplicates"], config, inputs=inputs) or rows

    def _benchmark_index(self) -> str | None:
        """One index for all training sets: it depends only on the benchmarks and the mode."""
        settings = self.recipe.contamination
        assert settings is not None
        if "benchmark-index" in self.graph.nodes:
            return "benchmark-index"
        pinned, externals = self.references.pinned(
            [benchmark.source for benchmark in settings.benchmarks], may_be_missing=True
        )
        benchmarks = tuple(
            benchmark.model_copy(update={"source": source})
            for benchmark, source in zip(settings.benchmarks, pinned, strict=True)
        )
        return self.add(
            "benchmark-index",
            STAGES["benchmark_index"],
            settings.index_config(benchmarks),
            inputs=world_if_generated(pinned),
            externals=externals,
        )
