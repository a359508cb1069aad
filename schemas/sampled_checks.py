"""What must hold between the block `sampled`, the data sets and the trainings of a recipe. Pure.

A model may write rows that a model is trained on, so a recipe could be a circle: here it is refused before anything
is laid out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from smoltulu.schemas.data import SAMPLED_FORMATS, DataSet, DataSettings, DataSource
from smoltulu.schemas.models import ModelSource
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.sampled import SampledSettings
from smoltulu.schemas.training import DPOSettings, RewardModelSettings, TrainingSettings
from smoltulu.schemas.world import WorldConfig

_TAKERS = "data." + ", data.".join(SAMPLED_FORMATS)


class Recipe(Protocol):
    """What is read of a recipe (schemas/recipe.py)."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def sampled(self) -> Mapping[str, SampledSettings]: ...
    @property
    def base_model(self) -> ModelSource: ...
    @property
    def world(self) -> WorldConfig | None: ...
    @property
    def reward_model(self) -> RewardModelSettings | None: ...
    @property
    def dpo(self) -> DPOSettings | None: ...
    @property
    def rlvr(self) -> RLVRSettings | None: ...
    @property
    def trainings(self) -> Mapping[str, TrainingSettings]: ...

    def rows_of(self, block: str) -> str: ...

    def data_sources(self) -> list[DataSource]: ...


def sampled_problems(recipe: Recipe) -> list[str]:
    """Every fault, in words; circles only where there is no other."""
    problems = []
    inside: list[DataSource] = []
    for name in DataSettings.model_fields:
        data: DataSet | None = getattr(recipe.data, name)
        for source in data.sources if data else ():
            if source.sampled is not None:
                inside.append(source)
                problems += _problems_of_source(recipe, name, source)
    problems += [
        f"data source {{sampled: {source.sampled}}}: rows that a model wrote are for {_TAKERS}, not for benchmarks, "
        "audits or evaluations"
        for source in recipe.data_sources()
        if source.sampled is not None and not any(source is one for one in inside)
    ]
    for name, entry in recipe.sampled.items():
        if getattr(recipe.data, entry.prompts) is None:
            problems.append(f"sampled.{name}: asks the prompts of data.{entry.prompts}; add it, or set prompts")
        if entry.model is not None and getattr(recipe, entry.model) is None:
            problems.append(f"sampled.{name}: samples the model of {entry.model}; add a block {entry.model}")
        if entry.reads_rewards and recipe.reward_model is None:
            field, other = ("score", "verifier") if entry.score == "reward_model" else ("ties", "draw")
            problems.append(
                f"sampled.{name}: {field} is reward_model, and the recipe has none; add a block reward_model, or set "
                f"{field} to {other}"
            )
    if not problems:
        needs = dependencies(recipe)
        problems = [_in_words(way) for name in recipe.sampled if (way := circle(needs, f"sampled.{name}"))]
    return problems


def _problems_of_source(recipe: Recipe, data_set: str, source: DataSource) -> list[str]:
    """Of one source of `data` that names an entry."""
    name = str(source.sampled)
    where = f"data.{data_set}: source {{sampled: {name}}}"
    form, entry = SAMPLED_FORMATS.get(data_set), recipe.sampled.get(name)
    if form is None:
        return [f"{where}: rows that a model wrote are for {_TAKERS}"]
    if entry is None:
        near = difflib.get_close_matches(name, list(recipe.sampled), n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(recipe.sampled) or "none; add a block sampled (docs/stages/sampled.md)"
        return [f"{where}: no entry of sampled is called {name!r}{meant}; entries: {names}"]
    problems = []
    wanted, rows = ("best", "SFT rows") if form == "messages" else ("pairs", "pairs")
    if entry.make != wanted:
        problems.append(
            f"{where}: makes {entry.make}, and data.{data_set} takes {rows}; set sampled.{name}.make to {wanted}"
        )
    if source.format != form or source.fields:
        problems.append(f"{where}: its rows have the format {form} and fields of the usual names; leave both out")
    return problems


def sampled_notes(recipe: Recipe) -> list[str]:
    """A sentence for every entry of `sampled` that no data source names, and for pairs that nothing is trained on."""
    named = {source.sampled for source in recipe.data_sources()}
    notes = [
        f"sampled.{name}: no data source takes its rows: they are made, and nothing here is trained on them; give "
        f"{{sampled: {name}}} to data.{'sft' if entry.make == 'best' else 'preference or data.dpo'} if its model comes "
        "before that, take the rows in another recipe, or remove the entry"
        for name, entry in recipe.sampled.items()
        if name not in named
    ]
    if recipe.data.dpo is not None and recipe.dpo is None:
        notes.append("data.dpo: has pairs for DPO alone, and there is no block dpo: nothing is trained on them")
    return notes


def dependencies(recipe: Recipe) -> dict[str, list[str]]:
    """Name -> what it is made from: models by their blocks, `data.SET` and `sampled.NAME`."""
    needs: dict[str, list[str]] = {}
    for name in DataSettings.model_fields:
        rows: DataSet | None = getattr(recipe.data, name)
        needs[f"data.{name}"] = [f"sampled.{one.sampled}" for one in (rows.sources if rows else ()) if one.sampled]
    for name, entry in recipe.sampled.items():
        rewards = ["reward_model"] if entry.reads_rewards else []
        needs[f"sampled.{name}"] = [f"data.{entry.prompts}", *([entry.model] if entry.model else []), *rewards]
    made_here = recipe.base_model.scratch is not None and recipe.world is None
    needs["base_model"] = ["data.sft"] if made_here else []
    for block, settings in recipe.trainings.items():
        needs[block] = [settings.starts_from or "base_model", f"data.{recipe.rows_of(block)}"]
    if recipe.rlvr is not None:
        needs["rlvr"] += (["dpo"] if recipe.dpo else []) + (["reward_model"] if recipe.rlvr.needs_reward_model else [])
    return needs


def circle(needs: Mapping[str, Sequence[str]], start: str) -> list[str]:
    """The shortest way from `start` back to it, both ends included; empty where there is none."""
    ways, seen = [[start]], set[str]()
    for way in ways:  # grows while it is read: breadth first
        for need in needs.get(way[-1], ()):
            if need == start:
                return [*way, start]
            if need not in seen:
                seen.add(need)
                ways.append([*way, need])
    return []


def _in_words(way: list[str]) -> str:
    said = ", ".join(f"{made} needs {need}" for made, need in pairwise(way))
    return (
        f"{way[0]}: goes in a circle, so none of it can be made first: {said}. Sample a model that comes before its "
        "rows are trained on (base_model, sft), or give them to a training that comes later: data.dpo is for DPO alone"
    )
