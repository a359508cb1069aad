r"""Tables of scores as LaTeX: a `tabular` each, without packages, under any engine with UTF-8 input.

Names come from models, recipes and data. A character that TeX could read as more than itself is written as a command,
and no cell can begin what follows `\\`.
"""

from __future__ import annotations

import re

from smoltulu.artifacts.readable import clean
from smoltulu.tasks.tables.values import Cell, Column, Row, Table

#: `[` and `*` are arguments of `\\` where they begin a row; `"` and `'` are shorthands of babel, or ligatures.
ESCAPED = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "'": r"\char39{}",
    "`": r"\char96{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "…": r"\dots{}",
}
_SPECIAL = re.compile("|".join(map(re.escape, ESCAPED)) + r"|(?<=[-,?!])(?=[-,`?!])")


def escape(value: object) -> str:
    """Text of one line that TeX sets as it is. Runs of `-` are kept apart: as a ligature they would be a dash."""
    line = " ".join(clean(value).split())
    return _SPECIAL.sub(lambda match: ESCAPED[match[0]] if match[0] else "{}", line)


def latex(table: Table) -> str:
    """One table with its notes."""
    columns = f"l|{'r' * len(table.published)}|{'r' * len(table.measured)}|l".replace("||", "|")
    heads = [_published_head(column) for column in table.published]
    heads += [rf"{escape(column.title)}, measured" for column in table.measured]
    lines = [
        rf"% {escape(table.title)}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        _line([table.row_head, *heads, "Measured with"]),
        r"\hline",
        *(_row(row) for row in table.rows),
        r"\hline",
        r"\end{tabular}",
        r"\par\smallskip",
        rf"{{\footnotesize {escape(table.title)}. {escape(' '.join(table.legend))}\par",
        *(rf"{_mark(number)} {escape(note)}.\par" for number, note in enumerate(table.notes, 1)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _published_head(column: Column) -> str:
    return rf"{escape(column.letter)}: {escape(column.title)}, published{_marks(column.notes)}"


def _row(row: Row) -> str:
    title = escape(f"{row.title} {row.detail}") + _marks(row.notes)
    return _line([title, *map(_cell, (*row.published, *row.measured)), escape(row.source or "-")])


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    value = escape(cell.value)
    parts = [rf"\textbf{{{value}}}" if cell.bold else value]
    if cell.num_samples:
        parts.append(escape(f"({', '.join((f'n = {cell.num_samples}', *cell.marks))})"))
    parts += [rf"\textgreater{{}}\,{escape(letter)}" for letter in cell.above]
    parts += [rf"\textless{{}}\,{escape(letter)}" for letter in cell.below]
    if cell.not_comparable or cell.notes:
        parts.append(("not comparable" if cell.not_comparable else "") + _marks(cell.notes))
    return " ".join(parts)


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _marks(notes: tuple[int, ...]) -> str:
    return "".join(_mark(note) for note in notes)


def _mark(number: int) -> str:
    return rf"\textsuperscript{{{number}}}"
