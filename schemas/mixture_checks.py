"""Where a recipe may have mixtures and held-out rows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from smoltulu.schemas.data import DataSettings, DataSource
from smoltulu.schemas.training import TrainingSettings

#: Sets of `data` that may be mixtures, and those that may have held-out rows.
_MIXED_SETS, _HELD_OUT_SETS = ("sft", "preference", "dpo", "rlvr"), ("sft", "preference", "dpo")


class Recipe(Protocol):
    """What is read of a recipe (schemas/recipe.py)."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def trainings(self) -> Mapping[str, TrainingSettings]: ...

    def rows_of(self, block: str) -> str: ...

    def data_sources(self) -> list[DataSource]: ...


def mixture_problems(recipe: Recipe) -> list[str]:
    """Every mixture where none can be, and held-out blocks without held-out rows, in words."""
    problems, inside = [], []
    for name in type(recipe.data).model_fields:
        data = getattr(recipe.data, name)
        for source in data.sources if data and name in _MIXED_SETS else ():
            inside.append(source)
            if source.holds_out and name not in _HELD_OUT_SETS:
                problems.append(
                    f"data.{name}: source {source.label!r} holds rows out for a held-out loss, and RLVR has none; set "
                    "rlvr.held_out, which answers held-out prompts"
                )
    problems += [
        f"data source {source.label!r}: share, weight, repeats, num_rows and held_out are for training sets "
        f"({', '.join(_MIXED_SETS)}), and this one is read as it is; remove them, or use limit"
        for source in recipe.data_sources()
        if source.is_mixed and not any(source is one for one in inside)
    ]
    for block, settings in recipe.trainings.items():
        if block == "rlvr" or getattr(settings, "held_out", None) is None:
            continue
        rows = getattr(recipe.data, recipe.rows_of(block))
        if rows is not None and not any(source.holds_out for source in rows.sources):
            problems.append(
                f"{block}.held_out: no source of data.{recipe.rows_of(block)} holds rows out; give one held_out (a "
                f"share) or num_held_out, or remove {block}.held_out"
            )
    return problems
