"""Published scores: which tables they stand in, how they were measured, and where each was read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from math import sqrt
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from smoltulu.schemas.common import MAX_NAME, StrictModel
from smoltulu.schemas.evaluation import ScoreKind

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=MAX_NAME)]
Line = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\n]*$")]
Percent = Annotated[float, Field(ge=0, le=100)]


class PublishedSource(StrictModel):
    """Where figures are printed."""

    title: Line
    url: Line
    read_in: Line | None = Field(None, description="where we read it, if that was not the source itself")


class Definition(StrictModel):
    """One row: how the published figures were measured, and which score of ours may stand beside them."""

    title: Line
    task: Line = Field(description="our task of the same definition")
    also: tuple[Line, ...] = Field((), description="other names of this task")
    metric: Line = Field(description="its headline metric")
    suite: Line = Field("paper", description="the suite that our task belongs to")
    num_fewshot: int = Field(0, ge=0)
    num_items: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="items of the test set; several: of its members, whose means are averaged; none: unknown"
    )
    decimals: int = Field(1, ge=0, le=4, description="of the published figures, in percent")
    max_length: int | None = Field(None, description="tokens of prompt and answer; None: not limited")
    chat_template: bool = Field(True, description="measured under the model's chat template")
    near: tuple[Line, ...] = Field((), description="tasks of ours that are shown with it, marked as not comparable")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names under which our task may be."""
        return (self.task, *self.also)

    def stderr(self, figure: float) -> float | None:
        """Sampling error of a published figure, in percent; None where the number of items is not known.

        Binomial, as if all members scored alike: for members that differ, it is rather too large.
        """
        if not self.num_items:
            return None
        share = figure / 100
        return 100 * sqrt(share * (1 - share) * sum(1 / count for count in self.num_items)) / len(self.num_items)


class PublishedModel(StrictModel):
    """One column: a model, and the figures that all of its sources print."""

    title: Line
    sources: tuple[Name, ...] = Field(min_length=1)
    figures: dict[Name, Percent] = Field(min_length=1, description="row -> percent; a figure nobody read is left out")


class PublishedTable(StrictModel):
    """One table: its rows and columns, and which of our models belong into it."""

    title: Line
    kind: ScoreKind = Field("language_model")
    subjects: tuple[Name, ...] = Field(min_length=1, description="stages whose models are shown")
    rows: tuple[Name, ...] = Field(min_length=1)
    models: tuple[Name, ...] = Field(min_length=1)
    on_request: bool = Field(False, description="shown only where a user asks for it")


class PublishedTables(StrictModel):
    """A file of published figures."""

    format: Literal[1]
    sources: dict[Name, PublishedSource]
    rows: dict[Name, Definition]
    models: dict[Name, PublishedModel]
    tables: dict[Name, PublishedTable]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        problems = [*self._problems_of_models(), *self._problems_of_tables()]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(f"{problems[0]}{more}")
        return self

    def _problems_of_models(self) -> Iterator[str]:
        for name, model in self.models.items():
            for source in model.sources:
                if source not in self.sources:
                    yield f"models.{name}.sources: {_unknown('source', source, self.sources)}"
            for row, figure in model.figures.items():
                if row not in self.rows:
                    yield f"models.{name}.figures: {_unknown('row', row, self.rows)}"
                elif round(figure, self.rows[row].decimals) != figure:
                    yield (
                        f"models.{name}.figures.{row}: {figure:g} has more decimals than the row, "
                        f"{self.rows[row].decimals}; correct it, or rows.{row}.decimals"
                    )

    def _problems_of_tables(self) -> Iterator[str]:
        for name, table in self.tables.items():
            for what, given, known in (("row", table.rows, self.rows), ("model", table.models, self.models)):
                for one in dict.fromkeys(given):
                    if one not in known:
                        yield f"tables.{name}.{what}s: {_unknown(what, one, known)}"
                    elif given.count(one) > 1:
                        yield f"tables.{name}.{what}s: {one!r} is named twice; keep one of them"
            for one in table.models:
                if one in self.models and not set(table.rows) & set(self.models[one].figures):
                    yield f"tables.{name}.models: {one!r} has none of its rows; add figures, or take it out"


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"no {what} is called {name!r}; {hint}"
