"""From scores to rows: stages × tasks, and our models beside published ones. Pure; no layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from smoltulu.schemas.benchmarks import BenchmarkRegistry
from smoltulu.schemas.evaluation import Score
from smoltulu.schemas.published import Definition, PublishedModel, PublishedTables
from smoltulu.tasks.tables.data_tables import NAMES, MeasuredSet, data_table
from smoltulu.tasks.tables.significance import Figure, RowTests, direction, row_tests
from smoltulu.tasks.tables.values import Cell, Column, MeasuredModel, Notes, Row, Table

LEVEL = 0.05
STAGES = "stages"
_SMALL = 10  # what is no percent has three decimals under it, else one, as everywhere in reports
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")

#: Task, metric and shots: what a row is of.
_Place = tuple[str, str, int | None]


def tables_of(
    published: PublishedTables,
    models: Sequence[MeasuredModel],
    names: Sequence[str] = (),
    level: float = LEVEL,
    *,
    registry: BenchmarkRegistry | None = None,
    sets: Sequence[MeasuredSet] = (),
) -> list[Table]:
    """The tables that are asked for; else stages × tasks, and every published one of which something was measured.

    registry  of benchmarks, for tables of data sets; None: there are none

    Raises:
        ValueError: a table that does not exist.
    """
    known = (STAGES, *published.tables, *(() if registry is None else NAMES))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no table is called {unknown[0]!r}; there are {', '.join(known)}")
    made: list[Table] = []
    for name in dict.fromkeys(names or known):
        if name == STAGES:
            made += stage_tables(models, level)
        elif registry is not None and name in NAMES:
            table = data_table(name, registry, sets)
            made += [table] if names or table.has_figures else []
        elif names or not published.tables[name].on_request:
            table = paper_table(name, published, models, level)
            made += [table] if names or table.has_scores else []
    return made


# ---------------------------------------------------------------------------------------------- stages × tasks


def stage_tables(models: Sequence[MeasuredModel], level: float = LEVEL) -> list[Table]:
    """Everything that was measured: a table of the language models, and one of the rewards. Without rows: left out."""
    writers = [model for model in models if model.kind == "language_model"]
    rewards = [model for model in models if model.kind != "language_model"]
    tables = []
    for title, columns in (("Language models: stages × tasks", writers), ("Rewards on pairs", rewards)):
        notes, rows = Notes(), []
        for place, scores in _by_place(columns).items():
            figures = [_figure(model, score) for model, score in zip(columns, scores, strict=True)]
            tests = row_tests(figures, level=level, better=_direction(scores))
            cells = tuple(
                None if score is None else _cell(score, _plain(score), bold=number == tests.best)
                for number, score in enumerate(scores)
            )
            source = _sources(columns, scores)
            rows.append(Row(place[0], place[1], source, (), cells, _not_compared(notes, tests, columns)))
        heads = tuple(Column(model.label) for model in columns)
        if rows:
            legend = ("± is one standard error, n the number of items; - was not measured.", *_of_bold(rows, level))
            tables.append(Table(STAGES, title, (), heads, tuple(rows), tuple(notes), legend))
    return tables


# ---------------------------------------------------------------------------------------------- beside published


def paper_table(name: str, published: PublishedTables, models: Sequence[MeasuredModel], level: float = LEVEL) -> Table:
    """A published table with our models of its stages as further columns."""
    table, notes = published.tables[name], Notes()
    ours = [model for model in models if model.kind == table.kind and model.subject in table.subjects]
    heads = _published_heads([published.models[model] for model in table.models], published, notes)
    grid = _by_place(ours)
    rows = []
    for key in table.rows:
        definition = published.rows[key]
        printed = [published.models[model].figures.get(key) for model in table.models]
        fitting = [place for place in grid if _fits(place, definition)]
        own = next((grid[place] for place in fitting), [None] * len(ours))
        for place in fitting[1:]:  # with shots, and without a word about them
            own = [one or other for one, other in zip(own, grid[place], strict=True)]
        row = _beside(definition, printed, own, ours, heads, notes, level)
        rows.append(replace(row, title=definition.title))
        for place in _near(key, grid, published):
            row = _beside(definition, [None] * len(heads), grid[place], ours, heads, notes, level)
            rows.append(replace(row, title=place[0], detail=place[1]))
    columns = tuple(Column(model.label) for model in ours)
    return Table(name, table.title, heads, columns, tuple(rows), tuple(notes), _legend(rows, level))


def _published_heads(models: Sequence[PublishedModel], published: PublishedTables, notes: Notes) -> tuple[Column, ...]:
    heads = []
    for number, model in enumerate(models):
        sources = [published.sources[source] for source in model.sources]
        texts = [
            f"published: {one.title}, {one.url}" + (f"; read in {one.read_in}" if one.read_in else "")
            for one in sources
        ]
        heads.append(Column(model.title, _letter(number), tuple(map(notes.number, texts))))
    return tuple(heads)


def _fits(place: _Place, definition: Definition) -> bool:
    task, metric, shots = place
    own = task in definition.tasks and metric == definition.metric
    return own and shots in (None, definition.num_fewshot)


def _near(key: str, grid: dict[_Place, list[Score | None]], published: PublishedTables) -> list[_Place]:
    """What was measured near a row: its task with another metric or other shots, or a task that is held beside it."""
    return [
        place
        for place in grid
        if _home(place, published) == key
        and _direction(grid[place]) == 1  # a share, as the figures of the table
        and not any(_fits(place, definition) for definition in published.rows.values())
    ]


def _home(place: _Place, published: PublishedTables) -> str | None:
    """The row of this task; of several (the sections of RewardBench) that of the metric, else the last."""
    task, metric, _ = place
    rows = [name for name, one in published.rows.items() if task in (*one.tasks, *one.near)]
    of_metric = [name for name in rows if published.rows[name].metric == metric.partition(" (")[0]]
    return next(reversed(of_metric or rows), None)


def _beside(
    definition: Definition,
    printed: Sequence[float | None],
    scores: Sequence[Score | None],
    ours: Sequence[MeasuredModel],
    heads: Sequence[Column],
    notes: Notes,
    level: float,
) -> Row:
    """A row without its title."""
    reasons = [
        [] if score is None else not_comparable(score, definition, model)
        for score, model in zip(scores, ours, strict=True)
    ]
    tests = row_tests(
        [_figure(model, score, 100) for model, score in zip(ours, scores, strict=True)],
        [None if one is None else Figure(one, definition.stderr(one)) for one in printed],
        level=level,
        stands_beside=[not reason for reason in reasons],
    )
    cells: list[Cell | None] = []
    for number, (score, reason) in enumerate(zip(scores, reasons, strict=True)):
        if score is None:
            cells.append(None)
            continue
        cell = _cell(score, _percent(score, definition.decimals), bold=number == tests.best)
        if reason:
            note = notes.number(f"not comparable: {'; '.join(reason)}")
            cell = replace(cell, not_comparable=True, notes=(note,))
        cells.append(
            replace(
                cell,
                above=tuple(heads[column].letter for column in tests.above[number]),
                below=tuple(heads[column].letter for column in tests.below[number]),
            )
        )
    marks = _not_compared(notes, tests, ours)
    unknown = not definition.num_items and any(one is not None for one in printed)
    if unknown and any(score and not reason for score, reason in zip(scores, reasons, strict=True)):
        marks += (notes.number("no test against the published figures: on how many items they stand is not known"),)
    figures = tuple(None if one is None else Cell(f"{one:.{definition.decimals}f}") for one in printed)
    return Row("", "", _sources(ours, scores), figures, tuple(cells), marks)


def not_comparable(score: Score, definition: Definition, model: MeasuredModel) -> list[str]:
    """Why a score may not stand beside the published figures; empty where it may."""
    reasons = []
    if score.task not in definition.tasks:
        reasons.append(f"{score.task} is defined otherwise than {definition.task} of suite {definition.suite}")
    elif score.metric != definition.metric:
        reasons.append(f"metric {score.metric}, published {definition.metric}")
    if score.num_fewshot not in (None, definition.num_fewshot):
        reasons.append(f"{score.num_fewshot}-shot, published {definition.num_fewshot}-shot")
    num_items = sum(definition.num_items)
    if score.limited:
        of_all = f", {score.num_samples:,} of {num_items:,} items" if num_items else ""
        reasons.append(f"part of the task{of_all}")
    elif num_items and score.task in definition.tasks and score.num_samples != num_items:
        reasons.append(f"{score.num_samples:,} items, published on {num_items:,}")
    if definition.chat_template and score.template_digest == "none":
        reasons.append("without a chat template, published with one")
    if definition.max_length and model.max_length not in (None, definition.max_length):
        reasons.append(f"at most {model.max_length:,} tokens, published with {definition.max_length:,}")
    if (asked := score.details.get("max_gen_toks_asked")) is not None:
        reasons.append(f"answers cut at {score.details.get('max_gen_toks')} tokens of {asked}")
    return reasons


# ---------------------------------------------------------------------------------------------- parts of rows


def _by_place(models: Sequence[MeasuredModel]) -> dict[_Place, list[Score | None]]:
    """Task, metric and shots -> the score of each model."""
    grid: dict[_Place, list[Score | None]] = {}
    for number, model in enumerate(models):
        for score in model.scores:
            row = grid.setdefault((score.task, score.metric, score.num_fewshot), [None] * len(models))
            row[number] = row[number] or score
    return grid


def _direction(scores: Sequence[Score | None]) -> int:
    return next(direction(score) for score in scores if score is not None)


def _figure(model: MeasuredModel, score: Score | None, scale: float = 1.0) -> Figure | None:
    if score is None:
        return None
    stderr = None if score.stderr is None else scale * score.stderr
    return Figure(scale * score.value, stderr, model.measured(score), model.precision_of(score))


def _cell(score: Score, value: str, bold: bool) -> Cell:
    # `is_near_chance`: guessing gives such a score as well (tasks/evaluation).
    marks = {"part": score.limited, "near chance": score.details.get("is_near_chance") is True}
    return Cell(value, f"{score.num_samples:,}", bold, marks=tuple(name for name, there in marks.items() if there))


def _plain(score: Score) -> str:
    decimals = 3 if abs(score.value) < _SMALL else 1
    return f"{score.value:.{decimals}f}" + ("" if score.stderr is None else f" ± {score.stderr:.{decimals}f}")


def _percent(score: Score, decimals: int) -> str:
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.{decimals}f}"
    return f"{100 * score.value:.{decimals}f}{error}"


def _sources(models: Sequence[MeasuredModel], scores: Sequence[Score | None]) -> str:
    """Harness, version of the task, shots and precision of the measured cells."""
    found = {
        f"{score.harness}, {score.task} version {score.task_version}"
        + ("" if score.num_fewshot is None else f", {score.num_fewshot}-shot")
        + (f", {precision}" if (precision := model.precision_of(score)) else "")
        for model, score in zip(models, scores, strict=True)
        if score is not None
    }
    return "; ".join(sorted(found))


def _not_compared(notes: Notes, tests: RowTests, models: Sequence[MeasuredModel]) -> tuple[int, ...]:
    """A note for every reason why models are not compared item by item."""
    by_reason: dict[str, list[str]] = {}
    for (first, second), reason in tests.untested.items():
        pair = f"{models[first].label} with {models[second].label}"
        by_reason.setdefault(_DIGEST.sub(r"\1", reason), []).append(pair)
    return tuple(
        notes.number(f"not compared item by item: {', '.join(pairs)} ({reason})") for reason, pairs in by_reason.items()
    )


def _letter(number: int) -> str:
    """A to Z, then AA."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[number] if number < len(letters) else _letter(number // len(letters) - 1) + letters[number % 26]


def _of_bold(rows: Sequence[Row], level: float) -> list[str]:
    if any(cell and cell.bold for row in rows for cell in row.measured):
        return [
            "Bold: significantly better than every other measured model of the row that it can be compared with "
            f"(paired by item; all tests of a row together at {level:g}, Holm)."
        ]
    several = any(sum(cell is not None for cell in row.measured) > 1 for row in rows)
    return [f"No measured score is significantly better than all others of its row at {level:g}."] if several else []


def _legend(rows: Sequence[Row], level: float) -> tuple[str, ...]:
    cells = [cell for row in rows for cell in row.measured if cell]
    lines = ["Percent; ± is one standard error, n the number of items; - was not measured, or not published."]
    lines.append("Published columns are as printed; nothing of them was measured here.")
    if not cells:
        lines.append("No model of this table was measured here.")
    lines += _of_bold(rows, level)
    if any(cell.above or cell.below for cell in cells):
        lines.append(
            f"> A, < B: significantly above the published column A, below B, at {level:g} (Holm over the row). That "
            "test is unpaired: of a published figure only its sampling error is known, from its number of items."
        )
    return tuple(lines)
