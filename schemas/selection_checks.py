"""What must hold between the block `selection`, the data sets and the trainings of a recipe. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from smoltulu.schemas.contamination import ContaminationSettings
from smoltulu.schemas.data import DataSettings
from smoltulu.schemas.selection import SelectionSettings
from smoltulu.schemas.training import TrainingSettings


class Recipe(Protocol):
    """What is read of a recipe (schemas/recipe.py)."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def selection(self) -> SelectionSettings | None: ...
    @property
    def contamination(self) -> ContaminationSettings | None: ...
    @property
    def trainings(self) -> Mapping[str, TrainingSettings]: ...

    def rows_of(self, block: str) -> str: ...


def selection_problems(recipe: Recipe) -> list[str]:
    """Every fault, in words."""
    settings = recipe.selection
    if settings is None or settings.method == "none":
        return []
    missing = [name for name in settings.sets if getattr(recipe.data, name) is None]
    there = [name for name in DataSettings.model_fields if getattr(recipe.data, name) and not name.endswith("_eval")]
    problems = [
        f"selection.sets: there is no data.{name} to select from; sets of this recipe: {', '.join(there) or 'none'}"
        for name in missing
    ]
    if recipe.contamination is not None and recipe.contamination.policy == "span":
        problems.append(
            "contamination.policy: span changes texts after they were scored, so that no score would belong to its "
            "row; set it to remove, or remove the block selection"
        )
    return problems


def selection_notes(recipe: Recipe) -> list[str]:
    """A sentence for every setting that does nothing, sets that nothing is trained on, and rows that are too long."""
    settings = recipe.selection
    if settings is None:
        return []
    notes = settings.ignored()
    if settings.method == "none":
        return notes
    trained = {recipe.rows_of(block) for block in recipe.trainings}
    for block, training in recipe.trainings.items():
        longest = getattr(training, "max_length", None)
        if recipe.rows_of(block) in settings.sets and longest is not None and longest > settings.max_length:
            notes.append(
                f"selection.max_length {settings.max_length:,} is below {block}.max_length {longest:,}: rows between "
                "are not scored, and kept out by every method; raise it if they are to be trained on"
            )
    return notes + [
        f"selection.sets: data.{name} is selected from, and nothing here is trained on it"
        for name in settings.sets
        if name not in trained
    ]
