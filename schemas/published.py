"""Published scores: which tables they stand in, how they were measured, and where each was read."""

from __future__ import annotations

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
        problems = [
            f"models.{name}.sources: no source is called {source!r}; there are {', '.join(self.sources)}"
            for name, model in self.models.items()
            for source in model.sources
            if source not in self.sources
        ]
        for name, model in self.models.items():
            for row, figure in model.figures.items():
                if row not in self.rows:
                    problems.append(
                        f"models.{name}.figures: no row is called {row!r}; there are {', '.join(self.rows)}"
                    )
                elif round(figure, self.rows[row].decimals) != figure:
                    problems.append(
                        f"models.{name}.figures.{row}: {figure:g} has more decimals than the row, "
                        f"{self.rows[row].decimals}; correct the figure, or rows.{row}.decimals"
                    )
        for name, table in self.tables.items():
            for field, known in (("rows", self.rows), ("models", self.models)):
                given = getattr(table, field)
                problems += [
                    f"tables.{name}.{field}: nothing is called {one!r}; there are {', '.join(known)}"
                    for one in given
                    if one not in known
                ]
                problems += [
                    f"tables.{name}.{field}: {one!r} is named twice; keep one of them"
                    for one in dict.fromkeys(given)
                    if given.count(one) > 1
                ]
            problems += [
                f"tables.{name}.models: {one!r} has none of its rows; add figures, or take it out"
                for one in table.models
                if one in self.models and not set(table.rows) & set(self.models[one].figures)
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self
