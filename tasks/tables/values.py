"""What a table is made from, and what it is made of: plain values, no layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smoltulu.schemas.evaluation import Score, ScoreKind
from smoltulu.tasks.comparison.evaluations import Measured


@dataclass(frozen=True)
class MeasuredModel:
    """A model that was measured here: a column.

    label      what the column is called
    subject    the stage that made the model
    items      task -> score and items, as `tasks.comparison.evaluations.measured` reads them; for the paired tests
    """

    label: str
    subject: str
    kind: ScoreKind
    scores: tuple[Score, ...]
    items: Mapping[str, Measured] = field(default_factory=dict)
    precision: str | None = None
    max_length: int | None = None

    def measured(self, score: Score) -> Measured | None:
        """The items of a score; None where none were kept.

        A score of some subsets of a task (a section of RewardBench) has those items of the whole.
        """
        exact = next((one for one in self.items.values() if one.score == score and one.items), None)
        subsets = score.details.get("subsets")
        if exact is not None or not isinstance(subsets, dict):
            return exact
        whole = [one.items for one in self.items.values() if one.score.task == score.task]
        items = {name: item for one in whole for name, item in one.items() if item.row.get("subset") in subsets}
        return Measured(score, items) if items else None


@dataclass(frozen=True)
class Column:
    """The head of a column. `letter`: of a published one, by which a cell says that it is above or below it."""

    title: str
    letter: str = ""
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A score as text.

    above, below     letters of the published columns that it significantly differs from
    not_comparable   stands beside published figures, but was measured otherwise; a note says how
    marks            words that a reader must see beside it: `part` of the task, `near chance`
    """

    value: str
    num_samples: str = ""
    bold: bool = False
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    not_comparable: bool = False
    marks: tuple[str, ...] = ()
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One task: its cells in the order of the columns, None where there is no score."""

    title: str
    detail: str  # metric and shots, where the title does not say them
    source: str  # with what the measured cells were measured
    published: tuple[Cell | None, ...]
    measured: tuple[Cell | None, ...]
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows, and what a reader must know: `notes` are numbered from 1, `legend` are sentences."""

    name: str
    title: str
    published: tuple[Column, ...]
    measured: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    legend: tuple[str, ...]

    @property
    def has_scores(self) -> bool:
        """Whether any of it was measured here."""
        return any(cell for row in self.rows for cell in row.measured)
