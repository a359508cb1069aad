"""The nodes of the block `selection`: who scores, the heads that are masked, scores of each source, what is kept.

Rows are scored as they are read, a source at a time and before any check, so that a new source scores only itself and
another mixture scores nothing. What is kept is chosen behind all checks: scores find their rows by content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smoltulu.flows.graphs.nodes import Binding, NodeGraph
from smoltulu.flows.graphs.sampled_nodes import Add, Parts
from smoltulu.schemas.data import DataSet, DatasetKind
from smoltulu.schemas.recipe import Recipe
from smoltulu.schemas.selection import SET_KINDS, SelectedSet, SelectionSettings
from smoltulu.schemas.training import TrainedTurns
from smoltulu.tasks.stages import STAGES

_HEADS, _SELECTOR, _TARGETS = "selection-heads", "selector-model", "targets"


@dataclass(frozen=True)
class SelectionNodes:
    """Lays out the selection of a recipe, set by set.

    add         adds a node, or returns None where it comes after the last stage that is asked for
    read        adds the node of a data set that is read: name, kind, set
    check       adds the node that checks it for contamination: its rows, name, kind. The rows where nothing is checked
    model_from  adds the node of a model that is there before any training: name, its source, `add`
    template    literals and externals: the recipe's
    selected    set -> the node of what is kept of it
    """

    graph: NodeGraph
    recipe: Recipe
    add: Add
    read: Callable[[str, DatasetKind, DataSet], str | None]
    check: Callable[[str, str, DatasetKind], str]
    model_from: Callable[..., str | None]
    template: Parts
    selected: dict[str, str] = field(default_factory=dict)

    @property
    def untrained(self) -> list[str]:
        """Sets that are selected from and that no training of the recipe takes: for what trains elsewhere."""
        trained = {self.recipe.rows_of(block) for block in self.recipe.trainings}
        return [name for name in (self.recipe.selector.sets if self.recipe.selector else ()) if name not in trained]

    def rows(self, name: str, sets: Mapping[str, str], base: str) -> str | None:
        """The node of the rows of a set that trainings take; None where they are not there yet, or come too late.

        sets  set -> node of its rows, all checks behind them
        base  node of the model whose tokens are counted
        """
        settings, rows = self.recipe.selector, sets.get(name)
        data: DataSet | None = getattr(self.recipe.data, name)
        if settings is None or name not in settings.sets or rows is None or data is None:
            return rows
        if name not in self.selected and (selector := self._selector(settings, sets, base)) is not None:
            made = self._selected(settings, name, data, rows, base, selector)
            if made is not None:
                self.selected[name] = made
        return self.selected.get(name)

    def weights(self, name: str) -> dict[str, Binding]:
        """Input of a training on a set whose rows weigh."""
        weighs = name in self.selected and self.recipe.selector and self.recipe.selector.use == "weight"
        return {"weights": Binding(self.selected[name], "weights_file")} if weighs else {}

    def _selector(self, settings: SelectionSettings, sets: Mapping[str, str], base: str) -> str | None:
        """The node of the model that scores; None where what it is made of is not there yet."""
        model = settings.model
        if _SELECTOR in self.graph.nodes:
            return _SELECTOR
        if model is None or model == self.recipe.base_model or not settings.asks_model:
            return base
        if model.scratch is not None and self.recipe.world is None and self.recipe.data.sft and not sets.get("sft"):
            return None
        return self.model_from(_SELECTOR, model, add=self.add)

    def _selected(
        self, settings: SelectionSettings, name: SelectedSet, data: DataSet, rows: str, base: str, selector: str
    ) -> str | None:
        """What is kept of a set, and all that it is made of."""
        kind, heads = SET_KINDS[name], dict[str, Binding]()
        if settings.method == "attention_influence":
            inputs = {"model": Binding(selector, "folder")}
            stage = STAGES["selection_heads"]
            if _HEADS not in self.graph.nodes and (
                self.add(_HEADS, stage, settings.heads_config(), inputs=inputs, **self.template) is None
            ):
                return None
            heads = {"heads": Binding(_HEADS, "heads_file")}
        who = {"tokenizer": Binding(base, "folder"), **heads}
        if settings.asks_model:
            who["model"] = Binding(selector, "folder")
        if settings.targets is not None and settings.method == "rds_plus":
            who |= self._targets(settings.targets, kind)
        scores: dict[str, Binding] = {}
        for number in range(len(data.sources)):
            made = self._scores(settings, name, number, data, who)
            if made is None:
                return None
            scores[str(number)] = Binding(made, "scores_file")
        labels = tuple(source.label for source in data.sources)
        all_inputs: dict[str, Any] = {"dataset": Binding(rows, "file"), "scores": scores, **heads}
        return self.add(f"selected-{name}", STAGES["selection"], settings.stage_config(kind, labels), inputs=all_inputs)

    def _scores(
        self, settings: SelectionSettings, name: SelectedSet, number: int, data: DataSet, who: Mapping[str, Binding]
    ) -> str | None:
        """The scores of one source, which is read by itself: their key hangs on no other source."""
        kind = SET_KINDS[name]
        own: str | None = f"dataset-{name}"
        if len(data.sources) > 1:
            # Shares of a mixture are of the whole set. The limit of malformed rows is of each source anyway, and the
            # same in the key of a source that is alone: what was read and scored then is found when others join it.
            source = DataSet(sources=(data.unmixed.sources[number],), max_malformed_share=data.max_malformed_share)
            own = self.read(f"{name}-{number}", kind, source)
        if own is None:
            return None
        inputs = {"dataset": Binding(own, "file"), **who}
        config = settings.scores_config(kind, self._trained_turns(name))
        return self.add(
            f"influence-{name}-{number}", STAGES["selection_scores"], config, inputs=inputs, **self.template
        )

    def _trained_turns(self, name: SelectedSet) -> TrainedTurns:
        """Turns of pairs that trainings on them train: all where one of them does."""
        rules = [one.row_rules() for block, one in self.recipe.trainings.items() if self.recipe.rows_of(block) == name]
        return "all" if any(rule.trained_turns == "all" for rule in rules) else "last"

    def _targets(self, data: DataSet, kind: DatasetKind) -> dict[str, Binding]:
        """Rows that the kept ones are to be like, and what benchmarks say of them where the recipe has an index."""
        rows = self.read(_TARGETS, kind, data)
        if rows is None:
            return {}
        checked = f"contamination-{_TARGETS}"
        if checked not in self.graph.nodes:
            checked = self.check(rows, _TARGETS, kind)
        inputs = {"targets": Binding(rows, "file")}
        return inputs if checked == rows else inputs | {"targets_hits": Binding(checked)}
