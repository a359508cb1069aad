"""Language shares as a page of their own: the table of the paper, and its bars as inline SVG."""

from __future__ import annotations

from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.tasks.report import text
from smoltulu.tasks.report.document import document
from smoltulu.tasks.report.markup import e, table

_REASONS = {
    "too_short": "too short",
    "code": "code",
    "maths": "maths",
    "unclear": "unclear",
}


def languages_page(outputs: LanguageOutputs) -> str:
    """The whole page; needs nothing but itself."""
    body = (
        f"<header><h1>Language shares</h1><p>{text.number(outputs.num_rows)} rows, "
        f"{text.number(outputs.num_determined)} with a language, judged by {e(outputs.detector)} "
        f"{e(outputs.detector_version)}.</p></header><main>{language_bars(outputs)}{language_table(outputs)}</main>"
    )
    return document("Language shares", body)


def language_bars(outputs: LanguageOutputs) -> str:
    """A bar per language and one for the rows without; lengths are shares of all rows."""
    bars = [(share.name, share.share, "dot") for share in outputs.shares]
    if outputs.num_undetermined:
        bars.append(("undetermined", outputs.num_undetermined / outputs.num_rows, "band"))
    if not bars:
        return ""
    width, left, right, row_height = 640, 130, 70, 20
    longest = max(share for _, share, _ in bars)
    parts = []
    for index, (name, share, style) in enumerate(bars):
        y = index * row_height
        length = share / longest * (width - left - right)
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{e(name)}</text>'
            f'<rect class="{style}" x="{left}" y="{y + 3}" width="{max(length, 0.5):.1f}" height="{row_height - 6}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 14}">{text.percent(share)}</text>'
        )
    height = len(bars) * row_height + 4
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="Share of rows per language">'
        f"{''.join(parts)}</svg></figure>"
    )


def language_table(outputs: LanguageOutputs) -> str:
    """Languages, largest first, then what could not be judged, by reason."""
    rows = [
        f'<tr><th scope="row">{e(share.name)} <small>{e(share.language)}</small></th>'
        f'<td class="n">{text.number(share.num_rows)}</td><td class="n">{text.percent(share.share)}</td>'
        f'<td class="n">{text.percent(share.share_of_determined)}</td></tr>'
        for share in outputs.shares
    ]
    rows += [
        f'<tr><th scope="row">undetermined: {e(_REASONS[reason])}</th><td class="n">{text.number(count)}</td>'
        f'<td class="n">{text.percent(count / outputs.num_rows)}</td><td></td></tr>'
        for reason, count in outputs.undetermined.items()
    ]
    heads: list[str | tuple[str, str]] = [
        "language",
        ("rows", "n"),
        ("of all rows", "n"),
        ("of rows with a language", "n"),
    ]
    return table(heads, rows)
