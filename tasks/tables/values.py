"""What a table is made from, and what it is made of: plain values, no layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smoltulu.schemas.evaluation import Score, ScoreKind
from smoltulu.tasks.comparison.evaluations import Measured


class Notes(dict[str, int]):
    """Numbered sentences, each once."""

    def number(self, text: str) -> int:
        return self.setdefault(text, len(self) + 1)


@dataclass(frozen=True)
class MeasuredModel:
    """A model that was measured here: a column.

    label      what the column is called
    subject    the stage that made the model
    items      task -> score and items, as `tasks.comparison.evaluations.measured` reads them; for the paired tests
    precision  that the recipe asked for
    """

    label: str
    subject: str
    kind: ScoreKind
    scores: tuple[Score, ...]
    items: Mapping[str, Measured] = field(default_factory=dict)
    precision: str | None = None
    max_length: int | None = None

    def precision_of(self, score: Score) -> str | None:
        """What it was measured in, which the device decides; what was asked for where the score does not say it."""
        said = score.details.get("dtype")
        return str(said) if said else self.precision

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
    row_head: str = "Task"

    @property
    def has_scores(self) -> bool:
        """Whether any of it was measured here."""
        return any(cell for row in self.rows for cell in row.measured)

    @property
    def has_figures(self) -> bool:
        """Whether a figure was measured here in a row that has a published one, or in a table that has none."""
        rows = [row for row in self.rows if any(row.published) or not self.published]
        return any(cell and cell.num_samples for row in rows for cell in row.measured)
